# SPDX-License-Identifier: Apache-2.0
"""How the primitives of `primitives.py` are differentiated; importing this registers the rules.

`dispatch` and an unweighted `combine` are linear and each other's transposes over the same slots.
So a backward pass is made of the same exchanges, and of no exchange of counts.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import ad

from jax_ep._src.backends.ffi.primitives import combine_p, dispatch_p, plan_p
from jax_ep._src.backends.operands import (
    absent_scalars,
    is_absent,
    no_rows,
    weighted_rows_tangent,
)
from jax_ep._src.spec import OpSpec


def _zero_tangents(outputs: Sequence[jax.Array]) -> list[Any]:
    return [ad.Zero(jax.typeof(out).to_tangent_aval()) for out in outputs]


def _plan_jvp(primals: Sequence[Any], tangents: Sequence[Any], *, spec: OpSpec) -> Any:
    del tangents  # integers
    outputs = plan_p.bind(*primals, spec=spec)
    return outputs, _zero_tangents(outputs)


def _tangents_of(outputs: Sequence[Any], rows: Any, scalars: Any, linear: Any) -> list[Any]:
    """Runs `linear(rows, scalars)` on the tangents that are not zero, the others absent."""
    if type(rows) is ad.Zero and type(scalars) is ad.Zero:
        return _zero_tangents(outputs)
    out_rows, out_scalars = linear(rows, scalars)
    zeros = _zero_tangents(outputs)
    return [
        zeros[0] if type(rows) is ad.Zero else out_rows,
        zeros[1] if type(scalars) is ad.Zero else out_scalars,
    ]


def _dispatch_jvp(primals: Sequence[Any], tangents: Sequence[Any], *, spec: OpSpec) -> Any:
    program_rank, x, token_scalars, *handle = primals
    outputs = dispatch_p.bind(*primals, spec=spec)

    def linear(x_dot: Any, scalars_dot: Any) -> Any:
        return dispatch_p.bind(
            program_rank,
            no_rows(scalars_dot, x.dtype) if type(x_dot) is ad.Zero else x_dot,
            absent_scalars(x_dot) if type(scalars_dot) is ad.Zero else scalars_dot,
            *handle,
            spec=spec.for_cotangents(),
        )

    del token_scalars
    return outputs, _tangents_of(outputs, tangents[1], tangents[2], linear)


def _dispatch_transpose(
    cotangents: Sequence[Any],
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
    """The transpose of a dispatch is an unweighted combine over the same slots."""
    rows_bar, row_scalars_bar = cotangents
    if type(rows_bar) is ad.Zero and type(row_scalars_bar) is ad.Zero:
        return [None] * 7
    dtype = x.aval.dtype if ad.is_undefined_primal(x) else x.dtype
    no_scalars = absent_scalars(topk_idx)
    empty_rows = jnp.broadcast_to(row_source[:, None], (spec.recv_capacity, 1))[:, :0]
    x_bar, token_scalars_bar = combine_p.bind(
        program_rank,
        empty_rows.astype(dtype) if type(rows_bar) is ad.Zero else rows_bar,
        no_scalars,
        no_scalars if type(row_scalars_bar) is ad.Zero else row_scalars_bar,
        topk_idx,
        slot,
        row_source,
        row_source,  # for row_topk_idx, which nothing reads where there are no weights
        source_slot,
        spec=spec.for_cotangents(),
    )
    wants_x = ad.is_undefined_primal(x) and type(rows_bar) is not ad.Zero
    wants_scalars = ad.is_undefined_primal(token_scalars) and type(row_scalars_bar) is not ad.Zero
    return [
        None,
        x_bar if wants_x else None,
        token_scalars_bar if wants_scalars else None,
        *[None] * 4,
    ]


def _combine_jvp(primals: Sequence[Any], tangents: Sequence[Any], *, spec: OpSpec) -> Any:
    """A weighted combine is bilinear; its tangent is one unweighted combine of the rows' tangents.

    So reverse mode sends the output's cotangent once, and the products are left to XLA.
    """
    program_rank, y, weights, row_scalars, topk_idx, slot, row_source = primals[:7]
    row_topk_idx, source_slot = primals[7:]
    y_dot, weights_dot, scalars_dot = tangents[1:4]
    outputs = combine_p.bind(*primals, spec=spec)
    del row_scalars
    rows_dot = y_dot
    if not is_absent(weights) and (type(y_dot), type(weights_dot)) != (ad.Zero, ad.Zero):
        rows_dot = weighted_rows_tangent(
            y,
            weights,
            None if type(y_dot) is ad.Zero else y_dot,
            None if type(weights_dot) is ad.Zero else weights_dot,
            row_source,
            row_topk_idx if spec.layout == "rank" else None,
        )

    def linear(rows_dot: Any, scalars_dot: Any) -> Any:
        return combine_p.bind(
            program_rank,
            no_rows(scalars_dot, y.dtype) if type(rows_dot) is ad.Zero else rows_dot,
            absent_scalars(scalars_dot if type(rows_dot) is ad.Zero else rows_dot),
            absent_scalars(rows_dot) if type(scalars_dot) is ad.Zero else scalars_dot,
            topk_idx,
            slot,
            row_source,
            row_source,  # for row_topk_idx, which nothing reads where there are no weights
            source_slot,
            spec=spec.for_cotangents(),
        )

    return outputs, _tangents_of(outputs, rows_dot, scalars_dot, linear)


def _combine_transpose(
    cotangents: Sequence[Any],
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
    """The transpose of an unweighted combine is a dispatch over the same slots."""
    del weights, row_topk_idx  # only the unweighted form is ever transposed, see _combine_jvp
    out_bar, token_scalars_bar = cotangents
    if type(out_bar) is ad.Zero and type(token_scalars_bar) is ad.Zero:
        return [None] * 9
    dtype = y.aval.dtype if ad.is_undefined_primal(y) else y.dtype
    rows_bar, row_scalars_bar = dispatch_p.bind(
        program_rank,
        topk_idx[:, :0].astype(dtype) if type(out_bar) is ad.Zero else out_bar,
        absent_scalars(topk_idx) if type(token_scalars_bar) is ad.Zero else token_scalars_bar,
        topk_idx,
        slot,
        row_source,
        source_slot,
        spec=spec.for_cotangents(),
    )
    wants_y = ad.is_undefined_primal(y) and type(out_bar) is not ad.Zero
    wants_scalars = ad.is_undefined_primal(row_scalars) and type(token_scalars_bar) is not ad.Zero
    return [
        None,
        rows_bar if wants_y else None,
        None,
        row_scalars_bar if wants_scalars else None,
        *[None] * 5,
    ]


ad.primitive_jvps[plan_p] = _plan_jvp
ad.primitive_jvps[dispatch_p] = _dispatch_jvp
ad.primitive_jvps[combine_p] = _combine_jvp
ad.primitive_transposes[dispatch_p] = _dispatch_transpose
ad.primitive_transposes[combine_p] = _combine_transpose
