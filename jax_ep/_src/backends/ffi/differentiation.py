# SPDX-License-Identifier: Apache-2.0
"""How the primitives of `primitives.py` are differentiated; importing this registers the rules.

`dispatch` and an unweighted `combine` are linear and each other's transposes over the same slots.
So a backward pass is made of the same exchanges, and of no exchange of counts. The tangent of a
weighted `combine` is a primitive of its own, `tangent_p`, whose transpose is one dispatch that
makes the products where the rows arrive.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jax_ep._src import compat
from jax_ep._src.backends.ffi.primitives import bind, combine_p, dispatch_p, plan_p, results_tree
from jax_ep._src.backends.operands import (
    NO_PLAN,
    CombineOperands,
    CombineResults,
    DispatchOperands,
    DispatchResults,
)
from jax_ep._src.backends.plan import Plan, Value
from jax_ep._src.backends.tangents import (
    cotangents_of,
    nonzero,
    present,
    products_of_rows,
    refuse_quantized,
    row_weights,
    tangents_of,
    weighted_rows_tangent,
    weights_cotangent,
)
from jax_ep._src.batching import one_by_one
from jax_ep._src.spec import OpSpec

# --- the linear pair ---------------------------------------------------------------------------


def dispatch_linear(
    spec: OpSpec, program_rank: jax.Array, x: Any, token_scalars: Any, plan: Plan
) -> DispatchResults:
    """Those of rows and scalars that there are, as gradients travel."""
    if not present((x, token_scalars)):
        return DispatchResults()
    operands = DispatchOperands(program_rank, x, None, token_scalars, None, None, plan.unweighted())
    return bind(dispatch_p, operands, spec=spec.for_cotangents())


def combine_linear(
    spec: OpSpec, program_rank: jax.Array, y: Any, row_scalars: Any, plan: Plan
) -> CombineResults:
    """The transpose of `dispatch_linear`."""
    if not present((y, row_scalars)):
        return CombineResults(None, None)
    operands = CombineOperands(program_rank, y, None, row_scalars, plan.unweighted())
    return bind(combine_p, operands, spec=spec.for_cotangents())


# --- the tangent of a weighted combine -----------------------------------------------------------


class TangentOperands(NamedTuple):
    """A weighted combine is bilinear: its tangent is linear in the three that end in `_dot`.

    Attributes:
        program_rank: as in `PlanOperands`.
        y: `[C, H]`, where there is a `weights_dot`.
        weights: where there is a `y_dot`.
        y_dot: `[C, H]`.
        weights_dot: like `weights`.
        row_scalars_dot: like `weights`; they travel.
        plan: where the rows come from.
    """

    program_rank: Value
    y: Value | None
    weights: Value | None
    y_dot: Value | None
    weights_dot: Value | None
    row_scalars_dot: Value | None
    plan: Plan


# Its own, so that it has a transpose of its own. It is computed as what it stands for: one
# unweighted combine of the rows' tangents.
tangent_p = Primitive("jax_ep_combine_tangent")
tangent_p.multiple_results = True


def _tangent(spec: OpSpec, operands: TangentOperands) -> CombineResults:
    plan = operands.plan
    rows_dot = weighted_rows_tangent(
        operands.y,
        operands.weights,
        operands.y_dot,
        operands.weights_dot,
        plan.row_source,
        plan.row_topk_idx,
    )
    return combine_linear(spec, operands.program_rank, rows_dot, operands.row_scalars_dot, plan)


def _tangent_leaves(*leaves: Any, tree: Any, spec: OpSpec) -> list[Any]:
    return jax.tree.leaves(_tangent(spec, jax.tree.unflatten(tree, leaves)))


def _tangent_shapes(operands: TangentOperands) -> CombineResults:
    rows, scalars = operands.y if operands.y_dot is None else operands.y_dot, None
    num_tokens, num_topk = operands.plan.slot.shape
    if operands.row_scalars_dot is not None:
        scalars = jax.ShapeDtypeStruct((num_tokens, num_topk), operands.row_scalars_dot.dtype)
    return CombineResults(
        out=jax.ShapeDtypeStruct((num_tokens, rows.shape[1]), rows.dtype), token_scalars=scalars
    )


def _tangent_abstract(*avals: Any, tree: Any, spec: OpSpec) -> list[Any]:
    del spec
    results = _tangent_shapes(jax.tree.unflatten(tree, avals))
    return [compat.like(avals[0], r.shape, r.dtype) for r in jax.tree.leaves(results)]


def _tangent_transpose(
    cotangents: Sequence[Any], *primals: Any, tree: Any, spec: OpSpec
) -> list[Any]:
    """One dispatch, which multiplies what arrives by the weights, and by y for their cotangent."""
    operands: TangentOperands = jax.tree.unflatten(tree, primals)
    shaped = [p.aval if ad.is_undefined_primal(p) else p for p in primals]
    results = jax.tree.structure(_tangent_shapes(jax.tree.unflatten(tree, shaped)))
    bars: CombineResults = jax.tree.unflatten(results, [nonzero(bar) for bar in cotangents])
    plan = operands.plan
    if bars.out is None:
        arrived = dispatch_linear(spec, operands.program_rank, None, bars.token_scalars, plan)
    else:
        weights = operands.weights
        sent = DispatchOperands(
            program_rank=operands.program_rank,
            x=bars.out,
            x_scales=None,
            token_scalars=bars.token_scalars,
            row_weights=None if weights is None else row_weights(weights, plan.row_topk_idx),
            y=operands.y,
            plan=plan.unweighted(),
        )
        arrived = bind(dispatch_p, sent, spec=spec.for_cotangents())
    row_dots = arrived.row_dots
    operands_bar = TangentOperands(
        program_rank=None,
        y=None,
        weights=None,
        y_dot=None if operands.y_dot is None else arrived.rows,
        weights_dot=None if row_dots is None else weights_cotangent(row_dots, plan.row_topk_idx),
        row_scalars_dot=arrived.row_scalars,
        plan=NO_PLAN,
    )
    return cotangents_of(tree, primals, operands_bar)


# --- rules -------------------------------------------------------------------------------------


def _jvp_of(
    f: Callable[..., list[Any]], primals: Sequence[Any], tangents: Sequence[Any]
) -> tuple[list[Any], list[Any]]:
    """The rule of a primitive that is computed by what can itself be differentiated."""
    moving = [i for i, tangent in enumerate(tangents) if nonzero(tangent) is not None]

    def of_moving(*values: Any) -> list[Any]:
        operands = list(primals)
        for i, value in zip(moving, values, strict=True):
            operands[i] = value
        return f(*operands)

    return jax.jvp(of_moving, [primals[i] for i in moving], [tangents[i] for i in moving])


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
        return _jvp_of(apart, primals, tangents)
    dots: DispatchOperands = jax.tree.unflatten(tree, tangents)
    quantized = spec.fp8_rows or operands.x_scales is not None
    refuse_quantized((dots.x, dots.x_scales), quantized=quantized)
    results = bind(dispatch_p, operands, spec=spec)
    results_dot = dispatch_linear(
        spec, operands.program_rank, nonzero(dots.x), nonzero(dots.token_scalars), operands.plan
    )
    return jax.tree.leaves(results), tangents_of(results, results_dot)


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
    """A weighted combine is bilinear; its tangent is one unweighted combine of the rows' tangents.

    So reverse mode sends the output's cotangent once.
    """
    operands: CombineOperands = jax.tree.unflatten(tree, primals)
    dots: CombineOperands = jax.tree.unflatten(tree, tangents)
    plan = operands.plan
    results = bind(combine_p, operands, spec=spec)
    rows_dot, weights_dot, scalars_dot = map(nonzero, (dots.y, dots.weights, dots.row_scalars))
    if operands.weights is None or not present((rows_dot, weights_dot)):
        results_dot = combine_linear(spec, operands.program_rank, rows_dot, scalars_dot, plan)
        return jax.tree.leaves(results), tangents_of(results, results_dot)
    tangent = TangentOperands(
        program_rank=operands.program_rank,
        y=None if weights_dot is None else operands.y,
        weights=None if rows_dot is None else operands.weights,
        y_dot=rows_dot,
        weights_dot=weights_dot,
        row_scalars_dot=scalars_dot,
        plan=plan,
    )
    leaves, tangent_tree = jax.tree.flatten(tangent)
    dots_out = tangent_p.bind(*leaves, tree=tangent_tree, spec=spec)
    shapes = jax.tree.structure(_tangent_shapes(tangent))
    return jax.tree.leaves(results), tangents_of(results, jax.tree.unflatten(shapes, dots_out))


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
    x_bar, token_scalars_bar = combine_linear(
        spec, operands.program_rank, rows_bar, bars.row_scalars, operands.plan
    )
    operands_bar = DispatchOperands(None, x_bar, None, token_scalars_bar, None, None, NO_PLAN)
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


def _tangent_jvp(
    primals: Sequence[Any], tangents: Sequence[Any], *, tree: Any, spec: OpSpec
) -> Any:
    return _jvp_of(functools.partial(_tangent_leaves, tree=tree, spec=spec), primals, tangents)


tangent_p.def_impl(_tangent_leaves)
tangent_p.def_abstract_eval(_tangent_abstract)
mlir.register_lowering(tangent_p, mlir.lower_fun(_tangent_leaves, multiple_results=True))
batching.primitive_batchers[tangent_p] = functools.partial(one_by_one, tangent_p)
ad.primitive_jvps[tangent_p] = _tangent_jvp
ad.primitive_transposes[tangent_p] = _tangent_transpose
ad.primitive_jvps[plan_p] = _plan_jvp
ad.primitive_jvps[dispatch_p] = _dispatch_jvp
ad.primitive_jvps[combine_p] = _combine_jvp
ad.primitive_transposes[dispatch_p] = _dispatch_transpose
ad.primitive_transposes[combine_p] = _combine_transpose
