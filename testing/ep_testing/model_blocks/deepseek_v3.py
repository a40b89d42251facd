# SPDX-License-Identifier: Apache-2.0
"""DeepSeek-V3 (arXiv:2412.19437, section 2.1.2): sigmoid, groups, a bias of the choice, shared."""

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

TOPK, GROUPS, TOPK_GROUPS, SCALE = 4, 4, 2, 2.5


def init(key: jax.Array) -> Params:
    shared = swiglu_arrays(prefix="shared_experts.")
    return draw(key, {**router_arrays(bias=True), **swiglu_arrays(num=EXPERTS), **shared})


def dense(params: Params, x: jax.Array) -> jax.Array:
    names = ("gate_proj", "up_proj", "down_proj")
    weights = deepseek_v3_weights(
        params,
        x,
        num_topk=TOPK,
        num_groups=GROUPS,
        num_topk_groups=TOPK_GROUPS,
        scale=SCALE,
    )
    shared = swiglu(x, *(params[f"shared_experts.{name}"] for name in names))
    return mixed(weights, swiglu_experts(x, *(params[name] for name in names))) + shared
