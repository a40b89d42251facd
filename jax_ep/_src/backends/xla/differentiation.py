# SPDX-License-Identifier: Apache-2.0
"""How the primitives of `primitives.py` are differentiated; importing this registers the rules.

What holds for both backends, such as the straight-through gradient of rows on the FP8 wire, is in
`tangents.py`.
"""

from collections.abc import Sequence
from typing import Any

import jax
from jax.interpreters import ad

from jax_ep._src.backends.operands import NO_PLAN
from jax_ep._src.backends.plan import Plan
from jax_ep._src.backends.tangents import (
    cotangents_of,
    nonzero,
    present,
    refuse_quantized,
    tangents_of,
    weighted_rows_tangent,
)
from jax_ep._src.backends.xla.primitives import (
    CombineOperands,
    ExchangeOperands,
    ExchangeResults,
    combine,
    combine_p,
    exchange,
    exchange_p,
    exchange_results,
)
from jax_ep._src.spec import OpSpec


def linear(
    spec: OpSpec, rows: Any, scalars: Any, plan: Plan, *, is_dispatch: bool
) -> ExchangeResults:
    """Those of rows and scalars that there are, as gradients travel."""
    if not present((rows, scalars)):
        return ExchangeResults(None, None, None)
    return exchange(
        spec.for_cotangents(), ExchangeOperands(rows, None, scalars, plan), is_dispatch=is_dispatch
    )


def _exchange_jvp(
    primals: Sequence[Any], tangents: Sequence[Any], *, tree: Any, spec: OpSpec, is_dispatch: bool
) -> Any:
    operands: ExchangeOperands = jax.tree.unflatten(tree, primals)
    dots: ExchangeOperands = jax.tree.unflatten(tree, tangents)
    quantized = is_dispatch and (spec.fp8_rows or operands.scales is not None)
    refuse_quantized((dots.rows, dots.scales), quantized=quantized)
    results = exchange(spec, operands, is_dispatch=is_dispatch)
    results_dot = linear(
        spec, nonzero(dots.rows), nonzero(dots.scalars), operands.plan, is_dispatch=is_dispatch
    )
    return jax.tree.leaves(results), tangents_of(results, results_dot)


def _exchange_transpose(
    cotangents: Sequence[Any], *primals: Any, tree: Any, spec: OpSpec, is_dispatch: bool
) -> list[Any]:
    """Dispatch and combine are each other's transposes over the same plan."""
    operands: ExchangeOperands = jax.tree.unflatten(tree, primals)
    shaped = [p.aval if ad.is_undefined_primal(p) else p for p in primals]
    results = exchange_results(spec, jax.tree.unflatten(tree, shaped), is_dispatch=is_dispatch)
    bars: ExchangeResults = jax.tree.unflatten(
        jax.tree.structure(results), [nonzero(bar) for bar in cotangents]
    )
    refuse_quantized((bars.rows, bars.scales), quantized=is_dispatch and spec.fp8_rows)
    rows_bar, _, scalars_bar = linear(
        spec, bars.rows, bars.scalars, operands.plan, is_dispatch=not is_dispatch
    )
    return cotangents_of(tree, primals, ExchangeOperands(rows_bar, None, scalars_bar, NO_PLAN))


def _combine_jvp(
    primals: Sequence[Any], tangents: Sequence[Any], *, tree: Any, spec: OpSpec
) -> Any:
    """Bilinear: the tangent is an unweighted combine of the rows' tangents."""
    operands: CombineOperands = jax.tree.unflatten(tree, primals)
    dots: CombineOperands = jax.tree.unflatten(tree, tangents)
    plan = operands.plan
    results = [combine(spec, operands)]
    rows_dot, weights_dot = nonzero(dots.y), nonzero(dots.weights)
    if present((rows_dot, weights_dot)):
        rows_dot = weighted_rows_tangent(
            operands.y, operands.weights, rows_dot, weights_dot, plan.row_source, plan.row_topk_idx
        )
    out_dot = linear(spec, rows_dot, None, plan, is_dispatch=False).rows
    return results, tangents_of(results, [out_dot])


ad.primitive_jvps[exchange_p] = _exchange_jvp
ad.primitive_jvps[combine_p] = _combine_jvp
ad.primitive_transposes[exchange_p] = _exchange_transpose
