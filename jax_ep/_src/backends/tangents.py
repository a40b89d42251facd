# SPDX-License-Identifier: Apache-2.0
"""What the rules of differentiation of both backends share."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import ad


def nonzero(tangent: Any) -> Any:
    """A tangent or cotangent; None if it is zero or of something absent."""
    return None if type(tangent) is ad.Zero else tangent


def present(values: Sequence[Any]) -> bool:
    """Whether one of the values is not absent."""
    return any(value is not None for value in values)


def refuse_quantized(dots: Sequence[Any], *, quantized: bool) -> None:
    """Raises where rows that are quantized outside of the exchange are differentiated."""
    if quantized and present([nonzero(dot) for dot in dots]):
        raise ValueError(
            "dispatch is differentiated in x, and rows that go in or come out in FP8 have no "
            "gradient; allowed: jax_ep.moe with EpConfig.recv_dtype float8_e4m3fn and an x that is "
            "not quantized, or jax.lax.stop_gradient around x"
        )


def tangents_of(results: Sequence[Any], dots: Sequence[Any]) -> list[Any]:
    """The tangents of the results that are there; zero where `dots` has none."""
    return [
        ad.Zero(jax.typeof(result).to_tangent_aval()) if dot is None else dot
        for result, dot in zip(results, dots, strict=True)
        if result is not None
    ]


def cotangents_of(tree: Any, operands: Sequence[Any], bars: Any) -> list[Any]:
    """Of flat operands with this tree, the cotangents that `bars` has for the linear ones."""
    flat = tree.flatten_up_to(bars)
    return [
        bar if ad.is_undefined_primal(operand) else None
        for operand, bar in zip(operands, flat, strict=True)
    ]


def _where_valid(index: jax.Array, values: jax.Array) -> jax.Array:
    """`values` where `index` is one, 0 where it is negative. No `jnp.where`: that is a call.

    XLA of jaxlib 0.11.2 does not compile a call inside a computation that `compute_on` has put on
    another stream.
    """
    return jax.lax.select(index >= 0, values, jnp.zeros_like(values))


def row_weights(
    weights: jax.Array, row_source: jax.Array, row_topk_idx: jax.Array | None
) -> jax.Array:
    """`[C, 1]` float32: the factor of each row in a weighted combine; 0 for rows without token."""
    if row_topk_idx is not None:
        weights = jnp.sum(_where_valid(row_topk_idx, weights), axis=1)
    return _where_valid(row_source, weights)[:, None]


# Rematerialized, so that the backward keeps the rows in their own dtype and not in float32. What
# goes in and comes out is in that dtype too, the cotangent included: XLA makes arrays of all that
# crosses the border of what is rematerialized.
@jax.checkpoint
def weighted_rows_tangent(
    y: jax.Array,
    weights: jax.Array,
    y_dot: jax.Array | None,
    weights_dot: jax.Array | None,
    row_source: jax.Array,
    row_topk_idx: jax.Array | None,
) -> jax.Array:
    """The tangent of `row_weights(weights) * y`; y counts as 0 in rows without a token."""
    terms = []
    if y_dot is not None:
        factor = row_weights(weights, row_source, row_topk_idx)
        terms.append(factor * y_dot.astype(jnp.float32))
    if weights_dot is not None:
        factor = row_weights(weights_dot, row_source, row_topk_idx)
        # Rows without a token may hold NaN.
        valid_rows = _where_valid(jnp.broadcast_to(row_source[:, None], y.shape), y)
        terms.append(factor * valid_rows.astype(jnp.float32))
    return sum(terms[1:], terms[0]).astype(y.dtype)
