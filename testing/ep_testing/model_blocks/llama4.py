# SPDX-License-Identifier: Apache-2.0
"""Llama 4 (Meta 2025, model card): top-1, and the sigmoid of the score scales the expert's input.

Gate and up are the halves of one matrix; every token also uses a shared expert of the same width.
"""

import jax

from ep_testing.model_blocks.formulas import (
    EXPERTS,
    FFN,
    HIDDEN,
    Params,
    draw,
    einsum,
    linear,
    router_arrays,
    spread,
    swiglu,
    swiglu_arrays,
    take,
    top_k,
)

TOPK = 1


def init(key: jax.Array) -> Params:
    return draw(
        key,
        {
            **router_arrays(),
            "gate_up_proj": ((EXPERTS, HIDDEN, 2 * FFN), HIDDEN**-0.5),
            "down_proj": ((EXPERTS, FFN, HIDDEN), FFN**-0.5),
            **swiglu_arrays(prefix="shared_expert."),
        },
    )


def dense(params: Params, x: jax.Array) -> jax.Array:
    names = ("gate_proj", "up_proj", "down_proj")
    logits = linear(x, params["gate"])
    topk_idx = top_k(logits, TOPK)
    weights = spread(topk_idx, jax.nn.sigmoid(take(logits, topk_idx)))
    # An expert that is not chosen gets zeros, of which it makes zeros.
    inputs = einsum("...e,...h->...eh", weights, x)
    gate_up = einsum("...eh,ehf->...ef", inputs, params["gate_up_proj"])
    inner = jax.nn.silu(gate_up[..., :FFN]) * gate_up[..., FFN:]
    outputs = einsum("...ef,efh->...eh", inner, params["down_proj"])
    shared = swiglu(x, *(params[f"shared_expert.{name}"] for name in names))
    return outputs.sum(axis=-2) + shared
