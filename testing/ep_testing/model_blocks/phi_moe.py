# SPDX-License-Identifier: Apache-2.0
"""Phi-3.5-MoE: sparsemixer (Liu et al. 2023, arXiv:2310.00811; GRIN, arXiv:2409.12136), inference.

The best expert first, then the best of the rest. The weight of each is its share in a softmax over
the experts, among those still to be had, whose logits are close to its own.
"""

import jax
import jax.numpy as jnp

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

# The model has a jitter of 0.01, with which nearly all weights are 1 and have no gradient.
TOPK, JITTER = 2, 0.3


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


def choose(params: Params, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`[B, S, 2]` experts and their weights."""
    logits = linear(x, params["gate"])
    left, chosen = logits, []
    for _ in range(TOPK):
        best = top_k(left, 1)
        largest = take(left, best)
        # Relative to the larger magnitude; no gradient goes through a comparison.
        is_far = (largest - logits) / jnp.maximum(jnp.abs(logits), largest) > 2 * JITTER
        shares = jax.nn.softmax(jnp.where(is_far, -jnp.inf, left), axis=-1)
        chosen.append((best, take(shares, best)))
        left = jnp.where(jax.nn.one_hot(best[..., 0], EXPERTS) > 0, -jnp.inf, left)
    topk_idx, weights = (jnp.concatenate(parts, axis=-1) for parts in zip(*chosen, strict=True))
    return topk_idx, weights


def dense(params: Params, x: jax.Array) -> jax.Array:
    weights = spread(*choose(params, x))
    return mixed(weights, swiglu_experts(x, params["w1"], params["w3"], params["w2"]))
