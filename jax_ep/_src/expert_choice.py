# SPDX-License-Identifier: Apache-2.0
"""`route_expert_choice`: every expert chooses its tokens."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jax_ep._src.checks import check_call
from jax_ep._src.compat import as_varying
from jax_ep._src.groups.group import EpGroup
from jax_ep._src.limits import INT32_MAX, is_int
from jax_ep._src.public import set_module
from jax_ep._src.scores import as_logits, scores_of


@set_module("jax_ep")
def route_expert_choice(
    logits: ArrayLike, *, capacity: int, group: EpGroup
) -> tuple[jax.Array, jax.Array]:
    """Lets every expert choose its tokens, so that the load is even without any auxiliary loss.

    Expert choice routing (Zhou et al. 2022, arXiv:2202.09368): an expert takes the `capacity`
    tokens that have the largest softmax scores for it, among the tokens of all ranks of the group,
    or all of them if there are fewer. A token may have any number of experts, none included. Of
    equal scores, that of the token with the lower (rank, number on the rank) counts as the larger
    one. With the paper's capacity factor `c`, the mean number of experts of a token, `capacity` is
    `R * T * c / E`.

    A token's experts depend on all other tokens of the batch, later ones included: a model that
    is to generate text token by token does not see them then.

    The results are as `dispatch` takes them for a group with `num_topk` equal to `num_experts`.
    Since no expert receives more than `capacity` rows, `EpConfig(recv_capacity=L * capacity)` holds
    all of them without drops (`capacity` rounded up to a multiple of `expert_alignment`); without
    it, the buffer is for the worst case, all tokens at all experts. Backend `ffi` serves no
    `num_topk` above 32 on GPUs; `xla` does.

    Runs inside `jax.shard_map` over the group's axes. Gradients reach `logits` through the
    weights; the choice has none. A token and an expert whose logit is -inf never come together: a
    token whose logits are all -inf is chosen by nobody. With a NaN or +inf among the logits it is
    undefined which tokens are chosen; an expert still takes at most `capacity`.

    The ranks send each other the scores of all tokens and get a byte for each, by `all_to_all`
    twice: each rank sends and receives about `5 * T * E` bytes. Each then sorts the
    `R * T` scores of each of its `L` experts.

    Args:
        logits: `[T, E]` of this rank, floating point; `T` is the same on all ranks.
        capacity: tokens of each expert, at least 1.
        group: an open `EpGroup` whose config has `num_topk` equal to `num_experts`, `E`.

    Returns:
        `topk_idx [T, E]` int32, `e` in column `e` where expert `e` has chosen the token and -1
        where it has not, and `topk_weights [T, E]` float32, the softmax scores there and 0
        elsewhere.

    Raises:
        ValueError: an argument has a value that is not allowed, or the call is not inside
            `shard_map` over the group's axes.
        EpGroupClosed: the group has been closed.
    """
    check_call("route_expert_choice", group)
    logits = as_logits(logits)
    _check(logits, capacity, group)
    scores = scores_of(logits, "softmax")
    ranked = jax.lax.stop_gradient(jnp.where(jnp.isneginf(logits), -1.0, scores))
    is_chosen = _chosen(ranked, int(capacity), group)
    experts = jnp.arange(logits.shape[1], dtype=jnp.int32)
    return jnp.where(is_chosen, experts[None, :], -1), jnp.where(is_chosen, scores, 0.0)


def _chosen(ranked: jax.Array, capacity: int, group: EpGroup) -> jax.Array:
    """`[T, E]` bool: which experts have chosen a token of this rank; none that it ranks below 0.

    The ranks of the experts decide. A rank that compared its own scores with an expert's least
    chosen one might have computed them twice, and rounded them differently.
    """
    num_tokens, num_experts = ranked.shape
    if not num_tokens:
        return jnp.zeros(ranked.shape, bool)
    axes = group.axis_names
    (ranked,) = as_varying(frozenset(axes), ranked)
    # Experts of padding, where the ranks do not divide the experts.
    padding = group.num_ranks * group.num_local_experts - num_experts
    ranked = jnp.pad(ranked, ((0, 0), (0, padding)), constant_values=-1.0)
    # [R * T, L], by (rank, number on the rank).
    ranked = jax.lax.all_to_all(ranked, axes, split_axis=1, concat_axis=0, tiled=True)
    # Stable: of equal values, top_k puts the lower index first. So the last one says it all.
    values, tokens = jax.lax.top_k(ranked.T, min(capacity, ranked.shape[0]))
    last_value, last_token = values[None, :, -1], tokens[None, :, -1]
    every = jnp.arange(ranked.shape[0], dtype=tokens.dtype)[:, None]
    is_chosen = (ranked > last_value) | ((ranked == last_value) & (every <= last_token))
    is_chosen &= ranked >= 0
    sent_back = jax.lax.all_to_all(
        is_chosen.astype(jnp.int8), axes, split_axis=0, concat_axis=1, tiled=True
    )
    return sent_back[:, :num_experts] > 0


def _check(logits: jax.Array, capacity: Any, group: EpGroup) -> None:
    if not is_int(capacity):
        raise ValueError(f"capacity is {capacity!r}; allowed: an int from 1 to {INT32_MAX}")
    config = group.config
    if config.num_topk != config.num_experts:
        raise ValueError(
            f"group has EpConfig.num_topk {config.num_topk} and num_experts {config.num_experts}; "
            "allowed for route_expert_choice: num_topk equal to num_experts, because any number "
            "of experts may choose a token"
        )
    if logits.shape[1] != config.num_experts:
        raise ValueError(
            f"logits has shape {logits.shape}; allowed: [T, {config.num_experts}], as "
            "EpConfig.num_experts of the group"
        )
