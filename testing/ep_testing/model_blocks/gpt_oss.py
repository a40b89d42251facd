# SPDX-License-Identifier: Apache-2.0
"""gpt-oss (OpenAI 2025, arXiv:2508.10925, and its model card).

Biases in the router and in the experts; gate and up interleaved in one matrix and clamped; SwiGLU
with alpha 1.702 and `up + 1`; softmax after the top-k.
"""

import jax
import jax.numpy as jnp

from ep_testing.model_blocks.formulas import (
    EXPERTS,
    FFN,
    HIDDEN,
    Params,
    draw,
    einsum,
    mixed,
    router_arrays,
    spread,
    take,
    top_k,
)

TOPK, LIMIT, ALPHA = 4, 7.0, 1.702


def init(key: jax.Array) -> Params:
    # Gate and up are so large that each limit cuts some of them.
    return draw(
        key,
        {
            **router_arrays(),
            "router_bias": ((EXPERTS,), 0.5),
            "gate_up_proj": ((EXPERTS, HIDDEN, 2 * FFN), 4 * HIDDEN**-0.5),
            "gate_up_proj_bias": ((EXPERTS, 2 * FFN), 1.0),
            "down_proj": ((EXPERTS, FFN, HIDDEN), FFN**-0.5),
            "down_proj_bias": ((EXPERTS, HIDDEN), 1.0),
        },
    )


def gate_and_up(params: Params, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both `[..., E, F]`, before they are clamped."""
    gate_up = einsum("...h,ehf->...ef", x, params["gate_up_proj"])
    gate_up = gate_up + jnp.broadcast_to(params["gate_up_proj_bias"], gate_up.shape)
    return gate_up[..., ::2], gate_up[..., 1::2]


def router_logits(params: Params, x: jax.Array) -> jax.Array:
    logits = einsum("...h,eh->...e", x, params["gate"])
    return logits + jnp.broadcast_to(params["router_bias"], logits.shape)


def dense(params: Params, x: jax.Array) -> jax.Array:
    logits = router_logits(params, x)
    topk_idx = top_k(logits, TOPK)
    weights = spread(topk_idx, jax.nn.softmax(take(logits, topk_idx), axis=-1))
    gate, up = gate_and_up(params, x)
    gate, up = jnp.minimum(gate, LIMIT), jnp.clip(up, -LIMIT, LIMIT)
    inner = (up + 1) * gate * jax.nn.sigmoid(ALPHA * gate)
    outputs = einsum("...ef,efh->...eh", inner, params["down_proj"])
    return mixed(weights, outputs + jnp.broadcast_to(params["down_proj_bias"], outputs.shape))
