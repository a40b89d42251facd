# SPDX-License-Identifier: Apache-2.0
"""What becomes of a router's selections on the way to experts, and counts of them."""

import jax
import jax.numpy as jnp

from jax_ep._src import compat
from jax_ep._src.balancing.arrays import PlacementArrays
from jax_ep._src.balancing.place import place
from jax_ep._src.groups.group import EpGroup
from jax_ep._src.moe import MoeStats
from jax_ep._src.rank_mask import left_by, renormalized
from jax_ep._src.sharded.token_split import TokenSplit


def sent_selections(
    group: EpGroup,
    topk_idx: jax.Array,
    topk_weights: jax.Array,
    *,
    placement: PlacementArrays | None,
    token_ids: jax.Array | None,
    rank_mask: jax.Array | None,
    renormalize: bool,
) -> tuple[jax.Array, jax.Array]:
    """Inside of `shard_map`: what of this device's selections is sent where, with which weights.

    Args:
        group: an open group.
        topk_idx: `[T, K]` int32, experts that the router knows, or -1.
        topk_weights: `[T, K]` float32.
        placement: where copies of experts are; None: the router's experts are the group's.
        token_ids: as `place` takes it; without effect where there is no placement.
        rank_mask: `[R]` bool, the ranks that take part; None: all.
        renormalize: whether the weights of what is sent of a token are multiplied by the sum of all
            of its weights over the sum of theirs.

    Returns:
        `[T, K]` int32, the group's experts, -1 where a selection is lost, too: its expert has no
        copy, or `rank_mask` leaves it out. And `[T, K]` float32.
    """
    sent = topk_idx
    if placement is not None:
        sent = place(topk_idx, placement, group=group, token_ids=token_ids)
    if rank_mask is not None:
        sent = left_by(group, sent, rank_mask)
    if renormalize and sent is not topk_idx:
        topk_weights = renormalized(topk_weights, topk_idx, sent)
    return sent, topk_weights


def over_tokens(split: TokenSplit, *counts: jax.Array) -> tuple[jax.Array, ...]:
    """Inside of `shard_map`: sums, over all devices, of counts of each device's own tokens."""
    axes = (*split.axes, *split.gathered)
    return jax.lax.psum(compat.as_varying(frozenset(axes), *counts), axes)


def stats_of_mesh(group: EpGroup, split: TokenSplit, stats: MoeStats) -> tuple[MoeStats, jax.Array]:
    """Inside of `shard_map`: statistics of all devices, `tokens_per_expert` of this rank's experts.

    And `num_dropped` of this rank's experts, `[]` int32. Without `num_lost`.
    """
    counted = _counted_once(split, stats)
    dropped = jax.lax.psum(counted.num_dropped, split.axes)
    of_experts = (counted.tokens_per_expert, counted.num_dropped)
    if data_axes := tuple(name for name in split.axes if name not in group.axis_names):
        of_experts = jax.lax.psum(of_experts, data_axes)
    return MoeStats(tokens_per_expert=of_experts[0], num_dropped=dropped), of_experts[1]


def _counted_once(split: TokenSplit, stats: MoeStats) -> MoeStats:
    """Inside of `shard_map`: alike on devices that work on the same tokens."""
    # Counts of no tokens are constants, which vary over no axis and could not be summed over any.
    tokens_per_expert, num_dropped = compat.as_varying(
        frozenset(split.axes), stats.tokens_per_expert, stats.num_dropped
    )
    # Along other axes devices count the same tokens, which JAX cannot know.
    seen = compat.varying_axes(tokens_per_expert, num_dropped) - frozenset(split.axes)
    if copies := tuple(name for name in split.mesh.axis_names if name in seen):
        is_first = jax.lax.axis_index(copies) == 0
        counts = compat.as_varying(seen, tokens_per_expert, num_dropped)
        tokens_per_expert, num_dropped = (
            jax.lax.psum(jnp.where(is_first, count, 0), copies) for count in counts
        )
    return MoeStats(tokens_per_expert=tokens_per_expert, num_dropped=num_dropped)
