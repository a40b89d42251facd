# SPDX-License-Identifier: Apache-2.0
"""Backend `ffi`: this library's own handlers, through the primitives of `primitives.py`.

The functions are jitted so that `shard_map` without `jit` compiles each of them as one program, in
which arrays of size 0 (absent operands) are no inputs: XLA refuses a program that has only such.
"""

import functools

import jax
import jax.numpy as jnp

from jax_ep._src import compat
from jax_ep._src.backends.ffi import differentiation  # noqa: F401  its rules
from jax_ep._src.backends.ffi.primitives import combine_p, dispatch_p, plan_p
from jax_ep._src.backends.operands import absent_scalars
from jax_ep._src.backends.plan import Plan
from jax_ep._src.spec import OpSpec
from jax_ep._src.types import DispatchHandle


def _with_program_rank(spec: OpSpec, *operands: jax.Array) -> tuple[jax.Array, ...]:
    """(program_rank, *operands), all varying over the same mesh axes.

    `program_rank`, int32[1], is the rank that this program takes its device for. Who meets whom is
    not for a program to say: the device says it, see docs/ordering.md.
    """
    rank = jax.lax.axis_index(spec.axis_names).astype(jnp.int32)[None]
    return compat.varying_alike(rank, *operands)


@functools.partial(jax.jit, static_argnums=0, inline=True)
def plan(spec: OpSpec, topk_idx: jax.Array) -> Plan:
    """Works out every selection's row, exchanging the routing of all ranks."""
    outputs = plan_p.bind(*_with_program_rank(spec, topk_idx), spec=spec)
    slot, row_source, row_topk_idx, source_slot, group_sizes, tokens_per_expert, num_dropped = (
        outputs
    )
    return Plan(
        slot=slot,
        row_source=row_source,
        row_topk_idx=row_topk_idx if spec.layout == "rank" else None,
        group_sizes=group_sizes,
        tokens_per_expert=tokens_per_expert,
        num_dropped=num_dropped,
        source_slot=source_slot if spec.gpu else None,
    )


@functools.partial(jax.jit, static_argnums=0, inline=True)
def dispatch(
    spec: OpSpec, x: jax.Array, token_scalars: jax.Array | None, handle: DispatchHandle
) -> tuple[jax.Array, jax.Array | None]:
    """Sends rows and, where given, one scalar per selection."""
    scalars = absent_scalars(x) if token_scalars is None else token_scalars
    operands = _with_program_rank(
        spec,
        x,
        scalars,
        handle.topk_idx,
        handle.slot,
        handle.row_source,
        handle.row_source if handle.source_slot is None else handle.source_slot,
    )
    call = _dispatch_fp8 if spec.fp8_wire else _dispatch
    rows, row_scalars = call(spec, *operands)
    return rows, None if token_scalars is None else row_scalars


@functools.partial(jax.jit, static_argnums=0, inline=True)
def combine(
    spec: OpSpec, y: jax.Array, weights: jax.Array | None, handle: DispatchHandle
) -> jax.Array:
    """Sums every token's rows, times their weights where given."""
    absent = absent_scalars(y)
    operands = _with_program_rank(
        spec,
        y,
        absent if weights is None else weights,
        absent,
        handle.topk_idx,
        handle.slot,
        handle.row_source,
        handle.row_source if handle.row_topk_idx is None else handle.row_topk_idx,
        handle.row_source if handle.source_slot is None else handle.source_slot,
    )
    out, _ = combine_p.bind(*operands, spec=spec)
    return out


def _dispatch(spec: OpSpec, *operands: jax.Array) -> tuple[jax.Array, jax.Array]:
    rows, row_scalars = dispatch_p.bind(*operands, spec=spec)
    return rows, row_scalars


# Rows go out in FP8, gradients come back in the rows' own dtype: the derivative of rounding is
# taken to be 1 (straight through), which no linear rule could say.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dispatch_fp8(
    spec: OpSpec,
    program_rank: jax.Array,
    x: jax.Array,
    token_scalars: jax.Array,
    topk_idx: jax.Array,
    slot: jax.Array,
    row_source: jax.Array,
    source_slot: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    return _dispatch(spec, program_rank, x, token_scalars, topk_idx, slot, row_source, source_slot)


def _dispatch_fp8_fwd(spec: OpSpec, *operands: jax.Array) -> tuple:
    program_rank, _, _, *handle = operands
    # Elsewhere source_slot is row_source, which is to be kept once.
    return _dispatch(spec, *operands), (program_rank, *(handle if spec.gpu else handle[:-1]))


def _dispatch_fp8_bwd(spec: OpSpec, residuals: tuple, cotangents: tuple) -> tuple:
    program_rank, topk_idx, slot, row_source = residuals[:4]
    source_slot = residuals[-1]
    rows_bar, row_scalars_bar = cotangents
    absent = absent_scalars(slot)
    x_bar, token_scalars_bar = combine_p.bind(
        program_rank,
        rows_bar,
        absent,
        row_scalars_bar,
        topk_idx,
        slot,
        row_source,
        row_source,  # for row_topk_idx, which nothing reads where there are no weights
        source_slot,
        spec=spec.for_cotangents(),
    )
    return None, x_bar, token_scalars_bar, *[None] * 4


_dispatch_fp8.defvjp(_dispatch_fp8_fwd, _dispatch_fp8_bwd)
