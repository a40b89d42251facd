# SPDX-License-Identifier: Apache-2.0
"""Trains one Mixture-of-Experts layer of Flax to copy its input, on 8 CPU devices."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

import jax_ep
from jax_ep.flax.nnx import MoE

HIDDEN = 16
STEPS = 30


def train(group: jax_ep.EpGroup) -> list[float]:
    """Returns the loss before each step."""
    model = MoE(group, ffn=32, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    x = jax.random.normal(jax.random.key(1), (64, HIDDEN))

    @nnx.jit
    def step(model: MoE, optimizer: nnx.Optimizer) -> jax.Array:
        loss, gradients = nnx.value_and_grad(lambda m: jnp.mean((m(x) - x) ** 2))(model)
        optimizer.update(model, gradients)
        return loss

    return [float(step(model, optimizer)) for _ in range(STEPS)]


def main() -> None:
    """Fails if jax_ep is not the one of this target's runfiles, or if nothing is learned."""
    mesh = Mesh(np.array(jax.devices()), ("expert",))
    config = jax_ep.EpConfig(
        num_experts=16, num_topk=2, hidden=HIDDEN, max_tokens_per_rank=8, dtype=jnp.float32
    )
    with jax_ep.EpGroup(mesh, "expert", config) as group:
        assert ".runfiles/" in jax_ep.__file__, jax_ep.__file__
        assert group.backend == "ffi", group.backend
        losses = train(group)
    print(f"loss {losses[0]:.3f} before, {losses[-1]:.3f} after {STEPS - 1} steps")
    assert losses[-1] < 0.8 * losses[0], losses


if __name__ == "__main__":
    main()
