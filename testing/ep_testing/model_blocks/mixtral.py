# SPDX-License-Identifier: Apache-2.0
"""Mixtral (Jiang et al. 2024, arXiv:2401.04088, section 2.1): softmax over the top-k logits."""

import jax

from ep_testing.model_blocks.formulas import (
    EXPERTS,
    FFN,
    HIDDEN,
    Params,
    draw,
    linear,
    mixed,
    router_arrays,
    spread,
    swiglu_experts,
    take,
    top_k,
)

TOPK = 2


def init(key: jax.Array) -> Params:
    return draw(
        key,
        {
            **router_arrays(),
            "w1": ((EXPERTS, FFN, HIDDEN), HIDDEN**-0.5),
            "w2": ((EXPERTS, HIDDEN, FFN), FFN**-0.5),
            "w3": ((EXPERTS, FFN, HIDDEN), HIDDEN**-0.5),
        },
    )


def dense(params: Params, x: jax.Array) -> jax.Array:
    logits = linear(x, params["gate"])
    topk_idx = top_k(logits, TOPK)
    weights = spread(topk_idx, jax.nn.softmax(take(logits, topk_idx), axis=-1))
    return mixed(weights, swiglu_experts(x, params["w1"], params["w3"], params["w2"]))
