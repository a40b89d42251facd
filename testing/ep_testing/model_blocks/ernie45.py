# SPDX-License-Identifier: Apache-2.0
"""ERNIE-4.5 (Baidu 2025, technical report): softmax with a bias of the choice, two shared."""

import jax
import jax.numpy as jnp

from ep_testing.model_blocks.formulas import (
    EXPERTS,
    FFN,
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

TOPK, SHARED, LEAST_SUM = 3, 2, 1e-12


def init(key: jax.Array) -> Params:
    shared = swiglu_arrays(SHARED * FFN, prefix="shared_experts.")
    return draw(key, {**router_arrays(bias=True), **swiglu_arrays(num=EXPERTS), **shared})


def dense(params: Params, x: jax.Array) -> jax.Array:
    names = ("gate_proj", "up_proj", "down_proj")
    scores = jax.nn.softmax(linear(x, params["gate"]), axis=-1)
    bias = jnp.broadcast_to(params["e_score_correction_bias"], scores.shape)
    topk_idx = top_k(scores + bias, TOPK)
    chosen = take(scores, topk_idx)
    chosen = chosen / jnp.maximum(chosen.sum(axis=-1, keepdims=True), LEAST_SUM)
    shared = swiglu(x, *(params[f"shared_experts.{name}"] for name in names))
    experts = swiglu_experts(x, *(params[name] for name in names))
    return mixed(spread(topk_idx, chosen), experts) + shared
