# SPDX-License-Identifier: Apache-2.0
"""The dense blocks said with jax_ep's layers: arguments, and where each parameter goes.

What is no option of a layer stands beside it: a router of one's own, arguments of the call, or what
is added to the output.
"""

import dataclasses
import types
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import jax_ep
from ep_testing.model_blocks import (
    deepseek_v2,
    deepseek_v3,
    ernie45,
    gemma4,
    glm45,
    gpt_oss,
    llama4,
    longcat,
    mixtral,
    nemotron,
    phi_moe,
    qwen2_moe,
    qwen3_moe,
    switch,
    switch_capacity,
)
from ep_testing.model_blocks.formulas import EXPERTS, FFN, HIDDEN, Params

Choose = Callable[[Params, jax.Array], tuple[jax.Array, jax.Array]]


def _same_input(params: Params, x: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
    del params
    return x, {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Port:
    """How a block is said with `jax_ep.flax.nnx.MoE` or `jax_ep.flax.linen.MoE`.

    Attributes:
        block: module of the dense block.
        options: arguments of the layer, besides group, `FFN` and where arrays are.
        to_layer: the block's parameters -> the layer's by name, `selection_bias` among them. Those
            of a router of one's own are "router.NAME".
        router: makes the layer's router, where it is one's own.
        call: (the block's parameters, its input) -> the layer's input, and arguments of the call.
        rest: (the block's parameters, its input) -> what is added to the layer's output.
    """

    block: types.ModuleType
    to_layer: Callable[[Params], Params]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    router: Callable[[], Any] | None = None
    call: Callable[[Params, jax.Array], tuple[jax.Array, dict[str, Any]]] = _same_input
    rest: Callable[[Params, jax.Array], jax.Array] | None = None


def transposed(matrix: jax.Array) -> jax.Array:
    """PyTorch's `[..., O, I]` as `[..., I, O]`."""
    return jnp.swapaxes(matrix, -1, -2)


def _from_torch(names: Mapping[str, str]) -> Callable[[Params], Params]:
    """A mapping by names, the block's -> the layer's: matrices are transposed, vectors are not."""

    def to_layer(params: Params) -> Params:
        return {
            ours: transposed(params[theirs]) if params[theirs].ndim > 1 else params[theirs]
            for theirs, ours in names.items()
        }

    return to_layer


_ROUTER = {"gate": "router"}
_BIASED_ROUTER = {"gate": "router", "e_score_correction_bias": "selection_bias"}
_W123 = {"w1": "w_gate", "w3": "w_up", "w2": "w_down"}
_PROJECTIONS = {"gate_proj": "w_gate", "up_proj": "w_up", "down_proj": "w_down"}


def _shared(prefix: str) -> dict[str, str]:
    return {f"{prefix}.{part}_proj": f"shared_{part}" for part in ("gate", "up", "down")}


MIXTRAL = Port(block=mixtral, to_layer=_from_torch(_ROUTER | _W123))

QWEN3_MOE = Port(block=qwen3_moe, to_layer=_from_torch(_ROUTER | _PROJECTIONS))

QWEN2_MOE = Port(
    block=qwen2_moe,
    options={"normalize": False, "shared_ffn": qwen2_moe.SHARED_FFN, "shared_gate": True},
    to_layer=_from_torch(
        _ROUTER
        | _PROJECTIONS
        | _shared("shared_expert")
        | {"shared_expert_gate": "shared_expert_gate"}
    ),
)

DEEPSEEK_V2 = Port(
    block=deepseek_v2,
    options={
        "num_groups": deepseek_v2.GROUPS,
        "num_topk_groups": deepseek_v2.TOPK_GROUPS,
        "group_score": "max",
        "normalize": False,
        "scale": deepseek_v2.SCALE,
        "num_shared_experts": deepseek_v2.SHARED,
    },
    to_layer=_from_torch(_ROUTER | _PROJECTIONS | _shared("shared_experts")),
)

DEEPSEEK_V3 = Port(
    block=deepseek_v3,
    options={
        "score": "sigmoid",
        "selection_bias": True,
        "num_groups": deepseek_v3.GROUPS,
        "num_topk_groups": deepseek_v3.TOPK_GROUPS,
        "scale": deepseek_v3.SCALE,
        "num_shared_experts": 1,
    },
    to_layer=_from_torch(_BIASED_ROUTER | _PROJECTIONS | _shared("shared_experts")),
)

GLM45 = Port(
    block=glm45,
    options={
        "score": "sigmoid",
        "selection_bias": True,
        "scale": glm45.SCALE,
        "num_shared_experts": 1,
    },
    to_layer=DEEPSEEK_V3.to_layer,
)

ERNIE45 = Port(
    block=ernie45,
    options={"selection_bias": True, "num_shared_experts": ernie45.SHARED},
    to_layer=DEEPSEEK_V3.to_layer,
)


def gpt_oss_experts(params: Params) -> Params:
    """`w_gate`, `bias_gate` and so on, of gate and up interleaved in one array."""
    arrays = {}
    for number, name in enumerate(("gate", "up")):
        arrays[f"w_{name}"] = params["gate_up_proj"][:, :, number::2]
        arrays[f"bias_{name}"] = params["gate_up_proj_bias"][:, number::2]
    return arrays | {"w_down": params["down_proj"], "bias_down": params["down_proj_bias"]}


def _gpt_oss_to_layer(params: Params) -> Params:
    router = {"router": transposed(params["gate"]), "router_bias": params["router_bias"]}
    return router | gpt_oss_experts(params)


GPT_OSS = Port(
    block=gpt_oss,
    # Softmax after the top-k is softmax before it, normalized.
    options={
        "experts": jax_ep.experts.GptOss(limit=gpt_oss.LIMIT, alpha=gpt_oss.ALPHA, bias=True),
        "router_bias": True,
    },
    to_layer=_gpt_oss_to_layer,
)


def llama4_experts(params: Params) -> Params:
    """`w_gate`, `w_up`, `w_down`, of gate and up as the halves of one array."""
    gate_up = params["gate_up_proj"]
    return {
        "w_gate": gate_up[:, :, :FFN],
        "w_up": gate_up[:, :, FFN:],
        "w_down": params["down_proj"],
    }


def _llama4_to_layer(params: Params) -> Params:
    dense = _from_torch(_ROUTER | _shared("shared_expert"))(params)
    return dense | llama4_experts(params)


LLAMA4 = Port(
    block=llama4,
    # The sigmoid is monotonic: the largest logit has the largest score.
    options={
        "score": "sigmoid",
        "normalize": False,
        "weigh": "input",
        "num_shared_experts": 1,
    },
    to_layer=_llama4_to_layer,
)

NEMOTRON = Port(
    block=nemotron,
    options={
        "experts": jax_ep.experts.Ungated(activation=nemotron.relu2),
        "score": "sigmoid",
        "selection_bias": True,
        "num_groups": nemotron.GROUPS,
        "num_topk_groups": nemotron.TOPK_GROUPS,
        "scale": nemotron.SCALE,
        "shared_ffn": nemotron.SHARED_FFN,
    },
    to_layer=_from_torch(
        _BIASED_ROUTER
        | {"up_proj": "w_up", "down_proj": "w_down"}
        | {f"shared_experts.{part}_proj": f"shared_{part}" for part in ("up", "down")}
    ),
)

SWITCH = Port(
    block=switch,
    options={"experts": jax_ep.experts.Ungated(activation=jax.nn.relu), "normalize": False},
    to_layer=_from_torch(_ROUTER | {"wi": "w_up", "wo": "w_down"}),
)


def _switch_capacity_call(params: Params, x: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
    """The choice without what finds no room; the weights are the layer's own."""
    topk_idx, _ = switch.choose(params, x)
    kept = jnp.where(switch_capacity.has_room(topk_idx), topk_idx, -1)
    return x, {"topk": (kept, None)}


SWITCH_CAPACITY = Port(
    block=switch_capacity,
    options=SWITCH.options,
    to_layer=SWITCH.to_layer,
    call=_switch_capacity_call,
)


class OwnRouter(nnx.Module):
    """A router that is a module, with parameters of its own."""

    def __init__(self, choose: Choose, **shapes: tuple[int, ...]) -> None:
        self.choose, self.names = choose, tuple(shapes)
        for name, shape in shapes.items():
            setattr(self, name, nnx.Param(jnp.zeros(shape)))

    def __call__(self, x: jax.Array) -> tuple[None, jax.Array, jax.Array]:
        params = {name: getattr(self, name)[...] for name in self.names}
        return None, *self.choose(params, x)


PHI_MOE = Port(
    block=phi_moe,
    router=lambda: OwnRouter(phi_moe.choose, gate=(EXPERTS, HIDDEN)),
    to_layer=lambda params: {"router.gate": params["gate"], **_from_torch(_W123)(params)},
)


def _gemma4_to_layer(params: Params) -> Params:
    gate_up = params["gating_einsum"]
    # An expert's scale is that of its last matrix.
    scale = params["per_expert_scale"][:, None, None]
    return {
        "router": transposed(params["gate"]),
        "w_gate": transposed(gate_up[:, 0]),
        "w_up": transposed(gate_up[:, 1]),
        "w_down": scale * params["linear"],
    }


def _gemma4_call(params: Params, x: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
    of_experts, of_router = gemma4.inputs(params, x)
    return of_experts, {"router_input": of_router}


GEMMA4 = Port(
    block=gemma4,
    options={"activation": jax.nn.gelu},
    to_layer=_gemma4_to_layer,
    call=_gemma4_call,
)


def _longcat_topk(params: Params, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Identities are no selections; their part is `longcat_identities`."""
    topk_idx, weights = longcat.choose(params, x)
    return jnp.where(topk_idx < EXPERTS, topk_idx, -1), weights


def longcat_identities(params: Params, x: jax.Array) -> jax.Array:
    """What the experts that compute nothing give."""
    topk_idx, weights = longcat.choose(params, x)
    return jnp.where(topk_idx < EXPERTS, 0.0, weights).sum(axis=-1, keepdims=True) * x


_LONGCAT_OUTPUTS = EXPERTS + longcat.IDENTITIES

LONGCAT = Port(
    block=longcat,
    router=lambda: OwnRouter(
        _longcat_topk,
        gate=(_LONGCAT_OUTPUTS, HIDDEN),
        e_score_correction_bias=(_LONGCAT_OUTPUTS,),
    ),
    to_layer=lambda params: {
        **{f"router.{name}": params[name] for name in ("gate", "e_score_correction_bias")},
        **_from_torch(_PROJECTIONS)(params),
    },
    rest=longcat_identities,
)

PORTS = {
    "mixtral": MIXTRAL,
    "qwen3_moe": QWEN3_MOE,
    "qwen2_moe": QWEN2_MOE,
    "deepseek_v2": DEEPSEEK_V2,
    "deepseek_v3": DEEPSEEK_V3,
    "gpt_oss": GPT_OSS,
    "llama4": LLAMA4,
    "nemotron": NEMOTRON,
    "switch": SWITCH,
    "switch_capacity": SWITCH_CAPACITY,
    "longcat": LONGCAT,
    "phi_moe": PHI_MOE,
    "gemma4": GEMMA4,
    "glm45": GLM45,
    "ernie45": ERNIE45,
}
