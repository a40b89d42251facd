# SPDX-License-Identifier: Apache-2.0
"""Flax layers over `jax_ep.moe`: `jax_ep.flax.nnx.MoE` and `jax_ep.flax.linen.MoE`.

Import the one that the model is written in: `from jax_ep.flax import nnx` or `linen`. Needs Flax
(`pip install jax-ep[flax]`). `load_experts` puts the weights of a checkpoint into either.
"""

from jax_ep.flax._load import load_experts

__all__ = ["load_experts"]
