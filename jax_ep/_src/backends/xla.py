# SPDX-License-Identifier: Apache-2.0
"""Backend `xla`: the same operations from collectives of `jax.lax` alone.

It runs wherever JAX runs, over any number of processes, and is the fallback and a baseline; it is
not fast: rows are gathered from all ranks. Sums are taken in the defined order with the defined
roundings; whether XLA fuses a multiplication and an addition is up to XLA, so a weighted combine
may differ from the other backends in the last bit of the float32 accumulator.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jax_ep._src import compat
from jax_ep._src.backends import fp8
from jax_ep._src.backends.differentiation import weighted_rows_tangent
from jax_ep._src.backends.plan import Plan
from jax_ep._src.backends.primitives import one_by_one
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

# Primitives of their own, lowered to collectives: a rule of `custom_vjp` has no forward mode, and
# under `vmap(spmd_axis_name=...)` JAX refuses what it returns. Operands that do not take part are
# left out, see `differentiation.py`.
exchange_p = Primitive("jax_ep_xla_exchange")  # linear: rows, scalars or both, there or back
combine_p = Primitive("jax_ep_xla_combine")  # with weights
for _primitive in (exchange_p, combine_p):
    _primitive.multiple_results = True


@functools.partial(jax.jit, static_argnums=0)
def dispatch(
    spec: OpSpec, x: jax.Array, token_scalars: jax.Array | None, handle: DispatchHandle
) -> tuple[jax.Array, jax.Array | None]:
    """Gathers all ranks' rows and keeps those that come here."""
    rows, row_scalars = _exchange(spec, x, token_scalars, handle, there=True)
    assert rows is not None
    return rows, row_scalars


@functools.partial(jax.jit, static_argnums=0)
def combine(
    spec: OpSpec, y: jax.Array, weights: jax.Array | None, handle: DispatchHandle
) -> jax.Array:
    """Sums rows by (token, rank), returns the sums to the tokens' ranks and sums them there."""
    if weights is None:
        out, _ = _exchange(spec, y, None, handle, there=False)
        assert out is not None
        return out
    leaves, tree = jax.tree.flatten(handle)
    (out,) = combine_p.bind(*_varying(spec, y, weights, *leaves), spec=spec, tree=tree)
    return out


def _exchange(
    spec: OpSpec,
    rows: jax.Array | None,
    scalars: jax.Array | None,
    handle: DispatchHandle,
    *,
    there: bool,
) -> tuple[jax.Array | None, jax.Array | None]:
    """Rows and scalars from tokens to received rows (`there`), or back to be summed."""
    leaves, tree = jax.tree.flatten(handle)
    given = [a for a in (rows, scalars) if a is not None]
    has = rows is not None, scalars is not None
    operands = _varying(spec, *given, *leaves)
    outs = iter(exchange_p.bind(*operands, spec=spec, tree=tree, has=has, there=there))
    return next(outs) if has[0] else None, next(outs) if has[1] else None


def _exchange_program(
    *operands: jax.Array, spec: OpSpec, tree: Any, has: tuple[bool, bool], there: bool
) -> list[jax.Array]:
    handle: DispatchHandle = jax.tree.unflatten(tree, operands[sum(has) :])
    rows = operands[0] if has[0] else None
    scalars = operands[sum(has) - 1] if has[1] else None
    outs = []
    if rows is not None and there:
        outs.append(_rows_there(spec, rows, handle))
    elif rows is not None:
        outs.append(_combine_rows(spec, rows, None, handle))
    if scalars is not None and there:
        outs.append(_row_scalars(spec, _gather(spec, scalars), handle))
    elif scalars is not None:
        outs.append(_token_scalars(spec, scalars, handle))
    # Without tokens nothing that varies went into them.
    return list(compat.as_varying(compat.varying_axes(handle.row_source), *outs))


def _combine_program(*operands: jax.Array, spec: OpSpec, tree: Any) -> list[jax.Array]:
    y, weights, *leaves = operands
    handle: DispatchHandle = jax.tree.unflatten(tree, leaves)
    return [_combine_rows(spec, y, weights, handle)]


def _gather(spec: OpSpec, array: jax.Array) -> jax.Array:
    """`[R * T, ...]` from all ranks' `[T, ...]`. XLA does not gather nothing."""
    return jax.lax.all_gather(array, spec.axis_names, tiled=True) if array.shape[0] else array


def _rows_there(spec: OpSpec, x: jax.Array, handle: DispatchHandle) -> jax.Array:
    if not spec.fp8_wire:
        return _take_rows(_gather(spec, x), handle.row_source, 0)
    quantized, scales = fp8.quantize(x)
    return fp8.dequantize(
        _take_rows(_gather(spec, quantized), handle.row_source, 0),
        _take_rows(_gather(spec, scales), handle.row_source, 0.0),
        x.dtype,
    )


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


# --- how they are differentiated and batched ---------------------------------------------------


def _exchange_abstract(
    *avals: Any, spec: OpSpec, tree: Any, has: tuple[bool, bool], there: bool
) -> list[Any]:
    handle: DispatchHandle = jax.tree.unflatten(tree, avals[sum(has) :])
    tokens, num_topk = handle.topk_idx.shape
    outs = []
    if has[0]:
        count = spec.recv_capacity if there else tokens
        outs.append(compat.like(avals[0], (count, avals[0].shape[1]), avals[0].dtype))
    if has[1]:
        shape = spec.row_scalars_shape if there else (tokens, num_topk)
        outs.append(compat.like(avals[0], shape, jnp.float32.dtype))
    return outs


def _combine_abstract(y: Any, weights: Any, *leaves: Any, spec: OpSpec, tree: Any) -> list[Any]:
    del weights, spec
    handle: DispatchHandle = jax.tree.unflatten(tree, leaves)
    return [compat.like(y, (handle.topk_idx.shape[0], y.shape[1]), y.dtype)]


def _of_those_not_zero(
    values: Sequence[Any], leaves: Sequence[Any], has: tuple[bool, bool], params: dict[str, Any]
) -> list[Any]:
    """The exchange of those of `values`, one for each of `has`, that are not zero; else None."""
    given = iter(values)
    slots = [next(given) if there_is else None for there_is in has]
    used = [v is not None and type(v) is not ad.Zero for v in slots]
    kept = [v for v, is_used in zip(slots, used, strict=True) if is_used]
    params = {**params, "spec": params["spec"].for_cotangents(), "has": tuple(used)}
    outs = iter(exchange_p.bind(*kept, *leaves, **params)) if kept else iter(())
    results = [next(outs) if is_used else None for is_used in used]
    return [r for r, there_is in zip(results, has, strict=True) if there_is]


def _exchange_jvp(primals: Sequence[Any], tangents: Sequence[Any], **params: Any) -> Any:
    has = params["has"]
    outs = exchange_p.bind(*primals, **params)
    dots = _of_those_not_zero(tangents[: sum(has)], primals[sum(has) :], has, params)
    zeros = [ad.Zero(jax.typeof(out).to_tangent_aval()) for out in outs]
    return outs, [z if dot is None else dot for dot, z in zip(dots, zeros, strict=True)]


def _exchange_transpose(cotangents: Sequence[Any], *operands: Any, **params: Any) -> list[Any]:
    """There and back are each other's transposes over the same handle."""
    has = params["has"]
    values, leaves = operands[: sum(has)], operands[sum(has) :]
    back = {**params, "there": not params["there"]}
    bars = zip(_of_those_not_zero(cotangents, leaves, has, back), values, strict=True)
    wanted = [bar if ad.is_undefined_primal(value) else None for bar, value in bars]
    return [*wanted, *[None] * len(leaves)]


def _combine_jvp(
    primals: Sequence[Any], tangents: Sequence[Any], *, spec: OpSpec, tree: Any
) -> Any:
    """Bilinear: the tangent is an unweighted combine of the rows' tangents."""
    y, weights, *leaves = primals
    outs = combine_p.bind(*primals, spec=spec, tree=tree)
    y_dot, weights_dot = (None if type(t) is ad.Zero else t for t in tangents[:2])
    if y_dot is None and weights_dot is None:
        return outs, [ad.Zero(jax.typeof(outs[0]).to_tangent_aval())]
    handle: DispatchHandle = jax.tree.unflatten(tree, leaves)
    rows_dot = weighted_rows_tangent(
        y, weights, y_dot, weights_dot, handle.row_source, handle.row_topk_idx
    )
    params = {"spec": spec.for_cotangents(), "tree": tree, "has": (True, False), "there": False}
    return outs, exchange_p.bind(rows_dot, *leaves, **params)


exchange_p.def_abstract_eval(_exchange_abstract)
combine_p.def_abstract_eval(_combine_abstract)
ad.primitive_jvps[exchange_p] = _exchange_jvp
ad.primitive_jvps[combine_p] = _combine_jvp
ad.primitive_transposes[exchange_p] = _exchange_transpose
for _primitive, _program in ((exchange_p, _exchange_program), (combine_p, _combine_program)):
    _primitive.def_impl(_program)
    mlir.register_lowering(_primitive, mlir.lower_fun(_program, multiple_results=True))
    batching.primitive_batchers[_primitive] = functools.partial(one_by_one, _primitive)
