# SPDX-License-Identifier: Apache-2.0
"""Qwen3-MoE (Qwen team 2025, arXiv:2505.09388): softmax, top-k, normalized; no shared expert."""

import jax

from ep_testing.model_blocks.formulas import (
    EXPERTS,
    Params,
    draw,
    linear,
    mixed,
    normalized,
    router_arrays,
    spread,
    swiglu_arrays,
    swiglu_experts,
    take,
    top_k,
)

TOPK = 4


def init(key: jax.Array) -> Params:
    return draw(key, {**router_arrays(), **swiglu_arrays(num=EXPERTS)})


def dense(params: Params, x: jax.Array) -> jax.Array:
    scores = jax.nn.softmax(linear(x, params["gate"]), axis=-1)
    topk_idx = top_k(scores, TOPK)
    weights = spread(topk_idx, normalized(take(scores, topk_idx)))
    experts = (params[name] for name in ("gate_proj", "up_proj", "down_proj"))
    return mixed(weights, swiglu_experts(x, *experts))
