# SPDX-License-Identifier: Apache-2.0
"""The language model in Flax Linen."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jax_ep.flax.linen import STATS, LayerStats, MoE
from moe_lm.attention import Attend, KvCache, Memory, attend
from moe_lm.corpus import VOCABULARY
from moe_lm.options import Options

MakeMoE = Callable[[str], MoE]


class Attention(nn.Module):
    """Causal self-attention."""

    num_heads: int

    @nn.compact
    def __call__(self, x: jax.Array, attend: Attend = attend) -> jax.Array:
        """`[B, S, H]` to `[B, S, H]`."""
        hidden = x.shape[-1]
        q, k, v = jnp.split(nn.Dense(3 * hidden, use_bias=False, name="qkv")(x), 3, axis=-1)
        return nn.Dense(hidden, use_bias=False, name="out")(attend(q, k, v, self.num_heads))


class Block(nn.Module):
    """Attention, then experts, each added to what came in."""

    num_heads: int
    make_moe: MakeMoE

    @nn.compact
    def __call__(self, x: jax.Array, attend: Attend = attend) -> jax.Array:
        """`[B, S, H]` to `[B, S, H]`."""
        attention = Attention(self.num_heads, name="attention")
        x = x + attention(nn.RMSNorm(name="attention_norm")(x), attend)
        return x + self.make_moe("moe")(nn.RMSNorm(name="moe_norm")(x))


class LanguageModel(nn.Module):
    """Bytes `[B, S]` to logits `[B, S, 256]` of the byte that follows each."""

    hidden: int
    num_heads: int
    num_layers: int
    make_moe: MakeMoE

    @nn.compact
    def __call__(self, tokens: jax.Array, attends: Sequence[Attend] | None = None) -> jax.Array:
        """Runs the model and sows the statistics of its MoE layers.

        `attends` has each block's attention; None: to the tokens alone.
        """
        attends = attends or [attend] * self.num_layers
        x = nn.Embed(VOCABULARY, self.hidden, name="embed")(tokens)
        for i in range(self.num_layers):
            x = Block(self.num_heads, self.make_moe, name=f"block_{i}")(x, attends[i])
        return nn.Dense(VOCABULARY, use_bias=False, name="head")(nn.RMSNorm(name="norm")(x))


class LinenFlavor:
    """The model as functions of its parameters, as `training.py` wants it."""

    def __init__(self, options: Options, make_moe: MakeMoE) -> None:
        self._model = LanguageModel(options.hidden, options.heads, options.layers, make_moe)
        self._shape = (options.batch, options.seq_len)
        self._num_layers = options.layers
        self._window = options.seq_len

    def init(self, seed: int) -> Any:
        """The parameters."""
        tokens = jnp.zeros(self._shape, jnp.int32)
        return self._model.init(jax.random.key(seed), tokens)["params"]

    def apply(self, params: Any, tokens: jax.Array) -> tuple[jax.Array, list[LayerStats]]:
        """Logits, and the statistics of every layer."""
        logits, state = self._model.apply({"params": params}, tokens, mutable=[STATS])
        sown = [state[STATS][f"block_{i}"]["moe"] for i in range(self._num_layers)]
        return logits, [LayerStats(**{k: v[-1] for k, v in layer.items()}) for layer in sown]

    def extend(
        self, params: Any, tokens: jax.Array, caches: list[KvCache], start: jax.Array
    ) -> tuple[jax.Array, list[KvCache]]:
        """Logits of tokens that follow what is in the caches, and the caches with them."""
        memories = [Memory(cache, start, self._window) for cache in caches]
        attends = [memory.attend for memory in memories]
        logits = self._model.apply({"params": params}, tokens, attends)
        return logits, [memory.cache for memory in memories]
