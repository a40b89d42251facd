# SPDX-License-Identifier: Apache-2.0
"""Scores of experts from a router's logits, and a token's scores as parts of a whole."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

# A function has `[T, E]` float32 logits, and gives as many float32 scores; see `route`.
Score = Literal["softmax", "sigmoid"] | Callable[[jax.Array], jax.Array]

# Below it float32 may be flushed to 0.
LEAST_NORMAL = float(np.finfo(np.float32).tiny)


def as_logits(logits: ArrayLike) -> jax.Array:
    """Logits in float32; raises unless they are `[T, E]`."""
    logits = jnp.asarray(logits)
    if logits.ndim != 2 or not logits.shape[1] or not jnp.issubdtype(logits.dtype, jnp.floating):
        raise ValueError(f"logits is {show(logits)}; allowed: [T, E], floating point, E at least 1")
    return logits.astype(jnp.float32)


def show(array: Any) -> str:
    """For messages."""
    return f"{array.dtype} of shape {array.shape}"


def is_masked(logits: jax.Array) -> jax.Array:
    """`[T]` bool: whether a token may go to no expert."""
    return jnp.isneginf(logits).all(axis=-1)


def scores_of(logits: jax.Array, score: Score) -> jax.Array:
    """`[T, E]`: scores of all experts, 0 for a token that may go to none."""
    if score == "softmax":
        masked = is_masked(logits)[:, None]
        scores = jax.nn.softmax(jnp.where(masked, 0.0, logits), axis=-1)
        return jnp.where(masked, 0.0, scores)
    if score == "sigmoid":
        return jax.nn.sigmoid(logits)
    return _scores_by(_as_function(score), logits)


def shares_of(logits: jax.Array, score: Score) -> jax.Array:
    """`[T, E]`: scores over the sum of the token's, which is 1 then, or 0 if all of them are."""
    if score == "softmax":
        return jax.nn.softmax(logits, axis=-1)
    if score == "sigmoid":
        # Over their sum, without a sum that can be 0.
        return jax.nn.softmax(jax.nn.log_sigmoid(logits), axis=-1)
    return normalized(_scores_by(_as_function(score), logits), 0.0)


def normalized(weights: jax.Array, epsilon: float) -> jax.Array:
    """`weights / (their sum + epsilon)`, token by token; 0 where that would be 0 / 0.

    In units of a token's largest weight: the derivative of a division squares the divisor, and
    the square of a sum below 1e-19 is 0 in float32.

    Args:
        weights: `[T, K]`, at least 0.
        epsilon: 0, or at least `LEAST_NORMAL`.
    """
    unit = jax.lax.stop_gradient(weights.max(axis=-1, keepdims=True)) + epsilon
    if epsilon:
        weights = weights / unit
        return weights / (weights.sum(axis=-1, keepdims=True) + epsilon / unit)
    is_zero = unit < LEAST_NORMAL
    weights = weights / jnp.where(is_zero, 1.0, unit)
    return weights / jnp.where(is_zero, 1.0, weights.sum(axis=-1, keepdims=True))


def _as_function(score: Any) -> Callable[[jax.Array], jax.Array]:
    if not callable(score):
        raise ValueError(
            f"score is {score!r}; allowed: 'softmax', 'sigmoid', or a function of [T, E] float32 "
            "logits to [T, E] float32 scores"
        )
    return score


def _scores_by(function: Callable[[jax.Array], jax.Array], logits: jax.Array) -> jax.Array:
    """A user's function of the logits, which has no gradient where a score is 0.

    That is its least value, so its derivative is 0 there, but may be computed as 0 times infinity:
    `sqrt(softplus(-200))` is 0 in float32, and the derivative of `sqrt` at 0 is infinite.
    """
    given = jax.lax.stop_gradient(logits)
    _check_scores(jax.eval_shape(function, given), logits)
    is_zero = jnp.isneginf(logits) | (function(given) == 0)
    scores = function(jnp.where(is_zero, given, logits))
    return jnp.where(is_zero, 0.0, scores)


def _check_scores(scores: Any, logits: jax.Array) -> None:
    is_array = isinstance(scores, jax.ShapeDtypeStruct)
    if not is_array or scores.shape != logits.shape or scores.dtype != logits.dtype:
        came = show(scores) if is_array else f"a {type(scores).__name__}"
        raise ValueError(f"score is a function that gives {came}; allowed: {show(logits)}")
