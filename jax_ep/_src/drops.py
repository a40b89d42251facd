# SPDX-License-Identifier: Apache-2.0
"""What a backend is given in place of the user's `topk_idx`: `EpConfig.drop` and `pad_experts`.

Backends drop rows in row order, and number all `R * L` experts. So selections of experts that only
pad are made invalid before, and with `drop` "even" those that are to be dropped are taken out.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jax_ep._src import compat
from jax_ep._src.config import EpConfig
from jax_ep._src.groups.group import EpGroup
from jax_ep._src.spec import OpSpec
from jax_ep._src.types import Routing

# Added to a selection of an expert that only pads: it is then out of range, and in the error one
# can still read what it was.
PADDING_OFFSET = 1_000_000


def routing_of(group: EpGroup, spec: OpSpec, topk_idx: jax.Array) -> Routing | None:
    """What the backend of a group is given in place of `topk_idx`; None: `topk_idx` itself.

    Where rows have to be dropped evenly, it is a collective of the group's ranks.
    """
    padded = spec.num_experts != group.config.num_experts
    if padded:
        topk_idx = _without_padding(group.config.num_experts, spec.num_experts, topk_idx)
    if _drops_evenly(group.config, spec, topk_idx.shape[0]):
        return _even(spec, topk_idx)
    return Routing(topk_idx) if padded else None


def _without_padding(num_experts: int, num_padded: int, topk_idx: jax.Array) -> jax.Array:
    only_pads = (topk_idx >= num_experts) & (topk_idx < num_padded)
    return jnp.where(only_pads, topk_idx + PADDING_OFFSET, topk_idx)


def _drops_evenly(config: EpConfig, spec: OpSpec, num_tokens: int) -> bool:
    """Whether "even" may differ from "rows" in a call with so many tokens on each rank."""
    if config.drop != "even":
        return False
    unlimited = dataclasses.replace(config, recv_capacity=None, capacity_factor=None)
    worst = unlimited.capacity(num_ranks=spec.num_ranks, num_tokens=num_tokens)
    return spec.recv_capacity < worst and _fair_rows(spec) > 0


def _fair_rows(spec: OpSpec) -> int:
    """Rows that every local expert may keep, whatever the others were asked for."""
    align = spec.expert_alignment
    return spec.recv_capacity // spec.num_local_experts // align * align


@functools.partial(jax.jit, static_argnums=0, inline=True)
def _even(spec: OpSpec, topk_idx: jax.Array) -> Routing:
    """`drop` "even", worked out by each rank for all experts, from the counts of all ranks."""
    rank = jax.lax.axis_index(spec.axis_names)
    (topk_idx,) = compat.as_varying(compat.varying_axes(rank, topk_idx), topk_idx)
    num_experts = spec.num_experts
    is_valid = (topk_idx >= 0) & (topk_idx < num_experts)
    key = jnp.where(is_valid, topk_idx, num_experts).reshape(-1)
    own = jnp.bincount(key, length=num_experts + 1).astype(jnp.int32)
    by_rank = jax.lax.all_gather(own[:-1], spec.axis_names)  # [R, E]
    asked = jnp.sum(by_rank, axis=0, dtype=jnp.int32)
    kept = kept_rows(spec, asked.reshape(spec.num_ranks, -1)).reshape(-1)
    # The first rows of an expert are those of the ranks below this one.
    is_below = jnp.arange(spec.num_ranks, dtype=jnp.int32)[:, None] < rank
    own_kept = kept - jnp.sum(jnp.where(is_below, by_rank, 0), axis=0, dtype=jnp.int32)
    own_kept = jnp.append(own_kept, jnp.zeros_like(own_kept[:1]))  # of what is not valid
    is_kept = (_position(key, own) < own_kept[key]).reshape(topk_idx.shape)
    # What is not valid is left to the backend, which says so.
    is_kept |= ~is_valid | _repeats(topk_idx)
    first, num_local = rank * spec.num_local_experts, spec.num_local_experts
    asked, kept = (jax.lax.dynamic_slice_in_dim(a, first, num_local) for a in (asked, kept))
    return Routing(
        topk_idx=jnp.where(is_kept, topk_idx, -1),
        tokens_per_expert=asked,
        num_dropped=jnp.sum(asked - kept, dtype=jnp.int32),
    )


def kept_rows(spec: OpSpec, asked: jax.Array) -> jax.Array:
    """How many of its rows each expert keeps: `EpConfig.drop` "even" in closed form.

    Of the ranks' experts with rows the last one needs no whole groups. All others, `whole`, share
    what whole groups fit before its fair share; the last one keeps what then fits behind them.

    Args:
        spec: of the exchange, in which `fair` is above 0.
        asked: `[R, L]` int32, rows of each local expert of each rank.

    Returns:
        `[R, L]` int32.
    """
    align, capacity = spec.expert_alignment, spec.recv_capacity

    def aligned(rows: jax.Array) -> jax.Array:
        return (rows + (align - 1)) // align * align

    def sums(rows: jax.Array) -> jax.Array:
        return jnp.sum(rows, axis=1, keepdims=True, dtype=jnp.int32)

    behind = sums(asked) - jnp.cumsum(asked, axis=1, dtype=jnp.int32)
    whole = behind > 0
    fair = jnp.minimum(asked, _fair_rows(spec))
    groups = jnp.where(whole, aligned(fair), 0)
    room = (capacity - sums(jnp.where(whole, 0, fair))) // align * align - sums(groups)
    wanted = jnp.where(whole, aligned(asked), 0) - groups
    taken_before = jnp.cumsum(wanted, axis=1, dtype=jnp.int32) - wanted
    kept = jnp.minimum(asked, groups + jnp.maximum(room - taken_before, 0))
    start_of_last = sums(jnp.where(whole, aligned(kept), 0))
    return jnp.where(whole, kept, jnp.minimum(asked, capacity - start_of_last))


def _position(key: jax.Array, counts: jax.Array) -> jax.Array:
    """How many equal keys are before each one; `counts` is how many there are of each."""
    order = jnp.argsort(key, stable=True)
    start = jnp.cumsum(counts, dtype=jnp.int32) - counts
    in_order = jnp.arange(key.size, dtype=jnp.int32) - start[key[order]]
    return jnp.zeros_like(key).at[order].set(in_order, unique_indices=True)


def _repeats(topk_idx: jax.Array) -> jax.Array:
    """`[T, 1]`: whether a token selects an expert more than once."""
    repeats = jnp.zeros_like(topk_idx[:, :1], dtype=jnp.bool_)
    for k in range(1, topk_idx.shape[1]):
        same = (topk_idx[:, k : k + 1] == topk_idx[:, :k]) & (topk_idx[:, k : k + 1] >= 0)
        repeats |= jnp.any(same, axis=1, keepdims=True)
    return repeats
