# SPDX-License-Identifier: Apache-2.0
"""Where every selection's row is: each rank works it out for all ranks."""

import jax
import jax.numpy as jnp

from jax_ep._src.backends.plan import Counts, Plan
from jax_ep._src.backends.xla.indexing import or_past_end, take_rows
from jax_ep._src.spec import OpSpec


def plan(spec: OpSpec, topk_idx: jax.Array) -> tuple[Plan, Counts]:
    """Gathers the routing of all ranks; every rank works out all rows."""
    experts = jax.lax.all_gather(topk_idx, spec.axis_names)  # [R, T, K]
    experts = jnp.where((experts >= 0) & (experts < spec.num_experts), experts, -1)
    rank = jax.lax.axis_index(spec.axis_names)
    owner = jnp.where(experts >= 0, experts // spec.num_local_experts, -1)
    slot, group_sizes, num_rows = (_expert_slots if spec.layout == "expert" else _rank_slots)(
        spec, experts, owner, rank
    )
    slot = jnp.where(slot < spec.recv_capacity, slot, -1)

    is_local = owner == rank
    local_slot = jnp.where(is_local, slot, -1)
    row_source = _row_source(spec, local_slot)
    arrival_slot, arrival_topk = _arrivals(spec, experts, local_slot, is_local)
    local = jnp.where(is_local, experts - rank * spec.num_local_experts, spec.num_local_experts)
    tokens_per_expert = jnp.bincount(local.reshape(-1), length=spec.num_local_experts + 1)[:-1]
    plan = Plan(
        topk_idx=topk_idx,
        slot=slot[rank],
        row_source=row_source,
        row_topk_idx=_row_topk_idx(spec, experts, is_local, row_source, rank),
        arrival_slot=arrival_slot,
        arrival_topk=arrival_topk,
    )
    counts = Counts(
        group_sizes=group_sizes.astype(jnp.int32),
        tokens_per_expert=tokens_per_expert.astype(jnp.int32),
        num_dropped=(num_rows - jnp.sum(row_source >= 0)).astype(jnp.int32),
    )
    return plan, counts


def _exclusive_cumsum(x: jax.Array, axis: int) -> jax.Array:
    return jnp.cumsum(x, axis=axis, dtype=x.dtype) - x


def _expert_slots(
    spec: OpSpec, experts: jax.Array, owner: jax.Array, rank: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rows sorted by (expert, source rank, source token), experts padded to the alignment."""
    del owner
    num_experts, align = spec.num_experts, spec.expert_alignment
    key = jnp.where(experts >= 0, experts, num_experts).reshape(-1)
    order = jnp.argsort(key, stable=True)
    counts = jnp.bincount(key, length=num_experts + 1).astype(jnp.int32)
    position = jnp.arange(key.size, dtype=jnp.int32) - _exclusive_cumsum(counts, 0)[key[order]]
    padded = (counts[:-1] + (align - 1)) // align * align
    start = _exclusive_cumsum(padded.reshape(spec.num_ranks, -1), 1).reshape(-1)
    start = jnp.concatenate([start, jnp.zeros_like(start[:1])])
    slot = jnp.zeros_like(key).at[order].set(start[key[order]] + position)
    slot = jnp.where(experts >= 0, slot.reshape(experts.shape), spec.recv_capacity)

    local = rank * spec.num_local_experts + jnp.arange(spec.num_local_experts)
    ends = jnp.minimum(start[local] + padded[local], spec.recv_capacity)
    group_sizes = ends - jnp.minimum(start[local], spec.recv_capacity)
    return slot, group_sizes, jnp.sum(counts[local])


def _rank_slots(
    spec: OpSpec, experts: jax.Array, owner: jax.Array, rank: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Each token once per destination rank, sorted by (source rank, source token)."""
    num_sources, num_tokens, _ = experts.shape
    # one_hot has no 1 for an owner of -1.
    is_sent = jnp.any(jax.nn.one_hot(owner, spec.num_ranks, dtype=jnp.bool_), axis=2)  # [R, T, R]
    is_sent = is_sent.astype(jnp.int32)
    row = _exclusive_cumsum(is_sent.reshape(-1, spec.num_ranks), 0).reshape(is_sent.shape)
    slot = jnp.take_along_axis(row, jnp.maximum(owner, 0), axis=2)
    slot = jnp.where(experts >= 0, slot, spec.recv_capacity)
    is_received = (is_sent[..., rank] > 0) & (row[..., rank] < spec.recv_capacity)
    group_sizes = jnp.sum(is_received.reshape(num_sources, num_tokens), axis=1)
    return slot, group_sizes, jnp.sum(is_sent[..., rank])


def _row_source(spec: OpSpec, local_slot: jax.Array) -> jax.Array:
    num_sources, num_tokens, _ = local_slot.shape
    source = jnp.arange(num_sources * num_tokens, dtype=jnp.int32)
    source = jnp.broadcast_to(source.reshape(num_sources, num_tokens, 1), local_slot.shape)
    empty = jnp.full((spec.recv_capacity,), -1, jnp.int32)
    return empty.at[or_past_end(spec, local_slot)].set(source, mode="drop")


def _arrivals(
    spec: OpSpec, experts: jax.Array, local_slot: jax.Array, is_local: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """This rank's rows of every token, ascending by expert, and their positions in the top-k."""
    num_arrivals = min(spec.num_topk, spec.num_local_experts)
    order = jnp.argsort(jnp.where(is_local, experts, spec.num_experts), axis=2, stable=True)
    order = order[..., :num_arrivals].astype(jnp.int32)
    return jnp.take_along_axis(local_slot, order, axis=2), order


def _row_topk_idx(
    spec: OpSpec, experts: jax.Array, is_local: jax.Array, row_source: jax.Array, rank: jax.Array
) -> jax.Array | None:
    if spec.layout == "expert":
        return None
    local = jnp.where(is_local, experts - rank * spec.num_local_experts, -1)
    return take_rows(local.reshape(-1, spec.num_topk), row_source, -1)
