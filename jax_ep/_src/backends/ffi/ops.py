# SPDX-License-Identifier: Apache-2.0
"""Backend `ffi`: this library's own handlers, through the primitives of `primitives.py`.

The functions are jitted so that `shard_map` without `jit` compiles each of them as one program:
the primitives have no other way to run.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jax_ep._src import compat
from jax_ep._src.backends.ffi import differentiation  # noqa: F401 (its rules are registered)
from jax_ep._src.backends.ffi import splitting as _splitting  # noqa: F401 (likewise)
from jax_ep._src.backends.ffi.linear import dispatch_linear
from jax_ep._src.backends.ffi.primitives import (
    bind,
    combine_p,
    dispatch_p,
    plan_dispatch_p,
    plan_p,
)
from jax_ep._src.backends.operands import (
    CombineOperands,
    DispatchResults,
    PlanDispatchOperands,
    PlanDispatchResults,
    Rows,
)
from jax_ep._src.backends.plan import Counts, Plan
from jax_ep._src.quantized import QuantizedRows
from jax_ep._src.spec import OpSpec


def _varying_alike(operands: Any) -> Any:
    """The operands, all varying over the same mesh axes."""
    leaves, tree = jax.tree.flatten(operands)
    return jax.tree.unflatten(tree, compat.varying_alike(*leaves))


def _program_rank(spec: OpSpec) -> jax.Array:
    return jax.lax.axis_index(spec.axis_names).astype(jnp.int32)[None]


@functools.partial(jax.jit, static_argnums=0, inline=True)
def plan_dispatch(
    spec: OpSpec, x: Rows, topk_idx: jax.Array, token_scalars: jax.Array | None
) -> tuple[Plan, Counts, DispatchResults]:
    """Works out every selection's row, and sends rows and, where given, a scalar per selection."""
    values, scales = (x.values, x.scales) if isinstance(x, QuantizedRows) else (x, None)
    operands = PlanDispatchOperands(_program_rank(spec), values, scales, token_scalars, topk_idx)
    if compat.varying_axes(*operands.of_plan()) == compat.varying_axes(*jax.tree.leaves(operands)):
        results = bind(plan_dispatch_p, _varying_alike(operands), spec=spec)
    else:  # the plan varies over fewer mesh axes than what travels
        planned = bind(plan_p, _varying_alike(operands.of_plan()), spec=spec)
        dispatched = _varying_alike(operands.of_dispatch(planned.plan))
        results = PlanDispatchResults.of(planned, bind(dispatch_p, dispatched, spec=spec))
    return results.plan._replace(topk_idx=topk_idx), results.counts, results.of_dispatch()


@functools.partial(jax.jit, static_argnums=0, inline=True)
def dispatch_tangents(
    spec: OpSpec, x: jax.Array | None, token_scalars: jax.Array | None, plan: Plan
) -> tuple[jax.Array | None, jax.Array | None]:
    """Sends those of both that there are as gradients travel: in `dtype`."""
    program_rank, x, token_scalars, plan = _varying_alike(
        (_program_rank(spec), x, token_scalars, plan)
    )
    results = dispatch_linear(spec, program_rank, x, token_scalars, plan)
    return results.rows, results.row_scalars


@functools.partial(jax.jit, static_argnums=0, inline=True)
def combine(spec: OpSpec, y: jax.Array, weights: jax.Array | None, plan: Plan) -> jax.Array:
    """Sums every token's rows, times their weights where given."""
    operands = _varying_alike(
        CombineOperands(_program_rank(spec), y, weights, row_scalars=None, plan=plan)
    )
    return bind(combine_p, operands, spec=spec).out
