# SPDX-License-Identifier: Apache-2.0
"""Layers of both flavors of Flax that tests compare, and the same evaluated densely."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jax_ep
from ep_testing.programs import make_mesh
from jax_ep import reference
from jax_ep.flax import linen as ep_linen
from jax_ep.flax import nnx as ep_nnx

HIDDEN, EXPERTS, TOPK, FFN = 16, 8, 2, 12
# Of the mesh of `make_group`; slots of each rank, in layers whose experts have copies.
RANKS, SLOTS = 4, 3
LOAD = np.array([20, 1, 1, 1, 3, 3, 9, 2])
EXPERT_WEIGHTS = ("w_gate", "w_up", "w_down")
DEEPSEEK = {
    "score": "sigmoid",
    "selection_bias": True,
    "num_groups": 4,
    "num_topk_groups": 2,
    "scale": 2.5,
    "num_shared_experts": 2,
}
OPTIONS = {
    "plain": {},
    "deepseek": DEEPSEEK,
    "unnormalized": {"normalize": False, "activation": jax.nn.relu, "num_shared_experts": 1},
}


def make_group(mesh=None, axis_name="expert", *, backend=None, **config):
    config = {
        "num_experts": EXPERTS,
        "num_topk": TOPK,
        "hidden": HIDDEN,
        "max_tokens_per_rank": 16,
        "dtype": jnp.float32,
    } | config
    mesh = mesh or make_mesh((2, 4), ("data", "expert"))
    return jax_ep.EpGroup(mesh, axis_name, jax_ep.EpConfig(**config), backend=backend)


def plan_of(load=LOAD, *, num_ranks=RANKS, slots_per_rank=SLOTS, **options):
    """Copies for experts of a load `[E]`, or `[L, E]` of several layers."""
    return jax_ep.plan_placement(
        load, num_ranks=num_ranks, slots_per_rank=slots_per_rank, **options
    )


def make_nnx(group, seed=0, **options):
    moe = ep_nnx.MoE(group, FFN, rngs=nnx.Rngs(seed), **options)
    if moe.selection_bias is not None:
        moe.selection_bias.set_value(jax.random.normal(jax.random.key(seed + 1), (EXPERTS,)) / 8)
    return moe


def to_linen(moe):
    """The variables of a Linen layer with the same parameters: the names are the same."""
    params = {path[-1]: v[...] for path, v in nnx.to_flat_state(nnx.state(moe, nnx.Param))}
    biases = {p[-1]: v[...] for p, v in nnx.to_flat_state(nnx.state(moe, ep_nnx.SelectionBias))}
    return {"params": params, ep_linen.BIAS: biases}


def run_nnx(moe, x):
    out = nnx.jit(lambda moe, x: moe(x))(moe, x)
    return out, {k: v[...] for k, v in nnx.state(moe, ep_nnx.MoeStat).items()}


def run_linen(layer, variables, x):
    apply = jax.jit(functools.partial(layer.apply, mutable=[ep_linen.STATS]))
    out, state = apply(variables, x)
    return out, {k: v[-1] for k, v in state[ep_linen.STATS].items()}


def routing_of(moe, x, options):
    """Logits and the oracle's routing, all tokens in order."""
    logits = np.asarray(x, np.float64).reshape(-1, HIDDEN) @ np.asarray(moe.router[...], np.float64)
    names = ("score", "num_groups", "num_topk_groups", "normalize", "scale")
    chosen = {name: options[name] for name in names if name in options}
    bias = None if moe.selection_bias is None else moe.selection_bias[...]
    return logits, *reference.route(logits, num_topk=TOPK, bias=bias, **chosen)


def dense(moe, x, options):
    """Every expert for every token, in NumPy on no device at all."""
    tokens = np.asarray(x, np.float64).reshape(-1, HIDDEN)
    activation = {jax.nn.relu: lambda a: np.maximum(a, 0)}.get(
        options.get("activation"), reference.silu
    )
    _, topk_idx, topk_weights = routing_of(moe, x, options)
    experts = [moe.w_gate[...], moe.w_up[...], moe.w_down[...]]
    out = reference.moe_dense(tokens, topk_idx, topk_weights, *experts, activation=activation)
    if options.get("num_shared_experts"):
        shared = (moe.shared_gate, moe.shared_up, moe.shared_down)
        gate, up, down = (np.asarray(w[...], np.float64) for w in shared)
        assert gate.shape == (HIDDEN, options["num_shared_experts"] * FFN)
        out = out + (activation(tokens @ gate) * (tokens @ up)) @ down
    return out.reshape(x.shape)
