# SPDX-License-Identifier: Apache-2.0
"""Backend `xla`: the same operations from collectives of `jax.lax` alone.

It runs wherever JAX runs, over any number of processes, and is the fallback and a baseline; it is
not fast: rows are gathered from all ranks. Sums are taken in the defined order with the defined
roundings; whether XLA fuses a multiplication and an addition is up to XLA, so a weighted combine
may differ from the other backends in the last bit of the float32 accumulator.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jax_ep._src import compat
from jax_ep._src.backends import fp8
from jax_ep._src.backends.differentiation import row_weights
from jax_ep._src.backends.plan import Plan
from jax_ep._src.backends.primitives import is_absent
from jax_ep._src.spec import OpSpec
from jax_ep._src.types import DispatchHandle

# --- plan --------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def plan(spec: OpSpec, topk_idx: jax.Array) -> Plan:
    """Gathers the routing of all ranks; every rank works out all rows."""
    (topk_idx,) = _varying(spec, topk_idx)
    experts = jax.lax.all_gather(topk_idx, spec.axis_names)  # [R, T, K]
    experts = jnp.where((experts >= 0) & (experts < spec.num_experts), experts, -1)
    rank = jax.lax.axis_index(spec.axis_names)
    owner = jnp.where(experts >= 0, experts // spec.num_local_experts, -1)
    slot, group_sizes, num_rows = (_expert_slots if spec.layout == "expert" else _rank_slots)(
        spec, experts, owner, rank
    )
    slot = jnp.where(slot < spec.recv_capacity, slot, -1)

    mine = owner == rank
    my_slot = jnp.where(mine, slot, -1)
    row_source = _row_source(spec, my_slot)
    arrival_slot, arrival_topk = _arrivals(spec, experts, my_slot, mine)
    local = jnp.where(mine, experts - rank * spec.num_local_experts, spec.num_local_experts)
    tokens_per_expert = jnp.bincount(local.reshape(-1), length=spec.num_local_experts + 1)[:-1]
    return Plan(
        slot=slot[rank],
        row_source=row_source,
        row_topk_idx=_row_topk_idx(spec, experts, mine, row_source, rank),
        group_sizes=group_sizes.astype(jnp.int32),
        tokens_per_expert=tokens_per_expert.astype(jnp.int32),
        num_dropped=(num_rows - jnp.sum(row_source >= 0)).astype(jnp.int32),
        arrival_slot=arrival_slot,
        arrival_topk=arrival_topk,
    )


def _varying(spec: OpSpec, *operands: jax.Array) -> tuple[jax.Array, ...]:
    rank = jax.lax.axis_index(spec.axis_names)
    return compat.as_varying(compat.varying_axes(rank, *operands), *operands)


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
    goes = jnp.any(jax.nn.one_hot(owner, spec.num_ranks, dtype=jnp.bool_), axis=2)  # [R, T, R]
    goes = goes.astype(jnp.int32)
    row = _exclusive_cumsum(goes.reshape(-1, spec.num_ranks), 0).reshape(goes.shape)
    slot = jnp.take_along_axis(row, jnp.maximum(owner, 0), axis=2)
    slot = jnp.where(experts >= 0, slot, spec.recv_capacity)
    here = (goes[..., rank] > 0) & (row[..., rank] < spec.recv_capacity)
    group_sizes = jnp.sum(here.reshape(num_sources, num_tokens), axis=1)
    return slot, group_sizes, jnp.sum(goes[..., rank])


def _row_source(spec: OpSpec, my_slot: jax.Array) -> jax.Array:
    num_sources, num_tokens, _ = my_slot.shape
    source = jnp.arange(num_sources * num_tokens, dtype=jnp.int32)
    source = jnp.broadcast_to(source.reshape(num_sources, num_tokens, 1), my_slot.shape)
    empty = jnp.full((spec.recv_capacity,), -1, jnp.int32)
    return empty.at[_or_past_end(spec, my_slot)].set(source, mode="drop")


def _or_past_end(spec: OpSpec, slot: jax.Array) -> jax.Array:
    """Slots as scatter indices: no slot is past the end, where `mode="drop"` drops it."""
    return jnp.where(slot >= 0, slot, spec.recv_capacity)


def _arrivals(
    spec: OpSpec, experts: jax.Array, my_slot: jax.Array, mine: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """This rank's rows of every token in ascending order of experts, and their place in top-k."""
    num_arrivals = min(spec.num_topk, spec.num_local_experts)
    order = jnp.argsort(jnp.where(mine, experts, spec.num_experts), axis=2, stable=True)
    order = order[..., :num_arrivals].astype(jnp.int32)
    return jnp.take_along_axis(my_slot, order, axis=2), order


def _row_topk_idx(
    spec: OpSpec, experts: jax.Array, mine: jax.Array, row_source: jax.Array, rank: jax.Array
) -> jax.Array | None:
    if spec.layout == "expert":
        return None
    local = jnp.where(mine, experts - rank * spec.num_local_experts, -1)
    return _take_rows(local.reshape(-1, spec.num_topk), row_source, -1)


def _take_rows(source: jax.Array, index: jax.Array, fill: float) -> jax.Array:
    """`source[index]`, or `fill` where the index is negative."""
    if source.shape[0] == 0:
        source = jnp.full((1, *source.shape[1:]), fill, source.dtype)
    taken = jnp.take(source, jnp.maximum(index, 0), axis=0)
    has = (index >= 0).reshape((-1,) + (1,) * (source.ndim - 1))
    return jnp.where(has, taken, jnp.asarray(fill, source.dtype))


# --- dispatch and combine ----------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def dispatch(
    spec: OpSpec, x: jax.Array, token_scalars: jax.Array | None, handle: DispatchHandle
) -> tuple[jax.Array, jax.Array | None]:
    """Gathers all ranks' rows and keeps those that come here."""
    scalars = jnp.zeros((0,), jnp.float32) if token_scalars is None else token_scalars
    x, scalars, handle = _varying_with_handle(spec, x, scalars, handle)
    rows, row_scalars = _dispatch(spec, x, scalars, handle)
    return rows, None if token_scalars is None else row_scalars


@functools.partial(jax.jit, static_argnums=0)
def combine(
    spec: OpSpec, y: jax.Array, weights: jax.Array | None, handle: DispatchHandle
) -> jax.Array:
    """Sums rows by (token, rank), returns the sums to the tokens' ranks and sums them there."""
    weights = jnp.zeros((0,), jnp.float32) if weights is None else weights
    y, weights, handle = _varying_with_handle(spec, y, weights, handle)
    return _combine(spec, y, weights, handle)


def _varying_with_handle(spec: OpSpec, *operands: Any) -> list[Any]:
    leaves, tree = jax.tree.flatten(operands)
    return jax.tree.unflatten(tree, _varying(spec, *leaves))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dispatch(
    spec: OpSpec, x: jax.Array, token_scalars: jax.Array, handle: DispatchHandle
) -> tuple[jax.Array, jax.Array]:
    gather = functools.partial(jax.lax.all_gather, axis_name=spec.axis_names, tiled=True)
    if spec.fp8_wire:
        quantized, scales = fp8.quantize(x)
        rows = fp8.dequantize(
            _take_rows(gather(quantized), handle.row_source, 0),
            _take_rows(gather(scales), handle.row_source, 0.0),
            x.dtype,
        )
    else:
        rows = _take_rows(gather(x), handle.row_source, 0)
    if not is_absent(token_scalars):
        token_scalars = _row_scalars(spec, gather(token_scalars), handle)
    # Without tokens nothing that varies went into them.
    axes = compat.varying_axes(handle.row_source)
    rows, token_scalars = compat.as_varying(axes, rows, token_scalars)
    return rows, token_scalars


def _arrived(handle: DispatchHandle) -> tuple[jax.Array, jax.Array]:
    """`arrival_slot` and `arrival_topk`, which the plan of this backend always makes."""
    assert handle.arrival_slot is not None
    assert handle.arrival_topk is not None
    return handle.arrival_slot, handle.arrival_topk


def _row_topk(handle: DispatchHandle) -> jax.Array:
    """`row_topk_idx`, which layout "rank" always has."""
    assert handle.row_topk_idx is not None
    return handle.row_topk_idx


def _row_scalars(spec: OpSpec, gathered: jax.Array, handle: DispatchHandle) -> jax.Array:
    """Scalars of the received rows, from all ranks' `[R * T, K]`."""
    if spec.layout == "rank":
        taken = _take_rows(gathered, handle.row_source, 0.0)
        return jnp.where(_row_topk(handle) >= 0, taken, 0.0)
    slot, topk = _arrived(handle)
    by_source = gathered.reshape(spec.num_ranks, -1, spec.num_topk)
    arrived = jnp.take_along_axis(by_source, topk, axis=2)
    empty = jnp.zeros((spec.recv_capacity,), jnp.float32)
    return empty.at[_or_past_end(spec, slot)].set(arrived, mode="drop")


def _dispatch_fwd(
    spec: OpSpec, x: jax.Array, token_scalars: jax.Array, handle: DispatchHandle
) -> Any:
    return _dispatch(spec, x, token_scalars, handle), handle


def _dispatch_bwd(spec: OpSpec, handle: DispatchHandle, cotangents: Any) -> Any:
    """The transpose: an unweighted combine over the same handle."""
    rows_bar, row_scalars_bar = cotangents
    x_bar = _combine_rows(spec, rows_bar, None, handle)
    if is_absent(row_scalars_bar):
        return x_bar, row_scalars_bar, None
    return x_bar, _token_scalars(spec, row_scalars_bar, handle), None


_dispatch.defvjp(_dispatch_fwd, _dispatch_bwd)


def _token_scalars(spec: OpSpec, row_scalars: jax.Array, handle: DispatchHandle) -> jax.Array:
    """Scalars of received rows back at their selections, `[T, K]`."""
    slot, topk = _arrived(handle)
    flat = row_scalars.reshape(-1)
    index = slot if spec.layout == "expert" else slot * spec.num_topk + topk
    value = jnp.where(slot >= 0, flat[jnp.maximum(index, 0)], 0.0)
    source, token = jnp.indices(slot.shape, sparse=True)[:2]
    back = jnp.zeros((*slot.shape[:2], spec.num_topk), jnp.float32)
    back = back.at[source, token, topk].set(value)
    return jnp.sum(_return_to_sources(spec, back), axis=0)  # at most one rank's is not 0


def _return_to_sources(spec: OpSpec, partial: jax.Array) -> jax.Array:
    """`[R, T, ...]` by source rank here -> `[R, T, ...]` by the rank that it came from, there."""
    return jax.lax.all_to_all(partial, spec.axis_names, 0, 0, tiled=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _combine(spec: OpSpec, y: jax.Array, weights: jax.Array, handle: DispatchHandle) -> jax.Array:
    return _combine_rows(spec, y, None if is_absent(weights) else weights, handle)


def _combine_rows(
    spec: OpSpec, y: jax.Array, weights: jax.Array | None, handle: DispatchHandle
) -> jax.Array:
    slot, topk = _arrived(handle)
    # In layout "rank" all of a token's selections share one row; without weights it counts once.
    num_terms = 1 if spec.layout == "rank" and weights is None else slot.shape[2]
    acc = jnp.zeros((*slot.shape[:2], y.shape[1]), jnp.float32)
    for j in range(num_terms):
        row = jnp.maximum(slot[..., j], 0)
        term = y[row].astype(jnp.float32)
        if weights is not None:
            weight = weights[row] if spec.layout == "expert" else weights[row, topk[..., j]]
            term = weight[..., None] * term
        acc = jnp.where((slot[..., j] >= 0)[..., None], acc + term, acc)
    partial = _return_to_sources(spec, acc.astype(y.dtype)).astype(jnp.float32)
    total = jnp.zeros_like(partial[0])
    for source in range(spec.num_ranks):
        total = total + partial[source]
    return total.astype(y.dtype)


def _combine_fwd(spec: OpSpec, y: jax.Array, weights: jax.Array, handle: DispatchHandle) -> Any:
    return _combine(spec, y, weights, handle), (y, weights, handle)


def _combine_bwd(spec: OpSpec, residuals: Any, out_bar: jax.Array) -> Any:
    """The transpose: a dispatch of the cotangent over the same handle."""
    y, weights, handle = residuals
    absent = jax.lax.slice_in_dim(weights.reshape(-1), 0, 0)
    rows_bar, _ = _dispatch(spec.for_cotangents(), out_bar, absent, handle)
    if is_absent(weights):
        return rows_bar, weights, None
    factor = row_weights(weights, handle.row_source, handle.row_topk_idx)
    held = jnp.where((handle.row_source >= 0)[:, None], y, jnp.zeros((), y.dtype))
    wide = rows_bar.astype(jnp.float32)
    weights_bar = jnp.sum(wide * held.astype(jnp.float32), axis=1)
    if spec.layout == "rank":
        weights_bar = jnp.where(_row_topk(handle) >= 0, weights_bar[:, None], 0.0)
    return (factor * wide).astype(y.dtype), weights_bar, None


_combine.defvjp(_combine_fwd, _combine_bwd)
