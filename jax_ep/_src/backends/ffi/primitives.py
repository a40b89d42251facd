# SPDX-License-Identifier: Apache-2.0
"""JAX primitives over the FFI targets: shapes, lowering, batching.

* `plan_p` (not differentiable): routing -> slots and counts.
* `dispatch_p`: rows and scalars travel from tokens to slots. Linear.
* `combine_p`: rows travel back and are summed, scalars travel back. Without weights it is linear
  and the exact transpose of `dispatch_p` over the same slots (see `differentiation.py`).

Operands come first as arrays, `program_rank` (int32[1], see `ops.py`) before all; all operands vary
over the same manual mesh axes. An operand that does not take part has shape `[0]`; rows that do
not take part have `H = 0`. No operation has side effects: what one hands to another is an array.

`source_slot` is there on GPUs only. Elsewhere `row_source` is passed in its place, and no lowering
reads it: an operand of size 0 could become a residual, see `differentiation.py`.
"""

import functools
import zlib
from typing import Any

import jax
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from jax_ep._src import compat
from jax_ep._src.backends.operands import is_absent
from jax_ep._src.batching import one_by_one
from jax_ep._src.spec import OpSpec

_INT32 = np.dtype(np.int32)
_FLOAT32 = np.dtype(np.float32)

plan_p = Primitive("jax_ep_plan")
dispatch_p = Primitive("jax_ep_dispatch")
combine_p = Primitive("jax_ep_combine")
_ALL = (plan_p, dispatch_p, combine_p)
for _primitive in _ALL:
    _primitive.multiple_results = True


def _check_same_axes(name: str, *avals: Any) -> None:
    axes = {frozenset(aval.manual_axis_type.varying) for aval in avals}
    if len(axes) > 1:
        raise ValueError(f"{name}: operands vary over different mesh axes: {axes}")


# --- abstract evaluation -----------------------------------------------------------------------


def _plan_abstract(program_rank: Any, topk_idx: Any, *, spec: OpSpec) -> list[Any]:
    _check_same_axes("jax_ep_plan", program_rank, topk_idx)
    shapes = (
        topk_idx.shape,  # slot
        (spec.recv_capacity,),  # row_source
        spec.row_topk_shape,
        spec.source_slot_shape(topk_idx.shape[0]),
        (spec.num_row_groups,),  # group_sizes
        (spec.num_local_experts,),  # tokens_per_expert
        (),  # num_dropped
    )
    return [compat.like(topk_idx, shape, _INT32) for shape in shapes]


def _dispatch_abstract(
    program_rank: Any,
    x: Any,
    token_scalars: Any,
    topk_idx: Any,
    slot: Any,
    row_source: Any,
    source_slot: Any,
    *,
    spec: OpSpec,
) -> list[Any]:
    _check_same_axes(
        "jax_ep_dispatch", program_rank, x, token_scalars, topk_idx, slot, row_source, source_slot
    )
    scalars_shape = (0,) if is_absent(token_scalars) else spec.row_scalars_shape
    return [
        compat.like(x, (spec.recv_capacity, x.shape[1]), x.dtype),
        compat.like(x, scalars_shape, _FLOAT32),
    ]


def _combine_abstract(
    program_rank: Any,
    y: Any,
    weights: Any,
    row_scalars: Any,
    topk_idx: Any,
    slot: Any,
    row_source: Any,
    row_topk_idx: Any,
    source_slot: Any,
    *,
    spec: OpSpec,
) -> list[Any]:
    del spec
    _check_same_axes(
        "jax_ep_combine", program_rank, y, weights, row_scalars, topk_idx, slot, row_source,
        row_topk_idx, source_slot,
    )  # fmt: skip
    scalars_shape = (0,) if is_absent(row_scalars) else topk_idx.shape
    return [
        compat.like(y, (topk_idx.shape[0], y.shape[1]), y.dtype),
        compat.like(y, scalars_shape, _FLOAT32),
    ]


plan_p.def_abstract_eval(_plan_abstract)
dispatch_p.def_abstract_eval(_dispatch_abstract)
combine_p.def_abstract_eval(_combine_abstract)


# --- lowering ----------------------------------------------------------------------------------


def _lower(
    ctx: Any,
    *operands: Any,
    spec: OpSpec,
    primitive: Primitive,
    platform: str,
    unused: tuple[int, ...],
) -> Any:
    """A call of the primitive's target without the operands that the platform does not read."""
    if (platform == "cuda") != spec.gpu:
        raise ValueError(
            f"{primitive.name} is compiled for platform {platform!r}, and its EpGroup is of "
            f"platform {'cuda' if spec.gpu else 'cpu'!r}: make a group on a mesh of the devices "
            "that run the program"
        )
    kept = [i for i in range(len(operands)) if i not in unused]
    ctx = ctx.replace(avals_in=[ctx.avals_in[i] for i in kept])
    attributes: dict[str, Any] = {"ep": spec.ffi_attributes()}
    if platform == "cuda":
        attributes["place"] = np.int32(_place(ctx))
    if primitive is dispatch_p:
        attributes |= {"wire": np.int32(spec.fp8_wire), "zero_fill": np.bool_(spec.zero_fill)}
    target = jax.ffi.ffi_lowering(primitive.name)
    return target(ctx, *(operands[i] for i in kept), **attributes)


def _place(ctx: Any) -> int:
    """A number of the call's place in the program, by which ranks notice that theirs differ.

    From the stack of names (layers, transformations) under which it was traced: the same in all
    processes that trace the same program, and mostly another for another layer.
    """
    return zlib.crc32(str(ctx.name_stack).encode()) & 0x7FFFFFFF


# Positions of operands that are there for another platform, or for differentiation only:
# source_slot of a dispatch; row_source, row_topk_idx and source_slot of a combine.
_UNUSED = {
    "cpu": {plan_p: (), dispatch_p: (6,), combine_p: (6, 7, 8)},
    "cuda": {plan_p: (), dispatch_p: (), combine_p: (6,)},
}
for _platform, _by_primitive in _UNUSED.items():
    for _primitive, _unused in _by_primitive.items():
        mlir.register_lowering(
            _primitive,
            functools.partial(_lower, primitive=_primitive, platform=_platform, unused=_unused),
            platform=_platform,
        )


# --- batching ----------------------------------------------------------------------------------


def _outside_shard_map(*args: Any, name: str, **params: Any) -> Any:
    del args, params
    raise NotImplementedError(f"{name} runs inside jax.shard_map only")


for _primitive in _ALL:
    batching.primitive_batchers[_primitive] = functools.partial(one_by_one, _primitive)
    _primitive.def_impl(functools.partial(_outside_shard_map, name=_primitive.name))
