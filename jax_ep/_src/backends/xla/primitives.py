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
from jax_ep._src.backends.plan import Plan
from jax_ep._src.backends.xla.exchange import (
    combine_rows,
    combine_scalars,
    dispatch_rows,
    dispatch_scalars,
    gather,
)
from jax_ep._src.batching import one_by_one
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
    scalars: jax.Array | None
    plan: Plan


class ExchangeResults(NamedTuple):
    """Those of received rows, or of tokens."""

    rows: jax.Array | None
    scalars: jax.Array | None


class CombineOperands(NamedTuple):
    """Received rows and their factors."""

    y: jax.Array
    weights: jax.Array
    plan: Plan


def exchange(spec: OpSpec, operands: ExchangeOperands, *, is_dispatch: bool) -> ExchangeResults:
    """Rows and scalars from tokens to received rows (`is_dispatch`), or back to be summed."""
    leaves, tree = jax.tree.flatten(operands)
    results = exchange_p.bind(*leaves, tree=tree, spec=spec, is_dispatch=is_dispatch)
    given = jax.tree.structure(ExchangeResults(operands.rows, operands.scalars))
    return jax.tree.unflatten(given, results)


def combine(spec: OpSpec, operands: CombineOperands) -> jax.Array:
    """Sums of the weighted rows, `[T, H]`."""
    leaves, tree = jax.tree.flatten(operands)
    (out,) = combine_p.bind(*leaves, tree=tree, spec=spec)
    return out


# --- programs ----------------------------------------------------------------------------------


def _exchange_program(
    *operands: jax.Array, tree: Any, spec: OpSpec, is_dispatch: bool
) -> list[jax.Array]:
    rows, scalars, plan = jax.tree.unflatten(tree, operands)
    outs = []
    if rows is not None:
        outs.append(
            dispatch_rows(spec, rows, plan) if is_dispatch else combine_rows(spec, rows, None, plan)
        )
    if scalars is not None and is_dispatch:
        outs.append(dispatch_scalars(spec, gather(spec, scalars), plan))
    elif scalars is not None:
        outs.append(combine_scalars(spec, scalars, plan))
    # Without tokens nothing that varies went into them.
    return list(compat.as_varying(compat.varying_axes(plan.row_source), *outs))


def _combine_program(*operands: jax.Array, tree: Any, spec: OpSpec) -> list[jax.Array]:
    y, weights, plan = jax.tree.unflatten(tree, operands)
    return [combine_rows(spec, y, weights, plan)]


# --- shapes ------------------------------------------------------------------------------------


def _exchange_abstract(*avals: Any, tree: Any, spec: OpSpec, is_dispatch: bool) -> list[Any]:
    rows, scalars, plan = jax.tree.unflatten(tree, avals)
    num_tokens, num_topk = plan.slot.shape
    outs = []
    if rows is not None:
        num_rows = spec.recv_capacity if is_dispatch else num_tokens
        outs.append(compat.like(rows, (num_rows, rows.shape[1]), rows.dtype))
    if scalars is not None:
        shape = spec.row_scalars_shape if is_dispatch else (num_tokens, num_topk)
        outs.append(compat.like(scalars, shape, jnp.float32.dtype))
    return outs


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
