# SPDX-License-Identifier: Apache-2.0
"""Text that the model writes."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from moe_lm.build import Flavor

TEMPERATURE = 0.7


def sample(
    model: Flavor, params: Any, prompt: bytes, *, num_bytes: int, seq_len: int, seed: int
) -> str:
    """The prompt and `num_bytes` bytes that follow it; what no terminal should get is replaced.

    Every byte takes a pass over the last `seq_len` bytes: simple, and fast enough for a sample.
    """
    text = jnp.zeros((len(prompt) + num_bytes,), jnp.int32)
    text = text.at[: len(prompt)].set(jnp.array(list(prompt), jnp.int32))
    # The window never reaches past the end of the text.
    window = min(seq_len, text.size)
    write = jax.jit(functools.partial(_write, model, num_bytes=num_bytes, window=window))
    text = write(params, text, jax.random.key(seed))
    written = bytes(jax.device_get(text).astype("uint8")).decode(errors="replace")
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in written)


def _write(
    model: Flavor, params: Any, text: jax.Array, key: jax.Array, *, num_bytes: int, window: int
) -> jax.Array:
    def write_one(end: jax.Array, text: jax.Array) -> jax.Array:
        start = jnp.maximum(end - window, 0)
        context = jax.lax.dynamic_slice(text, (start,), (window,))
        # Attention is causal: what is after the last byte does not matter.
        logits, _ = model.apply(params, context[None, :])
        logits = logits[0, end - start - 1] / TEMPERATURE
        return text.at[end].set(jax.random.categorical(jax.random.fold_in(key, end), logits))

    return jax.lax.fori_loop(text.size - num_bytes, text.size, write_one, text)
