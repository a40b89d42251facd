# SPDX-License-Identifier: Apache-2.0
"""Causal self-attention with rotary positions; the same for both flavors of Flax."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

Attend = Callable[[jax.Array, jax.Array, jax.Array, int], jax.Array]


def attend(q: jax.Array, k: jax.Array, v: jax.Array, num_heads: int) -> jax.Array:
    """Every position's mix of the values up to and including its own.

    Args:
        q: `[B, S, H]`.
        k: `[B, S, H]`.
        v: `[B, S, H]`.
        num_heads: divides `H`.

    Returns:
        `[B, S, H]`.
    """
    positions = jnp.arange(q.shape[1])
    q, k, v = (_split(a, num_heads) for a in (q, k, v))
    out = jax.nn.dot_product_attention(
        rotate(q, positions), rotate(k, positions), v, is_causal=True
    )
    return out.reshape(*out.shape[:2], -1)


class KvCache(NamedTuple):
    """What one layer remembers of `N` positions.

    Attributes:
        keys: `[B, N, heads, D]`, rotated.
        values: `[B, N, heads, D]`.
    """

    keys: jax.Array
    values: jax.Array

    @classmethod
    def empty(cls, batch: int, length: int, num_heads: int, hidden: int) -> "KvCache":
        """Of no position yet."""
        shape = (batch, length, num_heads, hidden // num_heads)
        return cls(jnp.zeros(shape), jnp.zeros(shape))


class Memory:
    """One layer's cache while the model runs: `attend` reads it, and adds what comes."""

    def __init__(self, cache: KvCache, start: jax.Array, window: int) -> None:
        """Positions from `start` on are new. Each sees the last `window`, its own included."""
        self.cache = cache
        self._start = start
        self._window = window

    def attend(self, q: jax.Array, k: jax.Array, v: jax.Array, num_heads: int) -> jax.Array:
        """As `attend`, where what came before is in the cache."""
        positions = self._start + jnp.arange(q.shape[1])
        q, k, v = (_split(a, num_heads) for a in (q, k, v))
        at = (0, self._start, 0, 0)
        self.cache = KvCache(
            jax.lax.dynamic_update_slice(self.cache.keys, rotate(k, positions), at),
            jax.lax.dynamic_update_slice(self.cache.values, v, at),
        )
        seen = jnp.arange(self.cache.keys.shape[1])[None, :]
        last = positions[:, None]
        mask = (seen <= last) & (seen > last - self._window)
        out = jax.nn.dot_product_attention(rotate(q, positions), *self.cache, mask=mask[None, None])
        return out.reshape(*out.shape[:2], -1)


def _split(a: jax.Array, num_heads: int) -> jax.Array:
    batch, seq_len, hidden = a.shape
    return a.reshape(batch, seq_len, num_heads, hidden // num_heads)


def rotate(x: jax.Array, positions: jax.Array) -> jax.Array:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864).

    Args:
        x: `[B, S, heads, D]`.
        positions: `[S]`, or `[B, S]` where rows are at positions of their own.
    """
    half = x.shape[-1] // 2
    frequency = 10000.0 ** (-jnp.arange(half, dtype=jnp.float32) / half)
    positions = jnp.atleast_2d(positions).astype(jnp.float32)
    angle = positions[:, :, None, None] * frequency[None, None, None, :]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
