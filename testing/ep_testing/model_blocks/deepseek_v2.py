# SPDX-License-Identifier: Apache-2.0
"""DeepSeek-V2 (arXiv:2405.04434, section 2.2): "group_limited_greedy", two shared experts.

A group scores its single best expert, the softmax is over all experts, and the weights are scaled
without being normalized. What is outside of the best groups is out of the choice.
"""

import jax

from ep_testing.model_blocks.formulas import (
    EXPERTS,
    FFN,
    Params,
    draw,
    grouped,
    linear,
    mixed,
    only_groups,
    router_arrays,
    spread,
    swiglu,
    swiglu_arrays,
    swiglu_experts,
    take,
    top_k,
)

TOPK, GROUPS, TOPK_GROUPS, SCALE, SHARED = 4, 4, 2, 16.0, 2


def init(key: jax.Array) -> Params:
    shared = swiglu_arrays(SHARED * FFN, prefix="shared_experts.")
    return draw(key, {**router_arrays(), **swiglu_arrays(num=EXPERTS), **shared})


def dense(params: Params, x: jax.Array) -> jax.Array:
    names = ("gate_proj", "up_proj", "down_proj")
    scores = jax.nn.softmax(linear(x, params["gate"]), axis=-1)
    choice = only_groups(scores, grouped(scores, GROUPS).max(axis=-1), TOPK_GROUPS)
    topk_idx = top_k(choice, TOPK)
    weights = spread(topk_idx, SCALE * take(scores, topk_idx))
    shared = swiglu(x, *(params[f"shared_experts.{name}"] for name in names))
    return mixed(weights, swiglu_experts(x, *(params[name] for name in names))) + shared
