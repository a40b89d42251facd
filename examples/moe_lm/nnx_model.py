# SPDX-License-Identifier: Apache-2.0
"""The language model in Flax NNX."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jax_ep.flax.nnx import LayerStats, MoE, MoeStat
from moe_lm.attention import Attend, KvCache, Memory, attend
from moe_lm.corpus import VOCABULARY
from moe_lm.options import Options

MakeMoE = Callable[[nnx.Rngs], MoE]


class Attention(nnx.Module):
    """Causal self-attention."""

    def __init__(self, hidden: int, num_heads: int, rngs: nnx.Rngs) -> None:
        self.num_heads = num_heads
        self.qkv = nnx.Linear(hidden, 3 * hidden, use_bias=False, rngs=rngs)
        self.out = nnx.Linear(hidden, hidden, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array, attend: Attend = attend) -> jax.Array:
        """`[B, S, H]` to `[B, S, H]`."""
        q, k, v = jnp.split(self.qkv(x), 3, axis=-1)
        return self.out(attend(q, k, v, self.num_heads))


class Block(nnx.Module):
    """Attention, then experts, each added to what came in."""

    def __init__(self, options: Options, make_moe: MakeMoE, rngs: nnx.Rngs) -> None:
        self.attention_norm = nnx.RMSNorm(options.hidden, rngs=rngs)
        self.attention = Attention(options.hidden, options.heads, rngs)
        self.moe_norm = nnx.RMSNorm(options.hidden, rngs=rngs)
        self.moe = make_moe(rngs)

    def __call__(self, x: jax.Array, attend: Attend = attend) -> jax.Array:
        """`[B, S, H]` to `[B, S, H]`."""
        x = x + self.attention(self.attention_norm(x), attend)
        return x + self.moe(self.moe_norm(x))


class LanguageModel(nnx.Module):
    """Bytes `[B, S]` to logits `[B, S, 256]` of the byte that follows each."""

    def __init__(self, options: Options, make_moe: MakeMoE, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(VOCABULARY, options.hidden, rngs=rngs)
        self.blocks = nnx.List([Block(options, make_moe, rngs) for _ in range(options.layers)])
        self.norm = nnx.RMSNorm(options.hidden, rngs=rngs)
        self.head = nnx.Linear(options.hidden, VOCABULARY, use_bias=False, rngs=rngs)

    def __call__(self, tokens: jax.Array, attends: Sequence[Attend] | None = None) -> jax.Array:
        """Runs the model and keeps the statistics of its MoE layers.

        `attends` has each block's attention; None: to the tokens alone.
        """
        x = self.embed(tokens)
        for block, attend_of_block in zip(
            self.blocks, attends or [attend] * len(self.blocks), strict=True
        ):
            x = block(x, attend_of_block)
        return self.head(self.norm(x))


class NnxFlavor:
    """The model as functions of its parameters, as `training.py` wants it."""

    def __init__(self, options: Options, make_moe: MakeMoE) -> None:
        self._options = options
        self._make = lambda seed: LanguageModel(options, make_moe, nnx.Rngs(seed))
        abstract = nnx.eval_shape(lambda: self._make(options.seed))
        self._graph, _, self._stats = nnx.split(abstract, nnx.Param, MoeStat)

    def init(self, seed: int) -> Any:
        """The parameters."""
        return nnx.state(self._make(seed), nnx.Param)

    def apply(self, params: Any, tokens: jax.Array) -> tuple[jax.Array, list[LayerStats]]:
        """Logits, and the statistics of every layer."""
        model = self._model(params)
        logits = model(tokens)
        layers = [nnx.state(block.moe, MoeStat) for block in model.blocks]
        return logits, [LayerStats(**{k: v[...] for k, v in layer.items()}) for layer in layers]

    def extend(
        self, params: Any, tokens: jax.Array, caches: list[KvCache], start: jax.Array
    ) -> tuple[jax.Array, list[KvCache]]:
        """Logits of tokens that follow what is in the caches, and the caches with them."""
        memories = [Memory(cache, start, self._options.seq_len) for cache in caches]
        logits = self._model(params)(tokens, [memory.attend for memory in memories])
        return logits, [memory.cache for memory in memories]

    def _model(self, params: Any) -> LanguageModel:
        stats = jax.tree.map(lambda stat: jnp.zeros(stat.shape, stat.dtype), self._stats)
        return nnx.merge(self._graph, params, stats)
