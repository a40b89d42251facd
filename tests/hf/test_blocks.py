# SPDX-License-Identifier: Apache-2.0
"""The layer is the MoE block of Hugging Face's models: the same weights, outputs and gradients.

`make test-hf` installs transformers and PyTorch into an environment of their own and runs this.
"""

import contextlib
import dataclasses
import importlib
import importlib.util
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jax_ep
import jax_ep.flax.nnx
from ep_testing.programs import make_mesh
from jax_ep.flax import load_experts

IS_INSTALLED = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))

if IS_INSTALLED:
    with warnings.catch_warnings():  # theirs are none of our business
        warnings.simplefilter("ignore")
        import torch

pytestmark = [
    pytest.mark.skipif(
        not IS_INSTALLED, reason="needs transformers and PyTorch: `make test-hf` runs it"
    ),
    pytest.mark.filterwarnings("ignore"),
]

BATCH, SEQ, HIDDEN, FFN, SHARED_FFN, EXPERTS, TOPK = 4, 16, 32, 48, 40, 16, 4
TOLERANCE = 1e-5  # of the largest element; float32 on both sides

Tensors = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A block of a model.

    Attributes:
        block: the name of its class in `transformers.models`.
        config: the name of its config.
        sizes: of the config.
        layer: arguments of `jax_ep.flax.nnx.MoE` that say the same.
        weights: arguments of `load_experts`, from its parameters (or their gradients).
        num_topk: of the block.
    """

    block: str
    config: str
    sizes: Mapping[str, Any]
    layer: Mapping[str, Any]
    weights: Callable[[Tensors], dict[str, Any]]
    num_topk: int = TOPK


COMMON = {"hidden_size": HIDDEN, "num_experts_per_tok": TOPK, "hidden_act": "silu"}
BY_NUM_EXPERTS = {**COMMON, "num_experts": EXPERTS, "moe_intermediate_size": FFN}
BY_LOCAL_EXPERTS = {**COMMON, "num_local_experts": EXPERTS, "intermediate_size": FFN}
GROUPED = {
    **COMMON,
    "n_routed_experts": EXPERTS,
    "moe_intermediate_size": FFN,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "n_shared_experts": 2,
}
DEEPSEEK_V3 = {
    "score": "sigmoid",
    "selection_bias": True,
    "num_groups": 4,
    "num_topk_groups": 2,
    "scale": 2.5,
    "num_shared_experts": 2,
}


def fused(tensors: Tensors) -> dict[str, Any]:
    """What most have: `nn.Linear` layout, gate and up in one."""
    return {
        "layout": "torch",
        "gate_up": tensors["experts.gate_up_proj"],
        "down": tensors["experts.down_proj"],
        "router": tensors["gate.weight"],
    }


def of_granite(tensors: Tensors) -> dict[str, Any]:
    return fused({**tensors, "gate.weight": tensors["router.weight"]})


def of_minimax(tensors: Tensors) -> dict[str, Any]:
    bias = tensors.get("e_score_correction_bias")
    return fused(tensors) | ({} if bias is None else {"selection_bias": bias})


def with_shared(tensors: Tensors, name: str = "shared_experts") -> dict[str, Any]:
    return {**fused(tensors), **shared(tensors, name)}


def shared(tensors: Tensors, name: str) -> dict[str, Any]:
    parts = ("gate", "up", "down")
    return {f"shared_{part}": tensors[f"{name}.{part}_proj.weight"] for part in parts}


def with_bias(tensors: Tensors) -> dict[str, Any]:
    """The bias has no gradient."""
    bias = tensors.get("gate.e_score_correction_bias")
    return with_shared(tensors) | ({} if bias is None else {"selection_bias": bias})


def of_ernie(tensors: Tensors) -> dict[str, Any]:
    bias = tensors.get("gate.moe_statics.e_score_correction_bias")
    return with_shared(tensors) | ({} if bias is None else {"selection_bias": bias[0]})


def of_qwen2(tensors: Tensors) -> dict[str, Any]:
    gate = tensors["shared_expert_gate.weight"]
    return with_shared(tensors, "shared_expert") | {"shared_expert_gate": gate}


def of_gpt_oss(tensors: Tensors) -> dict[str, Any]:
    """Experts are `[in, out]`, gate and up in turns."""
    return {
        "layout": "jax",
        "dense_layout": "torch",
        "interleaved": True,
        "gate_up": tensors["experts.gate_up_proj"],
        "bias_gate_up": tensors["experts.gate_up_proj_bias"],
        "down": tensors["experts.down_proj"],
        "bias_down": tensors["experts.down_proj_bias"],
        "router": tensors["router.weight"],
        "router_bias": tensors["router.bias"],
    }


def of_llama4(tensors: Tensors) -> dict[str, Any]:
    return {
        "layout": "jax",
        "dense_layout": "torch",
        "gate_up": tensors["experts.gate_up_proj"],
        "down": tensors["experts.down_proj"],
        "router": tensors["router.weight"],
        **shared(tensors, "shared_expert"),
    }


CASES = {
    "mixtral": Case(
        block="mixtral.modeling_mixtral.MixtralSparseMoeBlock",
        config="MixtralConfig",
        sizes=BY_LOCAL_EXPERTS,
        layer={},
        weights=fused,
    ),
    "qwen3_moe": Case(
        block="qwen3_moe.modeling_qwen3_moe.Qwen3MoeSparseMoeBlock",
        config="Qwen3MoeConfig",
        sizes=BY_NUM_EXPERTS | {"norm_topk_prob": True},
        layer={},
        weights=fused,
    ),
    "qwen3_moe, norm_topk_prob=False": Case(
        block="qwen3_moe.modeling_qwen3_moe.Qwen3MoeSparseMoeBlock",
        config="Qwen3MoeConfig",
        sizes=BY_NUM_EXPERTS | {"norm_topk_prob": False},
        layer={"normalize": False},
        weights=fused,
    ),
    # Its softmax is after the top-k.
    "granitemoe": Case(
        block="granitemoe.modeling_granitemoe.GraniteMoeMoE",
        config="GraniteMoeConfig",
        sizes=BY_LOCAL_EXPERTS,
        layer={},
        weights=of_granite,
    ),
    "olmoe": Case(
        block="olmoe.modeling_olmoe.OlmoeSparseMoeBlock",
        config="OlmoeConfig",
        sizes={**COMMON, "num_experts": EXPERTS, "intermediate_size": FFN},
        layer={"normalize": False},
        weights=fused,
    ),
    "minimax_m2": Case(
        block="minimax_m2.modeling_minimax_m2.MiniMaxM2SparseMoeBlock",
        config="MiniMaxM2Config",
        sizes=BY_LOCAL_EXPERTS,
        layer={"score": "sigmoid", "selection_bias": True},
        weights=of_minimax,
    ),
    "qwen3_next": Case(
        block="qwen3_next.modeling_qwen3_next.Qwen3NextSparseMoeBlock",
        config="Qwen3NextConfig",
        sizes=BY_NUM_EXPERTS
        | {"norm_topk_prob": True, "shared_expert_intermediate_size": SHARED_FFN},
        layer={"shared_ffn": SHARED_FFN, "shared_gate": True},
        weights=of_qwen2,
    ),
    "qwen2_moe": Case(
        block="qwen2_moe.modeling_qwen2_moe.Qwen2MoeSparseMoeBlock",
        config="Qwen2MoeConfig",
        sizes=BY_NUM_EXPERTS
        | {"norm_topk_prob": False, "shared_expert_intermediate_size": SHARED_FFN},
        layer={"normalize": False, "shared_ffn": SHARED_FFN, "shared_gate": True},
        weights=of_qwen2,
    ),
    "deepseek_v2": Case(
        block="deepseek_v2.modeling_deepseek_v2.DeepseekV2Moe",
        config="DeepseekV2Config",
        sizes=GROUPED | {"topk_method": "group_limited_greedy", "norm_topk_prob": False},
        layer={
            "num_groups": 4,
            "num_topk_groups": 2,
            "group_score": "max",
            "normalize": False,
            "scale": 2.5,
            "num_shared_experts": 2,
        },
        weights=with_shared,
    ),
    "deepseek_v3": Case(
        block="deepseek_v3.modeling_deepseek_v3.DeepseekV3MoE",
        config="DeepseekV3Config",
        sizes=GROUPED,
        layer=DEEPSEEK_V3,
        weights=with_bias,
    ),
    "glm4_moe": Case(
        block="glm4_moe.modeling_glm4_moe.Glm4MoeMoE",
        config="Glm4MoeConfig",
        sizes=GROUPED,
        layer=DEEPSEEK_V3,
        weights=with_bias,
    ),
    "ernie4_5_moe": Case(
        block="ernie4_5_moe.modeling_ernie4_5_moe.Ernie4_5_MoeSparseMoeBlock",
        config="Ernie4_5_MoeConfig",
        sizes={
            **COMMON,
            "moe_num_experts": EXPERTS,
            "moe_k": TOPK,
            "moe_intermediate_size": FFN,
            "moe_num_shared_experts": 2,
            "use_bias": False,
        },
        layer={"selection_bias": True, "num_shared_experts": 2},
        weights=of_ernie,
    ),
    "gpt_oss": Case(
        block="gpt_oss.modeling_gpt_oss.GptOssMLP",
        config="GptOssConfig",
        sizes=BY_LOCAL_EXPERTS,
        layer={"experts": jax_ep.experts.GptOss(), "router_bias": True},
        weights=of_gpt_oss,
    ),
    "llama4": Case(
        block="llama4.modeling_llama4.Llama4TextMoe",
        config="Llama4TextConfig",
        sizes=BY_LOCAL_EXPERTS | {"num_experts_per_tok": 1},
        layer={"score": "sigmoid", "normalize": False, "weigh": "input", "shared_ffn": FFN},
        weights=of_llama4,
        num_topk=1,
    ),
}


# --- theirs --------------------------------------------------------------------------------------


def make_block(case: Case) -> "torch.nn.Module":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers = importlib.import_module("transformers")
        module, _, name = case.block.rpartition(".")
        module = importlib.import_module(f"transformers.models.{module}")
        config = getattr(transformers, case.config)(**case.sizes)
        config._experts_implementation = "eager"
        block = getattr(module, name)(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in (*block.parameters(), *block.buffers()):
            # Logits, and all else, of order 1; biases that decide about some of the tokens.
            size = 0.3 if tensor.ndim == 1 or 1 in tensor.shape[:-1] else HIDDEN**-0.5
            tensor.normal_(std=size, generator=generator)
    return block.eval()


def run_block(
    block: "torch.nn.Module", x: np.ndarray, cotangent: np.ndarray
) -> tuple[np.ndarray, np.ndarray, dict[str, "torch.Tensor"]]:
    """Output, gradient of the input, and those of the parameters."""
    inputs = torch.tensor(x, requires_grad=True)
    out = block(inputs)
    out = (out[0] if isinstance(out, tuple) else out).reshape(x.shape)
    (out * torch.tensor(cotangent)).sum().backward()
    grads = {name: p.grad for name, p in block.named_parameters() if p.grad is not None}
    return out.detach().numpy(), inputs.grad.numpy(), grads


def tensors_of(block: "torch.nn.Module") -> dict[str, "torch.Tensor"]:
    return {**dict(block.named_parameters()), **dict(block.named_buffers())}


# --- ours ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def make_layer(case: Case, tensors: Tensors):
    config = jax_ep.EpConfig(
        num_experts=EXPERTS,
        num_topk=case.num_topk,
        hidden=HIDDEN,
        max_tokens_per_rank=BATCH * SEQ // 8,
        dtype=jnp.float32,
    )
    with jax_ep.EpGroup(make_mesh((2, 4), ("data", "expert")), "expert", config) as group:
        layer = jax_ep.flax.nnx.MoE(group, FFN, rngs=nnx.Rngs(0), **case.layer)
        loaded = load_experts(layer, **case.weights(tensors))
        params = nnx.to_pure_dict(nnx.state(layer, nnx.Param))
        assert params.keys() - loaded.keys() == set(), "all of the layer's weights are loaded"
        yield layer


def run_layer(layer, x, cotangent):
    graph, params, rest = nnx.split(layer, nnx.Param, ...)

    @jax.jit
    def run(params, x):
        def objective(params, x):
            out = nnx.merge(graph, params, rest, copy=True)(x)
            return (out * cotangent).sum(), out

        return jax.grad(objective, argnums=(0, 1), has_aux=True)(params, x)

    (grads, grad_x), out = run(params, x)
    return out, grad_x, nnx.to_pure_dict(grads)


def _difference(got, want):
    return np.abs(np.asarray(got) - want).max() / np.abs(want).max()


@pytest.mark.parametrize("name", CASES)
def test_the_layer_is_the_block(name):
    case = CASES[name]
    rng = np.random.default_rng(1)
    x, cotangent = rng.normal(size=(2, BATCH, SEQ, HIDDEN)).astype(np.float32)
    block = make_block(case)
    want, want_x, want_grads = run_block(block, x, cotangent)
    with make_layer(case, tensors_of(block)) as layer:
        out, grad_x, grads = run_layer(layer, x, cotangent)
    assert np.abs(want).max() > 0.1
    assert _difference(out, want) <= TOLERANCE
    assert _difference(grad_x, want_x) <= TOLERANCE
    of_params = load_experts(**case.weights(want_grads))
    assert of_params.keys() == grads.keys()
    for param, gradient in of_params.items():
        assert np.abs(gradient).max() > 0, param
        assert _difference(grads[param], gradient) <= TOLERANCE, param


def test_their_balance_loss_is_ours_times_topk():
    """`router_aux_loss_coef` of a config is to be multiplied by it."""
    case = CASES["mixtral"]
    block = make_block(case)
    x = np.random.default_rng(1).normal(size=(BATCH, SEQ, HIDDEN)).astype(np.float32)
    logits = block.gate(torch.tensor(x))[0]
    modeling = importlib.import_module("transformers.models.mixtral.modeling_mixtral")
    want = modeling.load_balancing_loss_func((logits,), EXPERTS, TOPK).item()
    with make_layer(case, tensors_of(block)) as layer:
        _, stats = layer.with_stats(jnp.asarray(x))
    np.testing.assert_allclose(TOPK * stats.load_balance_loss, want, rtol=1e-5)


def test_weights_in_bfloat16_are_read_as_they_are():
    tensor = torch.randn((2, 6, 4), generator=torch.Generator().manual_seed(0)).bfloat16()
    made = load_experts(layout="torch", up=tensor, down=[t.T for t in tensor])
    assert made["w_up"].dtype == jnp.bfloat16
    want = tensor.float().numpy()
    np.testing.assert_array_equal(made["w_up"].astype(np.float32), want.transpose(0, 2, 1))
    np.testing.assert_array_equal(made["w_down"].astype(np.float32), want)
