# SPDX-License-Identifier: Apache-2.0
"""Qwen2-MoE (Yang et al. 2024, arXiv:2407.10671): a shared expert behind a gate of its own.

The shared expert's width is its own, too, and the weights of the top-k are not normalized.
Qwen3-Next and Qwen3.5 have the same gate.
"""

import jax

from ep_testing.model_blocks.formulas import (
    EXPERTS,
    HIDDEN,
    Params,
    draw,
    linear,
    mixed,
    router_arrays,
    spread,
    swiglu,
    swiglu_arrays,
    swiglu_experts,
    take,
    top_k,
)

TOPK, SHARED_FFN = 4, 40  # no multiple of FFN


def init(key: jax.Array) -> Params:
    return draw(
        key,
        {
            **router_arrays(),
            **swiglu_arrays(num=EXPERTS),
            **swiglu_arrays(SHARED_FFN, prefix="shared_expert."),
            "shared_expert_gate": ((1, HIDDEN), HIDDEN**-0.5),
        },
    )


def dense(params: Params, x: jax.Array) -> jax.Array:
    names = ("gate_proj", "up_proj", "down_proj")
    scores = jax.nn.softmax(linear(x, params["gate"]), axis=-1)
    topk_idx = top_k(scores, TOPK)
    weights = spread(topk_idx, take(scores, topk_idx))
    shared = swiglu(x, *(params[f"shared_expert.{name}"] for name in names))
    shared_weight = jax.nn.sigmoid(linear(x, params["shared_expert_gate"]))
    return mixed(weights, swiglu_experts(x, *(params[n] for n in names))) + shared_weight * shared
