# SPDX-License-Identifier: Apache-2.0
"""Nemotron 3 Nano (NVIDIA 2025, technical report): ungated experts with the square of relu.

The gate is that of DeepSeek-V3, here with groups; the shared expert is ungated as well.
"""

import jax
import jax.numpy as jnp

from ep_testing.model_blocks.formulas import (
    EXPERTS,
    FFN,
    HIDDEN,
    Params,
    deepseek_v3_weights,
    draw,
    einsum,
    linear,
    mixed,
    router_arrays,
)

TOPK, GROUPS, TOPK_GROUPS, SCALE, SHARED_FFN = 4, 4, 2, 2.5, 64


def init(key: jax.Array) -> Params:
    return draw(
        key,
        {
            **router_arrays(bias=True),
            "up_proj": ((EXPERTS, FFN, HIDDEN), HIDDEN**-0.5),
            "down_proj": ((EXPERTS, HIDDEN, FFN), FFN**-0.5),
            "shared_experts.up_proj": ((SHARED_FFN, HIDDEN), HIDDEN**-0.5),
            "shared_experts.down_proj": ((HIDDEN, SHARED_FFN), SHARED_FFN**-0.5),
        },
    )


def relu2(x: jax.Array) -> jax.Array:
    return jnp.square(jnp.maximum(x, 0.0))


def shared_expert(params: Params, x: jax.Array) -> jax.Array:
    inner = relu2(linear(x, params["shared_experts.up_proj"]))
    return linear(inner, params["shared_experts.down_proj"])


def dense(params: Params, x: jax.Array) -> jax.Array:
    weights = deepseek_v3_weights(
        params,
        x,
        num_topk=TOPK,
        num_groups=GROUPS,
        num_topk_groups=TOPK_GROUPS,
        scale=SCALE,
    )
    inner = relu2(einsum("...h,efh->...ef", x, params["up_proj"]))
    outputs = einsum("...ef,ehf->...eh", inner, params["down_proj"])
    return mixed(weights, outputs) + shared_expert(params, x)
