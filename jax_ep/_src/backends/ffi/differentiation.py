# SPDX-License-Identifier: Apache-2.0
"""How the primitives of `primitives.py` are differentiated; importing this registers the rules.

`dispatch` and an unweighted `combine` are linear and each other's transposes over the same slots.
So a backward pass is made of the same exchanges, and of no exchange of counts.
"""

from collections.abc import Sequence
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad

from jax_ep._src.backends.ffi.primitives import bind, combine_p, dispatch_p, plan_p, results_tree
from jax_ep._src.backends.operands import (
    NO_PLAN,
    CombineOperands,
    CombineResults,
    DispatchOperands,
    DispatchResults,
)
from jax_ep._src.backends.plan import Plan
from jax_ep._src.backends.tangents import (
    cotangents_of,
    nonzero,
    present,
    refuse_quantized,
    tangents_of,
    weighted_rows_tangent,
)
from jax_ep._src.spec import OpSpec

# --- the linear pair ---------------------------------------------------------------------------


def dispatch_linear(
    spec: OpSpec, program_rank: jax.Array, x: Any, token_scalars: Any, plan: Plan
) -> DispatchResults:
    """Those of rows and scalars that there are, as gradients travel."""
    if not present((x, token_scalars)):
        return DispatchResults(None, None, None)
    operands = DispatchOperands(program_rank, x, None, token_scalars, plan.unweighted())
    return bind(dispatch_p, operands, spec=spec.for_cotangents())


def combine_linear(
    spec: OpSpec, program_rank: jax.Array, y: Any, row_scalars: Any, plan: Plan
) -> CombineResults:
    """The transpose of `dispatch_linear`."""
    if not present((y, row_scalars)):
        return CombineResults(None, None)
    operands = CombineOperands(program_rank, y, None, row_scalars, plan.unweighted())
    return bind(combine_p, operands, spec=spec.for_cotangents())


# --- rules -------------------------------------------------------------------------------------


def _plan_jvp(primals: Sequence[Any], tangents: Sequence[Any], **params: Any) -> Any:
    del tangents  # integers
    results = plan_p.bind(*primals, **params)
    return results, tangents_of(results, [None] * len(results))


def _dispatch_jvp(
    primals: Sequence[Any], tangents: Sequence[Any], *, tree: Any, spec: OpSpec
) -> Any:
    operands: DispatchOperands = jax.tree.unflatten(tree, primals)
    dots: DispatchOperands = jax.tree.unflatten(tree, tangents)
    quantized = spec.fp8_rows or operands.x_scales is not None
    refuse_quantized((dots.x, dots.x_scales), quantized=quantized)
    results = bind(dispatch_p, operands, spec=spec)
    results_dot = dispatch_linear(
        spec, operands.program_rank, nonzero(dots.x), nonzero(dots.token_scalars), operands.plan
    )
    return jax.tree.leaves(results), tangents_of(results, results_dot)


def _combine_jvp(
    primals: Sequence[Any], tangents: Sequence[Any], *, tree: Any, spec: OpSpec
) -> Any:
    """A weighted combine is bilinear; its tangent is one unweighted combine of the rows' tangents.

    So reverse mode sends the output's cotangent once, and the products are left to XLA.
    """
    operands: CombineOperands = jax.tree.unflatten(tree, primals)
    dots: CombineOperands = jax.tree.unflatten(tree, tangents)
    plan = operands.plan
    results = bind(combine_p, operands, spec=spec)
    rows_dot, weights_dot = nonzero(dots.y), nonzero(dots.weights)
    if operands.weights is not None and present((rows_dot, weights_dot)):
        assert operands.y is not None
        rows_dot = weighted_rows_tangent(
            operands.y, operands.weights, rows_dot, weights_dot, plan.row_source, plan.row_topk_idx
        )
    results_dot = combine_linear(
        spec, operands.program_rank, rows_dot, nonzero(dots.row_scalars), plan
    )
    return jax.tree.leaves(results), tangents_of(results, results_dot)


def _bars(
    primitive: Primitive, tree: Any, primals: Sequence[Any], cotangents: Sequence[Any], spec: OpSpec
) -> Any:
    """The results' cotangents by name; None for those that are zero."""
    shaped = [p.aval if ad.is_undefined_primal(p) else p for p in primals]
    results = results_tree(primitive, jax.tree.unflatten(tree, shaped), spec)
    return jax.tree.unflatten(results, [nonzero(bar) for bar in cotangents])


def _dispatch_transpose(
    cotangents: Sequence[Any], *primals: Any, tree: Any, spec: OpSpec
) -> list[Any]:
    """The transpose of a dispatch is an unweighted combine over the same slots."""
    operands: DispatchOperands = jax.tree.unflatten(tree, primals)
    bars = _bars(dispatch_p, tree, primals, cotangents, spec)
    refuse_quantized((bars.rows, bars.rows_scales), quantized=spec.fp8_rows)
    x_bar, token_scalars_bar = combine_linear(
        spec, operands.program_rank, bars.rows, bars.row_scalars, operands.plan
    )
    operands_bar = DispatchOperands(None, x_bar, None, token_scalars_bar, NO_PLAN)
    return cotangents_of(tree, primals, operands_bar)


def _combine_transpose(
    cotangents: Sequence[Any], *primals: Any, tree: Any, spec: OpSpec
) -> list[Any]:
    """The transpose of an unweighted combine is a dispatch over the same slots.

    Only the unweighted form is ever transposed, see `_combine_jvp`.
    """
    operands: CombineOperands = jax.tree.unflatten(tree, primals)
    bars = _bars(combine_p, tree, primals, cotangents, spec)
    y_bar, _, row_scalars_bar = dispatch_linear(
        spec, operands.program_rank, bars.out, bars.token_scalars, operands.plan
    )
    operands_bar = CombineOperands(None, y_bar, None, row_scalars_bar, NO_PLAN)
    return cotangents_of(tree, primals, operands_bar)


ad.primitive_jvps[plan_p] = _plan_jvp
ad.primitive_jvps[dispatch_p] = _dispatch_jvp
ad.primitive_jvps[combine_p] = _combine_jvp
ad.primitive_transposes[dispatch_p] = _dispatch_transpose
ad.primitive_transposes[combine_p] = _combine_transpose
