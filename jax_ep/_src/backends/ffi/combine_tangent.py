# SPDX-License-Identifier: Apache-2.0
"""The tangent of a weighted combine: a primitive whose transpose is one dispatch with products."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jax_ep._src import compat
from jax_ep._src.backends.ffi.linear import combine_linear, dispatch_linear
from jax_ep._src.backends.ffi.primitives import bind, dispatch_p
from jax_ep._src.backends.operands import NO_PLAN, CombineResults, DispatchOperands
from jax_ep._src.backends.plan import Plan, Value
from jax_ep._src.backends.tangents import (
    cotangents_of,
    nonzero,
    row_weights,
    weighted_rows_tangent,
    weights_cotangent,
)
from jax_ep._src.batching import one_by_one
from jax_ep._src.spec import OpSpec


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


def combine_tangent(spec: OpSpec, operands: TangentOperands) -> CombineResults:
    """The tangent of a weighted combine."""
    leaves, tree = jax.tree.flatten(operands)
    results = tangent_p.bind(*leaves, tree=tree, spec=spec)
    return jax.tree.unflatten(jax.tree.structure(_shapes(operands)), results)


def _computed(spec: OpSpec, operands: TangentOperands) -> CombineResults:
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


def _leaves(*leaves: Any, tree: Any, spec: OpSpec) -> list[Any]:
    return jax.tree.leaves(_computed(spec, jax.tree.unflatten(tree, leaves)))


def _shapes(operands: TangentOperands) -> CombineResults:
    """Of its results."""
    rows, scalars = operands.y if operands.y_dot is None else operands.y_dot, None
    assert rows is not None
    num_tokens, num_topk = operands.plan.slot.shape
    if operands.row_scalars_dot is not None:
        scalars = jax.ShapeDtypeStruct((num_tokens, num_topk), operands.row_scalars_dot.dtype)
    return CombineResults(
        out=jax.ShapeDtypeStruct((num_tokens, rows.shape[1]), rows.dtype), token_scalars=scalars
    )


def _abstract(*avals: Any, tree: Any, spec: OpSpec) -> list[Any]:
    del spec
    results = _shapes(jax.tree.unflatten(tree, avals))
    return [compat.like(avals[0], r.shape, r.dtype) for r in jax.tree.leaves(results)]


def _transpose(cotangents: Sequence[Any], *primals: Any, tree: Any, spec: OpSpec) -> list[Any]:
    """One dispatch, which multiplies what arrives by the weights, and by y for their cotangent."""
    operands: TangentOperands = jax.tree.unflatten(tree, primals)
    shaped = [p.aval if ad.is_undefined_primal(p) else p for p in primals]
    results = jax.tree.structure(_shapes(jax.tree.unflatten(tree, shaped)))
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


def jvp_of(
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


def _jvp(primals: Sequence[Any], tangents: Sequence[Any], *, tree: Any, spec: OpSpec) -> Any:
    return jvp_of(functools.partial(_leaves, tree=tree, spec=spec), primals, tangents)


tangent_p.def_impl(_leaves)
tangent_p.def_abstract_eval(_abstract)
mlir.register_lowering(tangent_p, mlir.lower_fun(_leaves, multiple_results=True))
batching.primitive_batchers[tangent_p] = functools.partial(one_by_one, tangent_p)
ad.primitive_jvps[tangent_p] = _jvp
ad.primitive_transposes[tangent_p] = _transpose
