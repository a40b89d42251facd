# SPDX-License-Identifier: Apache-2.0
"""JAX primitives over the programs of `exchange.py`: shapes, lowering, batching."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from jax_ep._src import compat
from jax_ep._src.backends.xla.exchange import (
    combine_rows,
    gather,
    row_scalars,
    rows_there,
    token_scalars,
)
from jax_ep._src.batching import one_by_one
from jax_ep._src.spec import OpSpec
from jax_ep._src.types import DispatchHandle

# Primitives of their own, lowered to collectives: a rule of `custom_vjp` has no forward mode, and
# under `vmap(spmd_axis_name=...)` JAX refuses what it returns. Operands that do not take part are
# left out, see `differentiation.py`.
exchange_p = Primitive("jax_ep_xla_exchange")  # linear: rows, scalars or both, there or back
combine_p = Primitive("jax_ep_xla_combine")  # with weights
for _primitive in (exchange_p, combine_p):
    _primitive.multiple_results = True


# --- programs -----------------------------------------------------------------------------------


def _exchange_program(
    *operands: jax.Array, spec: OpSpec, tree: Any, has: tuple[bool, bool], there: bool
) -> list[jax.Array]:
    handle: DispatchHandle = jax.tree.unflatten(tree, operands[sum(has) :])
    rows = operands[0] if has[0] else None
    scalars = operands[sum(has) - 1] if has[1] else None
    outs = []
    if rows is not None and there:
        outs.append(rows_there(spec, rows, handle))
    elif rows is not None:
        outs.append(combine_rows(spec, rows, None, handle))
    if scalars is not None and there:
        outs.append(row_scalars(spec, gather(spec, scalars), handle))
    elif scalars is not None:
        outs.append(token_scalars(spec, scalars, handle))
    # Without tokens nothing that varies went into them.
    return list(compat.as_varying(compat.varying_axes(handle.row_source), *outs))


def _combine_program(*operands: jax.Array, spec: OpSpec, tree: Any) -> list[jax.Array]:
    y, weights, *leaves = operands
    handle: DispatchHandle = jax.tree.unflatten(tree, leaves)
    return [combine_rows(spec, y, weights, handle)]


# --- shapes -------------------------------------------------------------------------------------


def _exchange_abstract(
    *avals: Any, spec: OpSpec, tree: Any, has: tuple[bool, bool], there: bool
) -> list[Any]:
    handle: DispatchHandle = jax.tree.unflatten(tree, avals[sum(has) :])
    tokens, num_topk = handle.topk_idx.shape
    outs = []
    if has[0]:
        count = spec.recv_capacity if there else tokens
        outs.append(compat.like(avals[0], (count, avals[0].shape[1]), avals[0].dtype))
    if has[1]:
        shape = spec.row_scalars_shape if there else (tokens, num_topk)
        outs.append(compat.like(avals[0], shape, jnp.float32.dtype))
    return outs


def _combine_abstract(y: Any, weights: Any, *leaves: Any, spec: OpSpec, tree: Any) -> list[Any]:
    del weights, spec
    handle: DispatchHandle = jax.tree.unflatten(tree, leaves)
    return [compat.like(y, (handle.topk_idx.shape[0], y.shape[1]), y.dtype)]


exchange_p.def_abstract_eval(_exchange_abstract)
combine_p.def_abstract_eval(_combine_abstract)
for _primitive, _program in ((exchange_p, _exchange_program), (combine_p, _combine_program)):
    _primitive.def_impl(_program)
    mlir.register_lowering(_primitive, mlir.lower_fun(_program, multiple_results=True))
    batching.primitive_batchers[_primitive] = functools.partial(one_by_one, _primitive)
