# SPDX-License-Identifier: Apache-2.0
"""Backend `xla`: the same operations from collectives of `jax.lax` alone.

It runs wherever JAX runs, over any number of processes, and is the fallback and a baseline; it is
not fast: rows are gathered from all ranks. Sums are taken in the defined order with the defined
roundings; whether XLA fuses a multiplication and an addition is up to XLA, so a weighted combine
may differ from the other backends in the last bit of the float32 accumulator.
"""

import functools

import jax

from jax_ep._src import compat
from jax_ep._src.backends.plan import Plan
from jax_ep._src.backends.xla import differentiation  # noqa: F401  its rules
from jax_ep._src.backends.xla import plan as plans
from jax_ep._src.backends.xla.primitives import combine_p, exchange_p
from jax_ep._src.spec import OpSpec
from jax_ep._src.types import DispatchHandle


@functools.partial(jax.jit, static_argnums=0)
def plan(spec: OpSpec, topk_idx: jax.Array) -> Plan:
    """Gathers the routing of all ranks; every rank works out all rows."""
    return plans.plan(spec, *_varying(spec, topk_idx))


@functools.partial(jax.jit, static_argnums=0)
def dispatch(
    spec: OpSpec, x: jax.Array, token_scalars: jax.Array | None, handle: DispatchHandle
) -> tuple[jax.Array, jax.Array | None]:
    """Gathers all ranks' rows and keeps those that come here."""
    rows, row_scalars = _exchange(spec, x, token_scalars, handle, there=True)
    assert rows is not None
    return rows, row_scalars


@functools.partial(jax.jit, static_argnums=0)
def combine(
    spec: OpSpec, y: jax.Array, weights: jax.Array | None, handle: DispatchHandle
) -> jax.Array:
    """Sums rows by (token, rank), returns the sums to the tokens' ranks and sums them there."""
    if weights is None:
        out, _ = _exchange(spec, y, None, handle, there=False)
        assert out is not None
        return out
    leaves, tree = jax.tree.flatten(handle)
    (out,) = combine_p.bind(*_varying(spec, y, weights, *leaves), spec=spec, tree=tree)
    return out


def _exchange(
    spec: OpSpec,
    rows: jax.Array | None,
    scalars: jax.Array | None,
    handle: DispatchHandle,
    *,
    there: bool,
) -> tuple[jax.Array | None, jax.Array | None]:
    """Rows and scalars from tokens to received rows (`there`), or back to be summed."""
    leaves, tree = jax.tree.flatten(handle)
    given = [a for a in (rows, scalars) if a is not None]
    has = rows is not None, scalars is not None
    operands = _varying(spec, *given, *leaves)
    outs = iter(exchange_p.bind(*operands, spec=spec, tree=tree, has=has, there=there))
    return next(outs) if has[0] else None, next(outs) if has[1] else None


def _varying(spec: OpSpec, *operands: jax.Array) -> tuple[jax.Array, ...]:
    rank = jax.lax.axis_index(spec.axis_names)
    return compat.as_varying(compat.varying_axes(rank, *operands), *operands)
