# SPDX-License-Identifier: Apache-2.0
"""How the primitives of `primitives.py` are differentiated; importing this registers the rules.

`dispatch` and an unweighted `combine` are linear and each other's transposes over the same slots.
So a backward pass is made of the same exchanges, and of no exchange of counts. What holds for both
backends, such as the straight-through gradient of rows on the FP8 wire, is in `tangents.py`.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad

from jax_ep._src.backends.ffi.combine_tangent import TangentOperands, combine_tangent, jvp_of
from jax_ep._src.backends.ffi.linear import combine_linear, dispatch_linear
from jax_ep._src.backends.ffi.primitives import (
    bind,
    combine_p,
    dispatch_p,
    plan_dispatch_p,
    plan_p,
    results_tree,
)
from jax_ep._src.backends.operands import (
    NO_PLAN,
    CombineOperands,
    CombineResults,
    DispatchOperands,
    PlanDispatchOperands,
    PlanDispatchResults,
)
from jax_ep._src.backends.tangents import (
    cotangents_of,
    named,
    nonzero,
    present,
    products_of_rows,
    refuse_quantized,
    tangents_of,
    weighted_rows_tangent,
)
from jax_ep._src.spec import OpSpec


def _plan_jvp(primals: Sequence[Any], tangents: Sequence[Any], **params: Any) -> Any:
    del tangents  # integers
    results = plan_p.bind(*primals, **params)
    return results, tangents_of(results, [None] * len(results))


def _dispatch_jvp(
    primals: Sequence[Any], tangents: Sequence[Any], *, tree: Any, spec: OpSpec
) -> Any:
    operands: DispatchOperands = jax.tree.unflatten(tree, primals)
    if operands.with_products:
        apart = functools.partial(_products_apart, tree=tree, spec=spec)
        return jvp_of(apart, primals, tangents)
    dots: DispatchOperands = jax.tree.unflatten(tree, tangents)
    quantized = spec.fp8_rows or operands.x_scales is not None
    refuse_quantized((dots.x, dots.x_scales), quantized=quantized)
    results = bind(dispatch_p, operands, spec=spec)
    results_dot = dispatch_linear(
        spec, operands.program_rank, nonzero(dots.x), nonzero(dots.token_scalars), operands.plan
    )
    return jax.tree.leaves(results), tangents_of(results, results_dot)


def _plan_dispatch_jvp(
    primals: Sequence[Any], tangents: Sequence[Any], *, tree: Any, spec: OpSpec
) -> Any:
    operands: PlanDispatchOperands = jax.tree.unflatten(tree, primals)
    dots: PlanDispatchOperands = jax.tree.unflatten(tree, tangents)
    results: PlanDispatchResults = bind(plan_dispatch_p, operands, spec=spec)
    return jax.tree.leaves(results), plan_dispatch_tangents(spec, operands, dots, results)


def plan_dispatch_tangents(
    spec: OpSpec,
    operands: PlanDispatchOperands,
    dots: PlanDispatchOperands,
    results: PlanDispatchResults,
) -> list[Any]:
    """The tangents of its results: they travel as a dispatch over the plan that it has made."""
    quantized = spec.fp8_rows or operands.x_scales is not None
    refuse_quantized((dots.x, dots.x_scales), quantized=quantized)
    plan = named(operands.of_dispatch(results.plan).plan)
    results_dot = dispatch_linear(
        spec, operands.program_rank, nonzero(dots.x), nonzero(dots.token_scalars), plan
    )
    of_plan = jax.tree.leaves(results.of_plan())
    return [
        *tangents_of(of_plan, [None] * len(of_plan)),
        *tangents_of(results.of_dispatch(), results_dot),
    ]


def _products_apart(*leaves: Any, tree: Any, spec: OpSpec) -> list[Any]:
    """A dispatch with products, by one without, and XLA's. So it has derivatives of any order."""
    operands: DispatchOperands = jax.tree.unflatten(tree, leaves)
    received = bind(dispatch_p, operands._replace(row_weights=None, y=None), spec=spec)
    rows, row_dots = products_of_rows(
        received.rows, operands.row_weights, operands.y, operands.plan.row_source
    )
    return jax.tree.leaves(received._replace(rows=rows, row_dots=row_dots))


def _combine_jvp(
    primals: Sequence[Any], tangents: Sequence[Any], *, tree: Any, spec: OpSpec
) -> Any:
    operands: CombineOperands = jax.tree.unflatten(tree, primals)
    dots: CombineOperands = jax.tree.unflatten(tree, tangents)
    results: CombineResults = bind(combine_p, operands, spec=spec)
    return jax.tree.leaves(results), combine_tangents(spec, operands, dots, results)


def combine_tangents(
    spec: OpSpec, operands: CombineOperands, dots: CombineOperands, results: CombineResults
) -> list[Any]:
    """The tangents of a combine's results.

    A weighted one is bilinear; its tangent is one unweighted combine of the rows' tangents. So
    reverse mode sends the output's cotangent once.
    """
    plan = operands.plan
    rows_dot, weights_dot, scalars_dot = map(nonzero, (dots.y, dots.weights, dots.row_scalars))
    if operands.weights is None or not present((rows_dot, weights_dot)):
        results_dot = combine_linear(spec, operands.program_rank, rows_dot, scalars_dot, plan)
        return tangents_of(results, results_dot)
    tangent = TangentOperands(
        program_rank=operands.program_rank,
        y=None if weights_dot is None else operands.y,
        weights=None if rows_dot is None else operands.weights,
        y_dot=rows_dot,
        weights_dot=weights_dot,
        row_scalars_dot=scalars_dot,
        plan=plan,
    )
    return tangents_of(results, combine_tangent(spec, tangent))


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
    rows_bar = bars.rows
    if operands.with_products and present((bars.rows, bars.row_dots)):
        # Linear in x alone: the products' other factors are there.
        rows_bar = weighted_rows_tangent(
            operands.y,
            operands.row_weights,
            bars.rows,
            bars.row_dots,
            operands.plan.row_source,
            None,
        )
    sums = combine_linear(spec, operands.program_rank, rows_bar, bars.row_scalars, operands.plan)
    operands_bar = DispatchOperands(None, sums.out, None, sums.token_scalars, None, None, NO_PLAN)
    return cotangents_of(tree, primals, operands_bar)


def _combine_transpose(
    cotangents: Sequence[Any], *primals: Any, tree: Any, spec: OpSpec
) -> list[Any]:
    """The transpose of an unweighted combine is a dispatch over the same slots.

    Only the unweighted form is ever transposed, see `_combine_jvp`.
    """
    operands: CombineOperands = jax.tree.unflatten(tree, primals)
    bars = _bars(combine_p, tree, primals, cotangents, spec)
    arrived = dispatch_linear(
        spec, operands.program_rank, bars.out, bars.token_scalars, operands.plan
    )
    operands_bar = CombineOperands(None, arrived.rows, None, arrived.row_scalars, NO_PLAN)
    return cotangents_of(tree, primals, operands_bar)


ad.primitive_jvps[plan_p] = _plan_jvp
ad.primitive_jvps[dispatch_p] = _dispatch_jvp
ad.primitive_jvps[plan_dispatch_p] = _plan_dispatch_jvp
ad.primitive_jvps[combine_p] = _combine_jvp
ad.primitive_transposes[dispatch_p] = _dispatch_transpose
ad.primitive_transposes[combine_p] = _combine_transpose
