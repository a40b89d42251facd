# SPDX-License-Identifier: Apache-2.0
"""JAX primitives over the FFI targets: shapes, lowering, batching.

* `plan_p` (not differentiable): routing -> slots and counts.
* `dispatch_p`: rows and scalars travel from tokens to slots. Linear in them; it may also make
  products of the rows that arrive.
* `plan_dispatch_p`: both, in one call that is faster than two. Where nothing of the dispatch is
  used it becomes `plan_p`.
* `combine_p`: rows travel back and are summed, scalars travel back. Without weights it is linear
  and the exact transpose of `dispatch_p` over the same slots (see `differentiation.py`).
* `dispatch_start_p` and `dispatch_done_p`, `combine_start_p` and `combine_done_p`: a
  `plan_dispatch_p` and a `combine_p` in halves (see `halves.py`).

`bind` takes and gives their operands and results by name. All operands vary over the same manual
mesh axes. No operation has side effects for JAX: what one hands to another is an array.
"""

import functools
import zlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from jax_ep._src import compat
from jax_ep._src.backends.operands import (
    CombineOperands,
    CombineResults,
    DispatchOperands,
    DispatchResults,
    PlanDispatchOperands,
    PlanDispatchResults,
    PlanOperands,
    PlanResults,
    StartResults,
    by_name,
)
from jax_ep._src.backends.plan import Counts, Plan
from jax_ep._src.batching import one_by_one
from jax_ep._src.limits import DTYPES, WIRE_DTYPES
from jax_ep._src.quantized import num_scales
from jax_ep._src.spec import OpSpec, without_group

_INT32 = np.dtype(np.int32)
_FLOAT32 = np.dtype(np.float32)
_FLOAT8 = WIRE_DTYPES["float8_e4m3fn"]

plan_p = Primitive("jax_ep_plan")
dispatch_p = Primitive("jax_ep_dispatch")
plan_dispatch_p = Primitive("jax_ep_plan_dispatch")
combine_p = Primitive("jax_ep_combine")
dispatch_start_p = Primitive("jax_ep_dispatch_start")
dispatch_done_p = Primitive("jax_ep_dispatch_done")
combine_start_p = Primitive("jax_ep_combine_start")
combine_done_p = Primitive("jax_ep_combine_done")
_STARTS = (dispatch_start_p, combine_start_p)
_PRIMITIVES = (
    plan_p,
    dispatch_p,
    plan_dispatch_p,
    combine_p,
    *_STARTS,
    dispatch_done_p,
    combine_done_p,
)
for _primitive in _PRIMITIVES:
    _primitive.multiple_results = True


def bind(primitive: Primitive, operands: Any, *, spec: OpSpec, **params: Any) -> Any:
    """The results of an operation, by name like its operands.

    A first half has a parameter `counts`: whether it is among the flights of which two may be open,
    on CPU.
    """
    leaves, tree = jax.tree.flatten(operands)
    results = primitive.bind(*leaves, tree=tree, spec=spec, **params)
    return jax.tree.unflatten(results_tree(primitive, operands, spec), results)


# --- shapes ------------------------------------------------------------------------------------


def _int32(shape: tuple[int, ...] | None) -> Any:
    return None if shape is None else jax.ShapeDtypeStruct(shape, _INT32)


def _float32(shape: tuple[int, ...]) -> Any:
    return jax.ShapeDtypeStruct(shape, _FLOAT32)


def _plan_results(spec: OpSpec, operands: PlanOperands) -> PlanResults:
    shape = operands.topk_idx.shape
    plan = Plan(
        topk_idx=None,
        slot=_int32(shape),
        row_source=_int32((spec.recv_capacity,)),
        row_topk_idx=_int32(spec.row_topk_shape),
        source_slot=_int32(spec.source_slot_shape(shape[0])),
    )
    counts = Counts(
        group_sizes=_int32((spec.num_row_groups,)),
        tokens_per_expert=_int32((spec.num_local_experts,)),
        num_dropped=_int32(()),
    )
    return PlanResults(plan, counts)


def _dispatch_results(spec: OpSpec, operands: DispatchOperands) -> DispatchResults:
    x, scalars = operands.x, operands.token_scalars
    rows, rows_scales = None, None
    if x is not None:
        shape = (spec.recv_capacity, x.shape[1])
        rows = jax.ShapeDtypeStruct(shape, _FLOAT8 if spec.fp8_rows else spec.dtype)
        rows_scales = _float32((shape[0], num_scales(shape[1]))) if spec.fp8_rows else None
    return DispatchResults(
        rows=rows,
        rows_scales=rows_scales,
        row_scalars=None if scalars is None else _float32(spec.row_scalars_shape),
        row_dots=None if operands.y is None else _float32((spec.recv_capacity,)),
    )


def _plan_dispatch_results(spec: OpSpec, operands: PlanDispatchOperands) -> PlanDispatchResults:
    planned = _plan_results(spec, operands.of_plan())
    dispatched = _dispatch_results(spec, operands.of_dispatch(planned.plan))
    dispatched = dispatched._replace(missing_ranks=_missing_ranks(spec))
    return PlanDispatchResults.of(planned, dispatched)


def _missing_ranks(spec: OpSpec) -> Any:
    masks = spec.on_timeout == "mask"
    return jax.ShapeDtypeStruct((spec.num_ranks,), np.dtype(bool)) if masks else None


def _combine_results(spec: OpSpec, operands: CombineOperands) -> CombineResults:
    y, scalars = operands.y, operands.row_scalars
    num_tokens, num_topk = operands.plan.slot.shape
    return CombineResults(
        out=None if y is None else jax.ShapeDtypeStruct((num_tokens, y.shape[1]), y.dtype),
        token_scalars=None if scalars is None else _float32((num_tokens, num_topk)),
        missing_ranks=_missing_ranks(spec),
    )


def _start_results(spec: OpSpec, operands: Any) -> StartResults:
    del spec, operands
    return StartResults(ticket=jax.ShapeDtypeStruct((2,), np.dtype(np.uint32)))


_RESULTS: dict[Primitive, Callable[[OpSpec, Any], Any]] = {
    plan_p: _plan_results,
    dispatch_p: _dispatch_results,
    plan_dispatch_p: _plan_dispatch_results,
    combine_p: _combine_results,
    dispatch_start_p: _start_results,
    combine_start_p: _start_results,
    dispatch_done_p: lambda spec, operands: _plan_dispatch_results(spec, operands.sent),
    combine_done_p: lambda spec, operands: _combine_results(spec, operands.sent),
}


def results_tree(primitive: Primitive, operands: Any, spec: OpSpec) -> Any:
    """The tree of the results that there are with these operands."""
    return jax.tree.structure(_RESULTS[primitive](spec, operands))


def _abstract(
    *avals: Any, primitive: Primitive, tree: Any, spec: OpSpec, **params: Any
) -> list[Any]:
    del params
    axes = {frozenset(aval.manual_axis_type.varying) for aval in avals}
    if len(axes) > 1:
        raise ValueError(f"{primitive.name}: operands vary over different mesh axes: {axes}")
    results = _RESULTS[primitive](spec, jax.tree.unflatten(tree, avals))
    return [compat.like(avals[0], r.shape, r.dtype) for r in jax.tree.leaves(results)]


# --- lowering ----------------------------------------------------------------------------------

# Operands that are there for another platform, another backend, or for differentiation only.
_OF_XLA = {"arrival_slot", "arrival_topk"}
_UNUSED_BY_COMBINE = {"row_source", "row_topk_idx", "source_slot"}
_STAGED = {
    *("x", "x_scales", "token_scalars", "topk_idx", "y", "weights", "row_scalars", "slot"),
    "rank_mask",
}
_UNUSED = {
    "cpu": {
        plan_p: set(),
        plan_dispatch_p: set(),
        dispatch_p: {"row_topk_idx", "source_slot"},
        combine_p: _UNUSED_BY_COMBINE,
        dispatch_start_p: set(),
        dispatch_done_p: _STAGED,
        combine_start_p: _UNUSED_BY_COMBINE,
        combine_done_p: _STAGED | _UNUSED_BY_COMBINE,
    },
    "cuda": {
        plan_p: set(),
        plan_dispatch_p: set(),
        dispatch_p: {"row_topk_idx"},
        combine_p: {"row_source"},
        # What stays on its rank does not travel: the second half needs it, too.
        dispatch_start_p: set(),
        dispatch_done_p: set(),
        combine_start_p: {"row_source"},
        combine_done_p: {"row_source"},
    },
}
# Of a `Plan`, what no target gives.
_NO_RESULTS = {"topk_idx", "rank_mask"}


def _stand_in(name: str, spec: OpSpec, topk_idx: Any) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype that a target is given, or gives, for what is absent: an array of size 0."""
    if name in ("x", "out"):
        return (topk_idx.shape[0], 0), spec.dtype
    if name in ("y", "rows"):
        return (spec.recv_capacity, 0), spec.dtype
    return (0,), _INT32 if name in ("row_topk_idx", "source_slot") else _FLOAT32


def _lower(
    ctx: Any,
    *values: Any,
    tree: Any,
    spec: OpSpec,
    primitive: Primitive,
    platform: str,
    counts: bool | None = None,
) -> list[Any]:
    """A call of the primitive's target, without the operands that the platform does not read."""
    if (platform == "cuda") != spec.gpu:
        raise ValueError(
            f"{primitive.name} is compiled for platform {platform!r}, and its EpGroup is of "
            f"platform {'cuda' if spec.gpu else 'cpu'!r}: make a group on a mesh of the devices "
            "that run the program"
        )
    avals = jax.tree.unflatten(tree, ctx.avals_in)
    operands = by_name(jax.tree.unflatten(tree, values))
    topk_idx = by_name(avals)["topk_idx"]

    def absent(name: str) -> Any:
        return compat.like(topk_idx, *_stand_in(name, spec, topk_idx))

    avals_in = {
        name: absent(name) if aval is None else aval
        for name, aval in by_name(avals).items()
        if name not in _UNUSED[platform][primitive] | _OF_XLA
        # A call without a mask is compiled to what it was before there were masks.
        and not (name == "rank_mask" and aval is None)
    }
    results = by_name(_RESULTS[primitive](spec, avals))
    avals_out = {
        name: absent(name) if result is None else compat.like(topk_idx, result.shape, result.dtype)
        for name, result in results.items()
        if name not in _NO_RESULTS | _OF_XLA
        # Likewise a call of a group in which a missing rank is an error.
        and not (name == "missing_ranks" and result is None)
    }
    # A first half gives another ticket in every call, which XLA is told by a side effect: else it
    # takes equal calls for one, and moves one out of a loop in which its operands do not vary.
    target = jax.ffi.ffi_lowering(primitive.name, has_side_effect=primitive in _STARTS)
    outs = target(
        ctx.replace(avals_in=list(avals_in.values()), avals_out=list(avals_out.values())),
        *(
            mlir.ir_constant(np.zeros(aval.shape, aval.dtype))
            if operands[name] is None
            else operands[name]
            for name, aval in avals_in.items()
        ),
        **_attributes(ctx, primitive, platform, spec),
        **({"counts": np.bool_(counts)} if platform == "cpu" and counts is not None else {}),
    )
    return [out for out, name in zip(outs, avals_out, strict=True) if results[name] is not None]


def _attributes(ctx: Any, primitive: Primitive, platform: str, spec: OpSpec) -> dict[str, Any]:
    attributes: dict[str, Any] = {"ep": spec.ffi_attributes()}
    if platform == "cuda":
        attributes["call_site"] = np.int32(_call_site(ctx))
        if primitive is dispatch_start_p:  # no result says so
            attributes["recv_capacity"] = np.int64(spec.recv_capacity)
    reads_rows = (dispatch_p, plan_dispatch_p, dispatch_done_p)
    if primitive in reads_rows or (platform == "cuda" and primitive is dispatch_start_p):
        attributes |= {
            "dtype": np.int32(list(DTYPES).index(spec.dtype.name)),
            "wire": np.int32(spec.fp8_wire),
            "zero_fill": np.bool_(spec.zero_fill),
        }
    # A first half on CPU sums nothing; on GPUs it sums this rank's rows.
    sums = (combine_p, combine_done_p)
    if primitive in sums or (platform == "cuda" and primitive is combine_start_p):
        attributes["domain_size"] = np.int32(spec.domain_size)
    return attributes


def _call_site(ctx: Any) -> int:
    """A hash of the call site, by which ranks notice that theirs differ.

    From the stack of names (layers, transformations) under which it was traced: the same in all
    processes that trace the same program, and mostly another for another layer. The number of the
    group has no part in it: a process may have made groups of its own before.

    JAX caches what it lowers, and lowers without names for the cache: then it is the hash of no
    names, and calls that are alike in all sizes are taken for one.
    """
    return zlib.crc32(without_group(str(ctx.name_stack)).encode()) & 0x7FFFFFFF


def _outside_shard_map(*args: Any, name: str, **params: Any) -> Any:
    del args, params
    raise NotImplementedError(f"{name} runs inside jax.shard_map only")


for _primitive in _PRIMITIVES:
    _primitive.def_abstract_eval(functools.partial(_abstract, primitive=_primitive))
    _primitive.def_impl(functools.partial(_outside_shard_map, name=_primitive.name))
    # One call for each element of the batch, so that ranks meet in the same order. Of
    # `plan_dispatch_p`, `splitting.py` has another rule, and of halves, `halves.py`.
    batching.primitive_batchers[_primitive] = functools.partial(one_by_one, _primitive)
    for _platform in (name for name, of_platform in _UNUSED.items() if _primitive in of_platform):
        mlir.register_lowering(
            _primitive,
            functools.partial(_lower, primitive=_primitive, platform=_platform),
            platform=_platform,
        )
