# SPDX-License-Identifier: Apache-2.0
"""Text that the model writes: the prompt at once, or in chunks, then byte after byte."""

import dataclasses
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_lm.attention import KvCache
from moe_lm.build import Flavor
from moe_lm.options import Options


@dataclasses.dataclass(frozen=True, kw_only=True)
class Written:
    """What the model wrote, and how long it took.

    Attributes:
        text: `[B, num_bytes]` uint8.
        first_s: seconds until the first byte of each sequence was there.
        next_s: seconds of each further one.
    """

    text: np.ndarray
    first_s: float
    next_s: list[float]


class Writer:
    """Prefill and decode through the same layers and parameters.

    The layers' receive buffers follow the tokens of a call, so one group serves both.
    """

    def __init__(self, options: Options, model: Flavor, params: Any) -> None:
        self._options = options
        self._params = params
        # The caches are updated in place.
        self._extend = jax.jit(model.extend, donate_argnums=2)

    def write(
        self,
        prompts: np.ndarray,
        *,
        num_bytes: int,
        temperature: float = 0.0,
        seed: int = 0,
        chunk: int | None = None,
    ) -> Written:
        """Continues each of some prompts.

        Args:
            prompts: `[B, P]` uint8, `P` at least 1.
            num_bytes: how many bytes to write, at least 1.
            temperature: 0: always the likeliest byte; else of the distribution to draw from.
            seed: of what is drawn.
            chunk: bytes of the prompt that the model reads at a time; None: all at once.
        """
        batch, length = prompts.shape
        options = self._options
        caches = [
            KvCache.empty(batch, length + num_bytes, options.heads, options.hidden)
            for _ in range(options.layers)
        ]
        pick = functools.partial(_pick, key=jax.random.key(seed), temperature=temperature)
        tokens = jnp.asarray(prompts, jnp.int32)
        chunk = chunk or length
        begin = time.perf_counter()
        for start in range(0, length, chunk):
            logits, caches = self._extend(
                self._params, tokens[:, start : start + chunk], caches, jnp.int32(start)
            )
        written = [jax.block_until_ready(pick(logits[:, -1], position=length))]
        times = [time.perf_counter() - begin]
        for position in range(length, length + num_bytes - 1):
            begin = time.perf_counter()
            logits, caches = self._extend(
                self._params, written[-1][:, None], caches, jnp.int32(position)
            )
            written.append(jax.block_until_ready(pick(logits[:, -1], position=position + 1)))
            times.append(time.perf_counter() - begin)
        text = np.stack(jax.device_get(written), axis=1).astype(np.uint8)
        return Written(text=text, first_s=times[0], next_s=times[1:])


@functools.partial(jax.jit, static_argnames="temperature")
def _pick(
    logits: jax.Array, *, key: jax.Array, position: jax.Array, temperature: float
) -> jax.Array:
    """The byte at a position of each sequence, from `[B, 256]` logits."""
    if temperature == 0:
        return jnp.argmax(logits, axis=-1)
    return jax.random.categorical(jax.random.fold_in(key, position), logits / temperature)


def printable(text: bytes) -> str:
    """What no terminal should get is replaced."""
    decoded = text.decode(errors="replace")
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in decoded)
