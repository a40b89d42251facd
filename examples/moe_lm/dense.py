# SPDX-License-Identifier: Apache-2.0
"""The same layers without expert parallelism: every expert is applied to every token.

The parameters are made by the layers that they stand in for, so both start from the same ones;
the computation shares no code with them but the router's.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

import jax_ep
from jax_ep.flax import linen as ep_linen
from jax_ep.flax import nnx as ep_nnx


class NnxDenseMoE(ep_nnx.MoE):
    """`jax_ep.flax.nnx.MoE` on one device; softmax routing without any option."""

    def with_stats(self, x: jax.Array) -> tuple[jax.Array, ep_nnx.LayerStats]:
        """See the base class."""
        names = ("router", "w_gate", "w_up", "w_down", "shared_gate", "shared_up", "shared_down")
        params = {name: getattr(self, name)[...] for name in names if hasattr(self, name)}
        return _apply(params, x, self.router.shape[1], self.num_topk)

    @property
    def num_topk(self) -> int:
        """Experts that a token chooses."""
        return self.spec.group.config.num_topk


class LinenDenseMoE(ep_linen.MoE):
    """`jax_ep.flax.linen.MoE` on one device; softmax routing without any option."""

    def with_stats(self, x: jax.Array) -> tuple[jax.Array, ep_linen.LayerStats]:
        """See the base class."""
        config = self.group.config
        return _apply(self.weights, x, config.num_experts, config.num_topk)


def _apply(
    params: Mapping[str, jax.Array], x: jax.Array, num_experts: int, num_topk: int
) -> tuple[jax.Array, ep_nnx.LayerStats]:
    tokens = x.reshape(-1, x.shape[-1])
    logits = tokens @ params["router"]
    topk_idx, topk_weights = jax_ep.route(logits, num_topk=num_topk)
    chosen = jax.nn.one_hot(topk_idx, num_experts)  # [T, K, E]
    gate = jnp.einsum("th,ehf->tef", tokens, params["w_gate"])
    up = jnp.einsum("th,ehf->tef", tokens, params["w_up"])
    weight = (chosen * topk_weights[..., None]).sum(axis=1)
    out = jnp.einsum("tef,efh,te->th", jax.nn.silu(gate) * up, params["w_down"], weight)
    if "shared_gate" in params:
        gate = jax.nn.silu(tokens @ params["shared_gate"])
        out += (gate * (tokens @ params["shared_up"])) @ params["shared_down"]
    stats = ep_nnx.LayerStats(
        tokens_per_expert=chosen.sum(axis=(0, 1)).astype(jnp.int32),
        num_dropped=jnp.zeros((), jnp.int32),
        load_balance_loss=jax_ep.load_balance_loss(logits, topk_idx),
        router_z_loss=jax_ep.router_z_loss(logits, topk_idx),
    )
    return out.reshape(x.shape), stats
