# SPDX-License-Identifier: Apache-2.0
"""What a layer's router does on one device: logits, experts, weights, losses."""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jax_ep._src.losses import load_balance_loss, router_z_loss
from jax_ep._src.routing import weights_of
from jax_ep._src.scores import scores_of
from jax_ep._src.sharded.token_split import Tokens
from jax_ep.flax._layer import LayerSpec


def logits_of(spec: LayerSpec, params: Mapping[str, jax.Array], tokens: Tokens) -> jax.Array | None:
    """`[T, E]` float32: those that came with the tokens, else the router's; None without either."""
    if "logits" in tokens:
        return tokens["logits"].astype(jnp.float32)
    if not spec.has_router:
        return None
    rows = tokens["router_input"] if "router_input" in tokens else tokens["x"]
    if "mask" in tokens:  # what padding holds, NaN included, has no gradient then
        rows = jnp.where(tokens["mask"][:, None], rows, jnp.zeros((), rows.dtype))
    # Not rounded to config.dtype: a small error in a score sends a token to another expert.
    logits = jnp.dot(
        rows.astype(spec.router_dtype),
        params["router"].astype(spec.router_dtype),
        precision=jax.lax.Precision.HIGHEST,
    )
    if spec.router_bias:
        logits = logits + params["router_bias"].astype(spec.router_dtype)[None, :]
    if spec.router_dtype != jnp.float32:
        # Which XLA would otherwise not round to, between the product and the next conversion.
        logits = jax.lax.optimization_barrier(logits)
    return logits.astype(jnp.float32)


def choose(
    spec: LayerSpec,
    logits: jax.Array | None,
    bias: jax.Array | None,
    expert_mask: jax.Array | None,
    tokens: Tokens,
) -> tuple[jax.Array, jax.Array]:
    """`topk_idx`, `topk_weights`: those that came with the tokens, else what the logits say."""
    if "topk_idx" not in tokens:
        assert logits is not None
        topk_idx, topk_weights = spec.route(logits, bias, expert_mask)
    else:
        topk_idx = tokens["topk_idx"]
        if "topk_weights" in tokens:
            topk_weights = tokens["topk_weights"]
        else:
            assert logits is not None
            topk_weights = _weights_at(spec, logits, topk_idx)
    if "mask" in tokens:
        topk_idx = jnp.where(tokens["mask"][:, None], topk_idx, -1)
    return topk_idx, topk_weights


def _weights_at(spec: LayerSpec, logits: jax.Array, topk_idx: jax.Array) -> jax.Array:
    """What `route` would give experts that were chosen before; 0 for no selection."""
    scores = scores_of(logits, spec.score)
    weights = jnp.take_along_axis(scores, jnp.maximum(topk_idx, 0), axis=-1)
    weights = jnp.where(topk_idx >= 0, weights, 0.0)
    return weights_of(weights, normalize=spec.normalize, epsilon=spec.epsilon, scale=spec.scale)


def losses_of(
    spec: LayerSpec, logits: jax.Array | None, topk_idx: jax.Array, axes: tuple[str, ...]
) -> tuple[jax.Array, jax.Array]:
    """The two losses over the tokens along the axes; 0 without logits."""
    if logits is None:
        return jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32)
    balance = functools.partial(load_balance_loss, score=spec.score)
    return (
        balance(logits, topk_idx, axis_name=axes),
        router_z_loss(logits, topk_idx, axis_name=axes),
    )
