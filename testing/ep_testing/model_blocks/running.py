# SPDX-License-Identifier: Apache-2.0
"""Evaluates blocks, dense and by jax_ep: outputs, and gradients of a projection of them."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

import jax_ep
from ep_testing.model_blocks import functions, ports
from ep_testing.model_blocks.formulas import BATCH, EXPERTS, HIDDEN, SEQUENCE, Params

Function = Callable[[Params, jax.Array], jax.Array]

TOLERANCE = 1e-5
"""Of float32 sums of at most some hundred terms, relative to the largest element."""


def make_group(name: str, mesh: jax.sharding.Mesh) -> jax_ep.EpGroup:
    """A group over the axis "expert" for the block of this name."""
    config = jax_ep.EpConfig(
        num_experts=EXPERTS,
        num_topk=ports.PORTS[name].block.TOPK,
        hidden=HIDDEN,
        max_tokens_per_rank=BATCH * SEQUENCE // mesh.shape["expert"],
        dtype=jnp.float32,
    )
    return jax_ep.EpGroup(mesh, "expert", config)


# --- a block by functions of jax_ep ------------------------------------------------------------


def sharded_function(name: str, group: jax_ep.EpGroup, token_spec: P, **where: Any) -> Function:
    """By `jax_ep.sharded_moe`."""

    def function(params: Params, x: jax.Array) -> jax.Array:
        call = functions.CALLS[name](params, x)
        out = jax_ep.sharded_moe(
            x,
            call.topk_idx,
            call.topk_weights,
            call.experts,
            group=group,
            token_spec=token_spec,
            weigh=call.weigh,
            **where,
        )
        return out if call.rest is None else out + call.rest

    return function


def shard_map_function(name: str, group: jax_ep.EpGroup) -> Function:
    """By `jax_ep.moe_with_experts` in a `shard_map` over a mesh of ("data", "expert")."""
    tokens = P("data", "expert")

    def on_rank(weigh: str, x: jax.Array, topk_idx: jax.Array, topk_weights: jax.Array, experts):
        flat = (array.reshape(-1, array.shape[-1]) for array in (x, topk_idx, topk_weights))
        out = jax_ep.moe_with_experts(*flat, experts, group=group, weigh=weigh)
        return out.reshape(x.shape)

    def function(params: Params, x: jax.Array) -> jax.Array:
        call = functions.CALLS[name](params, x)
        out = jax.shard_map(
            functools.partial(on_rank, call.weigh),
            mesh=group.mesh,
            in_specs=(tokens, tokens, tokens, P("expert")),
            out_specs=tokens,
        )(x, call.topk_idx, call.topk_weights, call.experts)
        return out if call.rest is None else out + call.rest

    return function


# --- comparisons -------------------------------------------------------------------------------


@functools.cache
def arguments_of(name: str) -> tuple[Params, jax.Array]:
    """The parameters of a block and its input, `[B, S, H]`."""
    rng = np.random.default_rng(7)
    x = jnp.asarray(rng.standard_normal((BATCH, SEQUENCE, HIDDEN)), jnp.float32)
    return ports.PORTS[name].block.init(jax.random.key(0)), x


def compiled(function: Callable) -> Callable:
    """In `jit`. Compilation is most of the time here, and half of it is LLVM's optimizing."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def evaluate(function: Function, params: Params, x: jax.Array) -> dict[str, np.ndarray]:
    """The output, and the gradients of its product with random numbers, by name."""
    rng = np.random.default_rng(8)
    projection = jnp.asarray(rng.standard_normal(x.shape), jnp.float32)

    def objective(params: Params, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = function(params, x)
        return (out * projection).sum(), out

    program = compiled(jax.value_and_grad(objective, argnums=(0, 1), has_aux=True))
    (_, out), (of_params, of_x) = program(params, x)
    gradients = {f"gradient of {key}": value for key, value in of_params.items()}
    results = {"output": out, "gradient of x": of_x, **gradients}
    return {key: np.asarray(value) for key, value in results.items()}


@functools.cache
def dense_results(name: str) -> dict[str, np.ndarray]:
    """What the dense block gives."""
    return evaluate(ports.PORTS[name].block.dense, *arguments_of(name))


def differences(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> dict[str, float]:
    """The largest difference of each array, relative to the largest element of what is wanted."""
    assert got.keys() == want.keys()
    found = {}
    for key, reference in want.items():
        assert got[key].shape == reference.shape, key
        assert got[key].dtype == reference.dtype == np.float32, key
        largest = np.abs(reference).max()
        found[key] = float(np.abs(got[key] - reference).max() / (largest if largest else 1.0))
    return found


def assert_is_dense(name: str, function: Function) -> None:
    """Output and gradients are those of the dense block."""
    found = differences(evaluate(function, *arguments_of(name)), dense_results(name))
    # NaN is no number below the limit, either.
    wrong = {key: value for key, value in found.items() if not value <= TOLERANCE}
    assert not wrong, f"{name}: relative differences {wrong}; allowed: up to {TOLERANCE}"
