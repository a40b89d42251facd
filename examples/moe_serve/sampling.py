# SPDX-License-Identifier: Apache-2.0
"""Which byte comes next: the likeliest, or one that is drawn.

What is drawn depends on the seed of a request and on the position, not on the other requests of a
step, nor on how many there are.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Sampling(NamedTuple):
    """How each row of a step is sampled, `[D, rows]` each.

    Attributes:
        temperature: float32; 0: always the likeliest byte.
        top_k: int32; of the likeliest so many. 0: of all.
        top_p: float32; of the fewest likeliest bytes that have this probability together. 1: of
            all.
        seed: int32.
    """

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    seed: jax.Array


def sample(
    logits: jax.Array, position: jax.Array, sampling: Sampling
) -> tuple[jax.Array, jax.Array]:
    """Chooses a byte for each row.

    Args:
        logits: `[D, rows, 256]` float32.
        position: `[D, rows]` int32, where the byte is to stand.
        sampling: `[D, rows]` each.

    Returns:
        The bytes, `[D, rows]` int32, and the logarithm of the probability that the model gives
        each, at temperature 1 and among all bytes, `[D, rows]` float32.
    """
    return jax.vmap(jax.vmap(_sample))(logits, position, sampling)


def _sample(
    logits: jax.Array, position: jax.Array, sampling: Sampling
) -> tuple[jax.Array, jax.Array]:
    """One row's: `[256]`, and scalars."""
    greedy = jnp.argmax(logits)
    is_drawn = sampling.temperature > 0
    scaled = logits / jnp.where(is_drawn, sampling.temperature, 1.0)
    key = jax.random.fold_in(jax.random.key(sampling.seed), position)
    drawn = jax.random.categorical(key, _likeliest(scaled, sampling.top_k, sampling.top_p))
    token = jnp.where(is_drawn, drawn, greedy).astype(jnp.int32)
    return token, jax.nn.log_softmax(logits)[token]


def _likeliest(logits: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """Minus infinity for what is not to be drawn; of equally likely bytes, all stay."""
    falling = jnp.sort(logits, descending=True)
    number = jnp.arange(logits.size)
    before = jnp.cumsum(jax.nn.softmax(falling)) - jax.nn.softmax(falling)
    # The likeliest byte always stays: nothing is before it.
    stays = ((top_k == 0) | (number < top_k)) & ((top_p >= 1) | (before < top_p) | (number == 0))
    least = jnp.min(jnp.where(stays, falling, jnp.inf))
    return jnp.where(logits >= least, logits, -jnp.inf)
