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
from jax_ep._src.backends.ffi import halves as _halves  # noqa: F401 (likewise)
from jax_ep._src.backends.ffi import splitting as _splitting  # noqa: F401 (likewise)
from jax_ep._src.backends.ffi.linear import dispatch_linear
from jax_ep._src.backends.ffi.primitives import (
    bind,
    combine_done_p,
    combine_p,
    combine_start_p,
    dispatch_done_p,
    dispatch_p,
    dispatch_start_p,
    plan_dispatch_p,
    plan_p,
)
from jax_ep._src.backends.operands import (
    CombineDoneOperands,
    CombineOperands,
    CombineResults,
    DispatchDoneOperands,
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
    spec: OpSpec,
    x: Rows,
    topk_idx: jax.Array,
    token_scalars: jax.Array | None,
    rank_mask: jax.Array | None,
) -> tuple[Plan, Counts, DispatchResults]:
    """Works out every selection's row, and sends rows and, where given, a scalar per selection."""
    operands = _operands_of_both(spec, x, topk_idx, token_scalars, rank_mask)
    whole = spec.on_timeout == "mask"  # who is missing is missing in both
    if whole or _varying_axes(operands.of_plan()) == _varying_axes(operands):
        results = bind(plan_dispatch_p, _varying_alike(operands), spec=spec)
    else:  # the plan varies over fewer mesh axes than what travels
        planned = bind(plan_p, _varying_alike(operands.of_plan()), spec=spec)
        dispatched = _varying_alike(operands.of_dispatch(planned.plan))
        results = PlanDispatchResults.of(planned, bind(dispatch_p, dispatched, spec=spec))
    plan = results.plan._replace(topk_idx=topk_idx, rank_mask=rank_mask)
    return plan, results.counts, results.of_dispatch()


def _varying_axes(operands: Any) -> frozenset[str]:
    return compat.varying_axes(*jax.tree.leaves(operands))


def _operands_of_both(
    spec: OpSpec,
    x: Rows,
    topk_idx: jax.Array,
    token_scalars: jax.Array | None,
    rank_mask: jax.Array | None,
) -> PlanDispatchOperands:
    values, scales = (x.values, x.scales) if isinstance(x, QuantizedRows) else (x, None)
    rank = _program_rank(spec)
    return PlanDispatchOperands(rank, values, scales, token_scalars, topk_idx, rank_mask)


@functools.partial(jax.jit, static_argnums=(0, 5), inline=True)
def plan_dispatch_start(
    spec: OpSpec,
    x: Rows,
    topk_idx: jax.Array,
    token_scalars: jax.Array | None,
    rank_mask: jax.Array | None,
    counts: bool,
) -> jax.Array:
    """The first half of `plan_dispatch`, of a call that has halves; returns the ticket."""
    operands = _varying_alike(_operands_of_both(spec, x, topk_idx, token_scalars, rank_mask))
    return bind(dispatch_start_p, operands, spec=spec, counts=counts).ticket


@functools.partial(jax.jit, static_argnums=0, inline=True)
def plan_dispatch_done(
    spec: OpSpec,
    ticket: jax.Array,
    after: tuple[jax.Array, ...],
    x: Rows,
    topk_idx: jax.Array,
    token_scalars: jax.Array | None,
    rank_mask: jax.Array | None,
) -> tuple[Plan, Counts, DispatchResults]:
    """The second half, of the same operands. It comes after the arrays in `after`."""
    sent = _operands_of_both(spec, x, topk_idx, token_scalars, rank_mask)
    operands = _varying_alike(DispatchDoneOperands(sent, ticket, after))
    results: PlanDispatchResults = bind(dispatch_done_p, operands, spec=spec)
    planned = results.of_plan()
    if _varying_axes(sent.of_plan()) != _varying_axes(operands):
        # The same plan once more, which varies over fewer mesh axes, as that of `plan_dispatch`.
        planned = bind(plan_p, _varying_alike(sent.of_plan()), spec=spec)
    plan = planned.plan._replace(topk_idx=topk_idx, rank_mask=rank_mask)
    return plan, planned.counts, results.of_dispatch()


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
def combine(
    spec: OpSpec, y: jax.Array, weights: jax.Array | None, plan: Plan
) -> tuple[jax.Array, jax.Array | None]:
    """Sums every token's rows, times their weights where given; and says who was missing."""
    operands = _varying_alike(
        CombineOperands(_program_rank(spec), y, weights, row_scalars=None, plan=plan)
    )
    results: CombineResults = bind(combine_p, operands, spec=spec)
    out: jax.Array | None = results.out
    assert out is not None
    return out, results.missing_ranks


@functools.partial(jax.jit, static_argnums=0, inline=True)
def combine_start(spec: OpSpec, y: jax.Array, weights: jax.Array | None, plan: Plan) -> jax.Array:
    """The first half of `combine`, of a call that has halves; returns the ticket."""
    sent = CombineOperands(_program_rank(spec), y, weights, row_scalars=None, plan=plan)
    return bind(combine_start_p, _varying_alike(sent), spec=spec, counts=True).ticket


@functools.partial(jax.jit, static_argnums=0, inline=True)
def combine_done(
    spec: OpSpec,
    ticket: jax.Array,
    after: tuple[jax.Array, ...],
    y: jax.Array,
    weights: jax.Array | None,
    plan: Plan,
) -> jax.Array:
    """The second half, of the same operands. It comes after the arrays in `after`."""
    sent = CombineOperands(_program_rank(spec), y, weights, row_scalars=None, plan=plan)
    operands = _varying_alike(CombineDoneOperands(sent, ticket, after))
    return bind(combine_done_p, operands, spec=spec).out
