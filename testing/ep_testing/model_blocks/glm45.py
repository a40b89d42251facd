# SPDX-License-Identifier: Apache-2.0
"""GLM-4.5 (GLM-4.5 team 2025, arXiv:2508.06471): the gate of DeepSeek-V3 with one group."""

import jax

from ep_testing.model_blocks.formulas import (
    EXPERTS,
    Params,
    deepseek_v3_weights,
    draw,
    mixed,
    router_arrays,
    swiglu,
    swiglu_arrays,
    swiglu_experts,
)

TOPK, SCALE = 4, 1.5


def init(key: jax.Array) -> Params:
    shared = swiglu_arrays(prefix="shared_experts.")
    return draw(key, {**router_arrays(bias=True), **swiglu_arrays(num=EXPERTS), **shared})


def dense(params: Params, x: jax.Array) -> jax.Array:
    names = ("gate_proj", "up_proj", "down_proj")
    weights = deepseek_v3_weights(params, x, num_topk=TOPK, scale=SCALE)
    shared = swiglu(x, *(params[f"shared_experts.{name}"] for name in names))
    return mixed(weights, swiglu_experts(x, *(params[name] for name in names))) + shared
