# SPDX-License-Identifier: Apache-2.0
"""LongCat-Flash (Meituan 2025, arXiv:2509.01322, section 2.1): experts that compute nothing.

The router knows more experts than there are: one of the last, chosen, gives back the token itself,
times its weight. The bias has a part in the choice alone; weights are scaled, not normalized.
"""

import jax
import jax.numpy as jnp

from ep_testing.model_blocks.formulas import (
    EXPERTS,
    Params,
    draw,
    linear,
    mixed,
    router_arrays,
    spread,
    swiglu_arrays,
    swiglu_experts,
    take,
    top_k,
)

TOPK, IDENTITIES, SCALE = 4, 8, 6.0


def init(key: jax.Array) -> Params:
    arrays = {**router_arrays(EXPERTS + IDENTITIES, bias=True), **swiglu_arrays(num=EXPERTS)}
    params = draw(key, arrays)
    # Probabilities of 24 experts are small; so is what changes their order.
    return params | {"e_score_correction_bias": params["e_score_correction_bias"] / 4}


def choose(params: Params, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`[B, S, K]` outputs of the router, identities the last, and their weights."""
    scores = jax.nn.softmax(linear(x, params["gate"]), axis=-1)
    bias = jnp.broadcast_to(params["e_score_correction_bias"], scores.shape)
    topk_idx = top_k(scores + bias, TOPK)
    return topk_idx, SCALE * take(scores, topk_idx)


def dense(params: Params, x: jax.Array) -> jax.Array:
    weights = spread(*choose(params, x), EXPERTS + IDENTITIES)
    experts = (params[name] for name in ("gate_proj", "up_proj", "down_proj"))
    outputs = swiglu_experts(x, *experts)
    identities = jnp.broadcast_to(x[..., None, :], (*x.shape[:-1], IDENTITIES, x.shape[-1]))
    return mixed(weights, jnp.concatenate([outputs, identities], axis=-2))
