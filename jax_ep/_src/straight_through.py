# SPDX-License-Identifier: Apache-2.0
"""The gradient of rows that are received in FP8: straight through, in the rows' own dtype.

That of rows which only travel in FP8 is in `backends/tangents.py`, by the same rule: the derivative
of rounding is taken to be 1.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax

from jax_ep._src import compat
from jax_ep._src.api import backend_of, checked_tokens
from jax_ep._src.backends.plan import Plan
from jax_ep._src.groups.group import EpGroup
from jax_ep._src.quantized import QuantizedRows, dequantize_rows
from jax_ep._src.spec import OpSpec
from jax_ep._src.types import Dispatched

# What is sent, `x` and `topk_weights`, and what of it arrives.
Sent = tuple[jax.Array | None, jax.Array]
Received = tuple[QuantizedRows, jax.Array]


def dispatch_in_fp8(
    exchange: Callable[..., Dispatched],
    x: jax.Array | QuantizedRows,
    topk_idx: jax.Array,
    topk_weights: jax.Array,
    group: EpGroup,
) -> tuple[Dispatched, Sent]:
    """A dispatch with `recv_dtype`, cut off from gradients, and what `restore` connects again.

    `exchange` makes it: `dispatch`, or its halves and what is between them.
    """
    # Before anything makes JAX's arrays of them.
    x, topk_idx, weights = checked_tokens(x, topk_idx, topk_weights, group=group)
    assert weights is not None
    if isinstance(x, QuantizedRows):  # which `dispatch` refuses to differentiate
        sent = (None, weights)
    else:
        sent = (x, weights)
        x = jax.lax.stop_gradient(x)
    return exchange(x, topk_idx, jax.lax.stop_gradient(weights), group=group), sent


def restore(recv: Dispatched, sent: Sent, group: EpGroup) -> tuple[jax.Array, jax.Array]:
    """The received rows in `config.dtype`, and their weights, with their gradients.

    Differentiated, the rows are what an exchange in `config.dtype` would have brought, so that
    cotangents travel in it. What it needs for that is the plan: of `sent` the shapes alone, though
    outside of jit JAX holds its arrays, too.
    """
    assert isinstance(recv.x, QuantizedRows)
    assert recv.weights is not None
    leaves, tree = jax.tree.flatten((sent, (recv.x, recv.weights), Plan.of(recv.handle)))
    operands = jax.tree.unflatten(tree, compat.varying_alike(*leaves))
    spec = OpSpec.of(group, num_tokens=recv.handle.topk_idx.shape[0])
    return _restore(group.backend, spec, *operands)


# By a rule for tangents, which transposes to one for cotangents, and can itself be differentiated.
@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _restore(
    backend: str, spec: OpSpec, sent: Sent, received: Received, plan: Plan
) -> tuple[jax.Array, jax.Array]:
    del backend, sent, plan
    rows, weights = received
    return dequantize_rows(rows.values, rows.scales, spec.dtype), weights


def _restore_jvp(backend: str, spec: OpSpec, primals: tuple, tangents: tuple) -> Any:
    out = _restore(backend, spec, *primals)
    zeros = jax.custom_derivatives.zero_from_primal(out, symbolic_zeros=True)
    dots = [None if _is_zero(dot) else dot for dot in tangents[0]]
    arrived = backend_of(backend).dispatch_tangents(spec, *dots, primals[2])
    # An exchange of scalars alone may vary over fewer axes than the rows do.
    return out, tuple(
        zero if dot is None else compat.as_varying(compat.varying_axes(primal), dot)[0]
        for dot, primal, zero in zip(arrived, out, zeros, strict=True)
    )


def _is_zero(tangent: Any) -> bool:
    return tangent is None or isinstance(tangent, jax.custom_derivatives.SymbolicZero)


_restore.defjvp(_restore_jvp, symbolic_zeros=True)
