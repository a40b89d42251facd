# SPDX-License-Identifier: Apache-2.0
"""Sizes, products and choices that the dense blocks share. Nothing of jax_ep."""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

BATCH, SEQUENCE, HIDDEN, FFN, EXPERTS = 4, 16, 32, 48, 16

Params = dict[str, jax.Array]

einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def draw(key: jax.Array, arrays: Mapping[str, tuple[tuple[int, ...], float]]) -> Params:
    """Normally distributed arrays from name -> (shape, standard deviation)."""
    # By NumPy: JAX would compile a program for each shape.
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    return {
        name: jnp.asarray(scale * rng.standard_normal(shape), jnp.float32)
        for name, (shape, scale) in arrays.items()
    }


def linear(x: jax.Array, weight: jax.Array) -> jax.Array:
    """`x [..., I]` times `weight [O, I]`, the layout of PyTorch's `Linear`."""
    return einsum("...i,oi->...o", x, weight)


def top_k(scores: jax.Array, k: int) -> jax.Array:
    """Indices of the `k` largest along the last dimension, without a gradient."""
    return jax.lax.top_k(jax.lax.stop_gradient(scores), k)[1]


def take(values: jax.Array, indices: jax.Array) -> jax.Array:
    """The elements of the last dimension that `top_k` has chosen."""
    return jnp.take_along_axis(values, indices, axis=-1)


def spread(topk_idx: jax.Array, topk_weights: jax.Array, num_experts: int = EXPERTS) -> jax.Array:
    """`[..., K]` indices and weights as a dense `[..., E]` matrix of weights."""
    hot = jax.nn.one_hot(topk_idx, num_experts, dtype=topk_weights.dtype)
    return einsum("...ke,...k->...e", hot, topk_weights)


def normalized(weights: jax.Array, epsilon: float = 0.0) -> jax.Array:
    """Weights over their sum."""
    return weights / (weights.sum(axis=-1, keepdims=True) + epsilon)


def mixed(weights: jax.Array, outputs: jax.Array) -> jax.Array:
    """The weighted sum of all experts' outputs: `[..., E]`, `[..., E, H]` -> `[..., H]`."""
    return einsum("...e,...eh->...h", weights, outputs)


def swiglu(x: jax.Array, gate: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
    """One gated network for every token; `gate`, `up` `[F, H]`, `down` `[H, F]`."""
    return linear(jax.nn.silu(linear(x, gate)) * linear(x, up), down)


def swiglu_experts(x: jax.Array, gate: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
    """All experts' outputs, `[..., E, H]`; `gate`, `up` `[E, F, H]`, `down` `[E, H, F]`."""
    inner = jax.nn.silu(einsum("...h,efh->...ef", x, gate)) * einsum("...h,efh->...ef", x, up)
    return einsum("...ef,ehf->...eh", inner, down)


def swiglu_arrays(width: int = FFN, num: int | None = None, prefix: str = "") -> dict:
    """Shapes and scales of such networks in PyTorch's layout; of `num` experts, if given."""
    lead = () if num is None else (num,)
    return {
        f"{prefix}gate_proj": ((*lead, width, HIDDEN), HIDDEN**-0.5),
        f"{prefix}up_proj": ((*lead, width, HIDDEN), HIDDEN**-0.5),
        f"{prefix}down_proj": ((*lead, HIDDEN, width), width**-0.5),
    }


def router_arrays(num_experts: int = EXPERTS, *, bias: bool = False) -> dict:
    """Those of a router, `gate [E, H]`, and of a bias of the choice that changes many choices."""
    arrays: dict = {"gate": ((num_experts, HIDDEN), HIDDEN**-0.5)}
    if bias:
        arrays["e_score_correction_bias"] = ((num_experts,), 0.1)
    return arrays


def only_groups(choice: jax.Array, group_scores: jax.Array, num_topk_groups: int) -> jax.Array:
    """`choice [..., E]`, minus infinity outside of the best groups by `group_scores [..., G]`."""
    num_groups, num_experts = group_scores.shape[-1], choice.shape[-1]
    hot = jax.nn.one_hot(top_k(group_scores, num_topk_groups), num_groups).sum(axis=-2)
    allowed = jnp.repeat(hot > 0, num_experts // num_groups, axis=-1)
    return jnp.where(allowed, choice, -jnp.inf)


def grouped(choice: jax.Array, num_groups: int) -> jax.Array:
    """`[..., E]` as `[..., G, E / G]`."""
    return choice.reshape(*choice.shape[:-1], num_groups, -1)


def deepseek_v3_weights(
    params: Params,
    x: jax.Array,
    *,
    num_topk: int,
    num_groups: int = 1,
    num_topk_groups: int = 1,
    scale: float,
) -> jax.Array:
    """`[..., E]` weights by the gate of DeepSeek-V3 (arXiv:2412.19437, section 2.1.2).

    Sigmoid scores; the bias has a part in the choice alone; a group scores the sum of its two
    largest biased scores; weights are normalized, then scaled.
    """
    scores = jax.nn.sigmoid(linear(x, params["gate"]))
    choice = scores + jnp.broadcast_to(params["e_score_correction_bias"], scores.shape)
    if num_groups > 1:
        best_two = jax.lax.top_k(grouped(choice, num_groups), 2)[0]
        choice = only_groups(choice, best_two.sum(axis=-1), num_topk_groups)
    topk_idx = top_k(choice, num_topk)
    return spread(topk_idx, scale * normalized(take(scores, topk_idx), 1e-20))
