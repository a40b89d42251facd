# SPDX-License-Identifier: Apache-2.0
"""Causal self-attention with rotary positions; the same for both flavors of Flax."""

import jax
import jax.numpy as jnp


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
    batch, seq_len, hidden = q.shape
    q, k, v = (a.reshape(batch, seq_len, num_heads, hidden // num_heads) for a in (q, k, v))
    out = jax.nn.dot_product_attention(_rotate(q), _rotate(k), v, is_causal=True)
    return out.reshape(batch, seq_len, hidden)


def _rotate(x: jax.Array) -> jax.Array:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864) of `[B, S, heads, D]`."""
    half = x.shape[-1] // 2
    frequency = 10000.0 ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None] * frequency[None, :]
    cos, sin = jnp.cos(angle)[None, :, None, :], jnp.sin(angle)[None, :, None, :]
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
