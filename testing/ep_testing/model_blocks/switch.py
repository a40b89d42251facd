# SPDX-License-Identifier: Apache-2.0
"""Switch Transformer (Fedus et al. 2021, arXiv:2101.03961, section 2.1): top-1, ungated relu.

The weight is the probability of the softmax, so that the router has a gradient.
"""

import jax
import jax.numpy as jnp

from ep_testing.model_blocks.formulas import (
    EXPERTS,
    FFN,
    HIDDEN,
    Params,
    draw,
    einsum,
    linear,
    mixed,
    router_arrays,
    spread,
    take,
    top_k,
)

TOPK = 1


def init(key: jax.Array) -> Params:
    return draw(
        key,
        {
            **router_arrays(),
            "wi": ((EXPERTS, FFN, HIDDEN), HIDDEN**-0.5),
            "wo": ((EXPERTS, HIDDEN, FFN), FFN**-0.5),
        },
    )


def choose(params: Params, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`[B, S, 1]` experts and their probabilities."""
    probabilities = jax.nn.softmax(linear(x, params["gate"]), axis=-1)
    topk_idx = top_k(probabilities, TOPK)
    return topk_idx, take(probabilities, topk_idx)


def outputs(params: Params, x: jax.Array) -> jax.Array:
    """Of all experts, `[B, S, E, H]`."""
    inner = jnp.maximum(einsum("...h,efh->...ef", x, params["wi"]), 0.0)
    return einsum("...ef,ehf->...eh", inner, params["wo"])


def dense(params: Params, x: jax.Array) -> jax.Array:
    return mixed(spread(*choose(params, x)), outputs(params, x))
