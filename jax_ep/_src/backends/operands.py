# SPDX-License-Identifier: Apache-2.0
"""Operands of the primitives: which of them are absent, and the factors of a weighted combine."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_FLOAT32 = np.dtype(np.float32)


def is_absent(array: Any) -> bool:
    """Whether an optional operand or result does not take part."""
    return tuple(array.shape) == (0,)


# What is absent is cut out of an operand that is not: a constant, and whatever a tangent's linear
# function has from outside, becomes a residual of an enclosing `shard_map`, and in a loop jaxlib
# 0.11.2 crashes on residuals of size 0 (Shardy's ManualComputationUnusedInputsPattern).


def no_rows(like: jax.Array, dtype: np.dtype) -> jax.Array:
    """Rows that do not take part, as many as `like` has and varying over the same axes."""
    flat = like[:, None] if like.ndim == 1 else like
    return flat[:, :0].astype(dtype)


def absent_scalars(like: jax.Array, dtype: np.dtype = _FLOAT32) -> jax.Array:
    """An operand that does not take part, varying over the same axes as `like`."""
    return jax.lax.slice_in_dim(like.reshape(-1), 0, 0).astype(dtype)


def _where_held(index: jax.Array, values: jax.Array) -> jax.Array:
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
        weights = jnp.sum(_where_held(row_topk_idx, weights), axis=1)
    return _where_held(row_source, weights)[:, None]


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
        held = _where_held(jnp.broadcast_to(row_source[:, None], y.shape), y)
        terms.append(factor * held.astype(jnp.float32))
    return sum(terms[1:], terms[0]).astype(y.dtype)
