# SPDX-License-Identifier: Apache-2.0
"""Gemma 4 (Google 2026, model card): the router sees another input than the experts do.

Both are made of the same activations: the experts see them normalized with one scale, the router
with another, over the square root of H. An expert's output has a scale of its own. Gate and up lie
in one array, `[E, 2, F, H]`; the activation is the tanh approximation of gelu.
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
    normalized,
    router_arrays,
    spread,
    take,
    top_k,
)

TOPK = 4


def init(key: jax.Array) -> Params:
    params = draw(
        key,
        {
            **router_arrays(),
            "pre_norm": ((HIDDEN,), 0.3),
            "router_scale": ((HIDDEN,), 0.3),
            "per_expert_scale": ((EXPERTS,), 0.3),
            "gating_einsum": ((EXPERTS, 2, FFN, HIDDEN), HIDDEN**-0.5),
            "linear": ((EXPERTS, FFN, HIDDEN), FFN**-0.5),
        },
    )
    around_one = {n: 1 + params[n] for n in ("pre_norm", "router_scale", "per_expert_scale")}
    # Against the root of H in the router's input: logits of about 1.
    return params | around_one | {"gate": HIDDEN**0.5 * params["gate"]}


def inputs(params: Params, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What the experts and what the router see, `[B, S, H]` both."""
    unit = x * jax.lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True) + 1e-6)
    scales = (params["pre_norm"], HIDDEN**-0.5 * params["router_scale"])
    of_experts, of_router = (unit * jnp.broadcast_to(scale, x.shape) for scale in scales)
    return of_experts, of_router


def dense(params: Params, x: jax.Array) -> jax.Array:
    x, router_input = inputs(params, x)
    scores = jax.nn.softmax(linear(router_input, params["gate"]), axis=-1)
    topk_idx = top_k(scores, TOPK)
    weights = normalized(take(scores, topk_idx)) * params["per_expert_scale"][topk_idx]
    gate_up = einsum("...h,ecfh->...ecf", x, params["gating_einsum"])
    inner = jax.nn.gelu(gate_up[..., 0, :], approximate=True) * gate_up[..., 1, :]
    outputs = einsum("...ef,efh->...eh", inner, params["linear"])
    return mixed(spread(topk_idx, weights), outputs)
