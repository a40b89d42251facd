# SPDX-License-Identifier: Apache-2.0
"""An MoE block with every expert computed for every token, in float32 by JAX: to compare with."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

import jax_ep

E, H, F, K = 8, 16, 24, 2


def make_group(
    shape: tuple[int, ...],
    names: tuple[str, ...],
    *,
    explicit: bool = False,
    backend: str = "ffi",
    **config: Any,
) -> jax_ep.EpGroup:
    """A group for such experts over the axis "expert" of a mesh."""
    kind = AxisType.Explicit if explicit else AxisType.Auto
    mesh = jax.make_mesh(shape, names, axis_types=(kind,) * len(names))
    sizes = {"num_experts": E, "num_topk": K, "hidden": H, "max_tokens_per_rank": 32}
    made = jax_ep.EpConfig(**{**sizes, "dtype": jnp.float32, **config})
    return jax_ep.EpGroup(mesh, "expert", made, backend=backend)


def random_weights(seed: int = 0, *, biases: bool = True) -> dict[str, jax.Array]:
    """Of `E` gated experts."""
    shapes: dict[str, tuple[int, ...]] = {
        "w_gate": (E, H, F),
        "w_up": (E, H, F),
        "w_down": (E, F, H),
    }
    if biases:
        shapes |= {"bias_gate": (E, F), "bias_up": (E, F), "bias_down": (E, H)}
    rng = np.random.default_rng(seed)
    return {
        name: jnp.asarray(rng.standard_normal(shape) * 0.3, jnp.float32)
        for name, shape in shapes.items()
    }


def random_tokens(lead: tuple[int, ...], seed: int = 1) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`x [..., H]`, `topk_idx [..., K]`, `topk_weights [..., K]`."""
    rng = np.random.default_rng(seed)
    idx = np.argsort(rng.random((*lead, E)), axis=-1)[..., :K]
    return (
        jnp.asarray(rng.standard_normal((*lead, H)), jnp.float32),
        jnp.asarray(idx, jnp.int32),
        jnp.asarray(rng.random((*lead, K)) + 0.1, jnp.float32),
    )


def gated(x: jax.Array, weights: dict[str, Any]) -> jax.Array:
    """`[..., E, H]`: what each gated expert makes of each token."""
    gate = plus(product(x, weights["w_gate"]), weights.get("bias_gate"))
    up = plus(product(x, weights["w_up"]), weights.get("bias_up"))
    return down(jax.nn.silu(gate) * up, weights)


def product(x: jax.Array, matrices: jax.Array) -> jax.Array:
    """`[..., H]` times `[E, H, F]`: `[..., E, F]`."""
    return jnp.einsum("...h,ehf->...ef", x, matrices, precision="highest")


def down(inner: jax.Array, weights: dict[str, Any]) -> jax.Array:
    """`[..., E, F]` times `w_down`, plus its bias: `[..., E, H]`."""
    y = jnp.einsum("...ef,efh->...eh", inner, weights["w_down"], precision="highest")
    return plus(y, weights.get("bias_down"))


def plus(y: jax.Array, bias: jax.Array | None) -> jax.Array:
    """`[..., E, F]` plus `[E, F]`, or nothing."""
    return y if bias is None else y + bias.reshape(*[1] * (y.ndim - 2), *bias.shape)


def weighted_sum(y: jax.Array, topk_idx: jax.Array, topk_weights: jax.Array) -> jax.Array:
    """`[..., H]` of every expert's `[..., E, H]`; -1 selects nothing."""
    one_hot = jax.nn.one_hot(topk_idx, y.shape[-2]) * topk_weights[..., None]
    return (y * one_hot.sum(-2)[..., None]).sum(-2)


def block(
    x: jax.Array,
    topk_idx: jax.Array,
    topk_weights: jax.Array,
    weights: dict[str, Any],
    experts: Callable[..., jax.Array] = gated,
) -> jax.Array:
    """`[..., H]`: the weighted sum of the selected experts' outputs."""
    return weighted_sum(experts(x, weights), topk_idx, topk_weights)


def assert_trees_close(got: Any, want: Any, rtol: float = 1e-5) -> None:
    """Each array to `rtol` of the largest element of the one that is wanted."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        size = max(float(jnp.max(jnp.abs(b), initial=0.0)), 1e-6)
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=0, atol=rtol * size)
