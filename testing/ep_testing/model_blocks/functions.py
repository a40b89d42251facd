# SPDX-License-Identifier: Apache-2.0
"""Blocks said with `moe_with_experts` or `sharded_moe`: those that ask most of these functions."""

import dataclasses

import jax
import jax.numpy as jnp

import jax_ep
from ep_testing.model_blocks import gpt_oss, longcat, nemotron, phi_moe, ports
from ep_testing.model_blocks.formulas import EXPERTS, Params, linear, swiglu


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """Arguments of one call, of global arrays, and what is added to its result.

    Attributes:
        topk_idx: `[B, S, K]`, -1 for no selection.
        topk_weights: `[B, S, K]`.
        experts: with the weights of all experts.
        weigh: as `sharded_moe` takes it.
        rest: `[B, S, H]`, or None.
    """

    topk_idx: jax.Array
    topk_weights: jax.Array
    experts: jax_ep.experts.ExpertWeights
    weigh: str = "output"
    rest: jax.Array | None = None


def _route(logits: jax.Array, **options: object) -> tuple[jax.Array, jax.Array]:
    """`jax_ep.route` of `[B, S, E]`."""
    routed = jax_ep.route(logits.reshape(-1, EXPERTS), **options)
    return tuple(array.reshape(*logits.shape[:-1], -1) for array in routed)


def _gpt_oss(params: Params, x: jax.Array) -> Call:
    topk_idx, topk_weights = _route(gpt_oss.router_logits(params, x), num_topk=gpt_oss.TOPK)
    experts = jax_ep.experts.gpt_oss(**ports.gpt_oss_experts(params))
    return Call(topk_idx=topk_idx, topk_weights=topk_weights, experts=experts)


def _llama4(params: Params, x: jax.Array) -> Call:
    logits = linear(x, params["gate"])
    topk_idx, topk_weights = _route(logits, num_topk=1, score="sigmoid", normalize=False)
    shared = [params[f"shared_expert.{name}_proj"] for name in ("gate", "up", "down")]
    return Call(
        topk_idx=topk_idx,
        topk_weights=topk_weights,
        experts=jax_ep.experts.gated(**ports.llama4_experts(params)),
        weigh="input",
        rest=swiglu(x, *shared),
    )


def _nemotron(params: Params, x: jax.Array) -> Call:
    topk_idx, topk_weights = _route(
        linear(x, params["gate"]),
        num_topk=nemotron.TOPK,
        score="sigmoid",
        bias=params["e_score_correction_bias"],
        num_groups=nemotron.GROUPS,
        num_topk_groups=nemotron.TOPK_GROUPS,
        scale=nemotron.SCALE,
    )
    matrices = (ports.transposed(params[name]) for name in ("up_proj", "down_proj"))
    return Call(
        topk_idx=topk_idx,
        topk_weights=topk_weights,
        experts=jax_ep.experts.ungated(*matrices, activation=nemotron.relu2),
        rest=nemotron.shared_expert(params, x),
    )


def _longcat(params: Params, x: jax.Array) -> Call:
    topk_idx, topk_weights = longcat.choose(params, x)
    names = ("gate_proj", "up_proj", "down_proj")
    return Call(
        # An identity is no selection: its part is the rest.
        topk_idx=jnp.where(topk_idx < EXPERTS, topk_idx, -1),
        topk_weights=topk_weights,
        experts=jax_ep.experts.gated(*(ports.transposed(params[name]) for name in names)),
        rest=ports.longcat_identities(params, x),
    )


def _phi_moe(params: Params, x: jax.Array) -> Call:
    topk_idx, topk_weights = phi_moe.choose(params, x)
    matrices = (ports.transposed(params[name]) for name in ("w1", "w3", "w2"))
    experts = jax_ep.experts.gated(*matrices)
    return Call(topk_idx=topk_idx, topk_weights=topk_weights, experts=experts)


CALLS = {
    "gpt_oss": _gpt_oss,
    "llama4": _llama4,
    "nemotron": _nemotron,
    "longcat": _longcat,
    "phi_moe": _phi_moe,
}
