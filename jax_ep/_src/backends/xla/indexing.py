# SPDX-License-Identifier: Apache-2.0
"""Gathers and scatters by row indices of which -1 is none."""

import jax
import jax.numpy as jnp

from jax_ep._src.spec import OpSpec


def or_past_end(spec: OpSpec, slot: jax.Array) -> jax.Array:
    """Slots as scatter indices: no slot is past the end, where `mode="drop"` drops it."""
    return jnp.where(slot >= 0, slot, spec.recv_capacity)


def take_rows(source: jax.Array, index: jax.Array, fill: float) -> jax.Array:
    """`source[index]`, or `fill` where the index is negative."""
    if source.shape[0] == 0:
        source = jnp.full((1, *source.shape[1:]), fill, source.dtype)
    rows = jnp.take(source, jnp.maximum(index, 0), axis=0)
    is_valid = (index >= 0).reshape((-1,) + (1,) * (source.ndim - 1))
    return jnp.where(is_valid, rows, jnp.asarray(fill, source.dtype))
