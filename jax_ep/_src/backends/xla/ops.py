# SPDX-License-Identifier: Apache-2.0
"""Backend `xla`: the same operations from collectives of `jax.lax` alone.

It runs wherever JAX runs, over any number of processes, and is the fallback and a baseline; it is
not fast: rows are gathered from all ranks. Sums are taken in the defined order with the defined
roundings; whether XLA fuses a multiplication and an addition is up to XLA, so a weighted combine
may differ from the other backends in the last bit of the float32 accumulator.
"""

import functools
from typing import Any

import jax

from jax_ep._src import compat
from jax_ep._src.backends.operands import DispatchResults, Rows
from jax_ep._src.backends.plan import Counts, Plan
from jax_ep._src.backends.tangents import named
from jax_ep._src.backends.xla import (
    differentiation,
    primitives,
)
from jax_ep._src.backends.xla import plan as plans
from jax_ep._src.backends.xla.primitives import CombineOperands, ExchangeOperands, exchange
from jax_ep._src.quantized import QuantizedRows
from jax_ep._src.spec import OpSpec


def _varying(spec: OpSpec, operands: Any) -> Any:
    """The operands, all varying over the group's axes, and over others if one of them does."""
    leaves, tree = jax.tree.flatten(operands)
    axes = compat.varying_axes(jax.lax.axis_index(spec.axis_names), *leaves)
    return jax.tree.unflatten(tree, compat.as_varying(axes, *leaves))


@functools.partial(jax.jit, static_argnums=0)
def plan(spec: OpSpec, topk_idx: jax.Array) -> tuple[Plan, Counts]:
    """Gathers the routing of all ranks; every rank works out all rows."""
    made, counts = plans.plan(spec, _varying(spec, topk_idx))
    return made._replace(topk_idx=topk_idx), counts


@functools.partial(jax.jit, static_argnums=0)
def dispatch(spec: OpSpec, x: Rows, token_scalars: jax.Array | None, plan: Plan) -> DispatchResults:
    """Gathers all ranks' rows and keeps those of this rank."""
    values, scales = (x.values, x.scales) if isinstance(x, QuantizedRows) else (x, None)
    operands = _varying(spec, ExchangeOperands(values, scales, token_scalars, plan))
    return DispatchResults(*exchange(spec, operands, is_dispatch=True))


def plan_dispatch(
    spec: OpSpec,
    x: Rows,
    topk_idx: jax.Array,
    token_scalars: jax.Array | None,
    rank_mask: jax.Array | None,
) -> tuple[Plan, Counts, DispatchResults]:
    """Both, one after the other. The collectives are of all ranks, whatever the mask."""
    made, counts = plan(spec, topk_idx)
    made = named(made)  # by which gradients travel, too
    received = dispatch(spec, x, token_scalars, made)
    return made._replace(rank_mask=rank_mask), counts, received


@functools.partial(jax.jit, static_argnums=0)
def dispatch_tangents(
    spec: OpSpec, x: jax.Array | None, token_scalars: jax.Array | None, plan: Plan
) -> tuple[jax.Array | None, jax.Array | None]:
    """Sends those of both that there are as gradients travel: in `dtype`."""
    x, token_scalars, plan = _varying(spec, (x, token_scalars, plan))
    rows, _, row_scalars = differentiation.linear(spec, x, token_scalars, plan, is_dispatch=True)
    return rows, row_scalars


@functools.partial(jax.jit, static_argnums=0)
def combine(
    spec: OpSpec, y: jax.Array, weights: jax.Array | None, plan: Plan
) -> tuple[jax.Array, None]:
    """Sums rows by (token, rank), returns the sums to the tokens' ranks and sums them on those.

    Nobody is missing.
    """
    if weights is not None:
        return primitives.combine(spec, _varying(spec, CombineOperands(y, weights, plan))), None
    operands = _varying(spec, ExchangeOperands(y, None, None, plan))
    out = exchange(spec, operands, is_dispatch=False).rows
    assert out is not None
    return out, None
