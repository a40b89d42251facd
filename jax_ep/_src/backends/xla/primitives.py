# SPDX-License-Identifier: Apache-2.0
"""JAX primitives over what `exchange.py` computes: shapes, lowering, batching.

Primitives of their own, lowered to collectives: a rule of `custom_vjp` has no forward mode, and
under `vmap(spmd_axis_name=...)` JAX refuses what it returns. Operands and results that do not take
part are None, as in `backends/operands.py`.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from jax_ep._src import compat
from jax_ep._src.backends.plan import Plan, Value
from jax_ep._src.backends.xla.exchange import (
    combine_rows,
    combine_scalars,
    dispatch_rows,
    dispatch_scalars,
    gather,
)
from jax_ep._src.batching import one_by_one
from jax_ep._src.quantized import num_scales
from jax_ep._src.spec import OpSpec

# Linear: rows, scalars or both, of a dispatch or of an unweighted combine.
exchange_p = Primitive("jax_ep_xla_exchange")
# With weights.
combine_p = Primitive("jax_ep_xla_combine")
for _primitive in (exchange_p, combine_p):
    _primitive.multiple_results = True


class ExchangeOperands(NamedTuple):
    """Rows and scalars of tokens, or of received rows on their way back."""

    rows: jax.Array | None
    scales: jax.Array | None  # of rows that are quantized before they travel
    scalars: jax.Array | None
    plan: Plan


class ExchangeResults(NamedTuple):
    """Those of received rows, or of tokens."""

    rows: Value | None
    scales: Value | None  # of rows that are received quantized
    scalars: Value | None


class CombineOperands(NamedTuple):
    """Received rows and their factors."""

    y: jax.Array
    weights: jax.Array
    plan: Plan


def exchange(spec: OpSpec, operands: ExchangeOperands, *, is_dispatch: bool) -> ExchangeResults:
    """Rows and scalars from tokens to received rows (`is_dispatch`), or back to be summed."""
    leaves, tree = jax.tree.flatten(operands)
    results = exchange_p.bind(*leaves, tree=tree, spec=spec, is_dispatch=is_dispatch)
    given = exchange_results(spec, operands, is_dispatch=is_dispatch)
    return jax.tree.unflatten(jax.tree.structure(given), results)


def exchange_results(
    spec: OpSpec, operands: ExchangeOperands, *, is_dispatch: bool
) -> ExchangeResults:
    """The shapes of what an exchange gives."""
    rows, _, scalars, plan = operands
    num_tokens, num_topk = plan.slot.shape
    results = ExchangeResults(None, None, None)
    if rows is not None:
        shape = (spec.recv_capacity if is_dispatch else num_tokens, rows.shape[1])
        dtype = spec.dtype
        if is_dispatch and spec.fp8_rows:
            dtype = jnp.float8_e4m3fn
            scales = jax.ShapeDtypeStruct((shape[0], num_scales(shape[1])), jnp.float32)
            results = results._replace(scales=scales)
        results = results._replace(rows=jax.ShapeDtypeStruct(shape, dtype))
    if scalars is not None:
        shape = spec.row_scalars_shape if is_dispatch else (num_tokens, num_topk)
        results = results._replace(scalars=jax.ShapeDtypeStruct(shape, jnp.float32))
    return results


def combine(spec: OpSpec, operands: CombineOperands) -> jax.Array:
    """Sums of the weighted rows, `[T, H]`."""
    leaves, tree = jax.tree.flatten(operands)
    (out,) = combine_p.bind(*leaves, tree=tree, spec=spec)
    return out


# --- programs ----------------------------------------------------------------------------------


def _exchange_program(
    *operands: jax.Array, tree: Any, spec: OpSpec, is_dispatch: bool
) -> list[jax.Array]:
    rows, scales, scalars, plan = jax.tree.unflatten(tree, operands)
    outs = ExchangeResults(None, None, None)
    if rows is not None and is_dispatch:
        received, received_scales = dispatch_rows(spec, rows, scales, plan)
        outs = outs._replace(rows=received, scales=received_scales)
    elif rows is not None:
        outs = outs._replace(rows=combine_rows(spec, rows, None, plan))
    if scalars is not None and is_dispatch:
        outs = outs._replace(scalars=dispatch_scalars(spec, gather(spec, scalars), plan))
    elif scalars is not None:
        outs = outs._replace(scalars=combine_scalars(spec, scalars, plan))
    # Without tokens nothing that varies went into them.
    axes = compat.varying_axes(plan.row_source)
    return list(compat.as_varying(axes, *jax.tree.leaves(outs)))


def _combine_program(*operands: jax.Array, tree: Any, spec: OpSpec) -> list[jax.Array]:
    y, weights, plan = jax.tree.unflatten(tree, operands)
    return [combine_rows(spec, y, weights, plan)]


# --- shapes ------------------------------------------------------------------------------------


def _exchange_abstract(*avals: Any, tree: Any, spec: OpSpec, is_dispatch: bool) -> list[Any]:
    results = exchange_results(spec, jax.tree.unflatten(tree, avals), is_dispatch=is_dispatch)
    # All operands vary over the same axes.
    return [compat.like(avals[0], r.shape, r.dtype) for r in jax.tree.leaves(results)]


def _combine_abstract(*avals: Any, tree: Any, spec: OpSpec) -> list[Any]:
    del spec
    y, _, plan = jax.tree.unflatten(tree, avals)
    return [compat.like(y, (plan.slot.shape[0], y.shape[1]), y.dtype)]


exchange_p.def_abstract_eval(_exchange_abstract)
combine_p.def_abstract_eval(_combine_abstract)
for _primitive, _program in ((exchange_p, _exchange_program), (combine_p, _combine_program)):
    _primitive.def_impl(_program)
    mlir.register_lowering(_primitive, mlir.lower_fun(_program, multiple_results=True))
    batching.primitive_batchers[_primitive] = functools.partial(one_by_one, _primitive)
