# SPDX-License-Identifier: Apache-2.0
"""A Mixture-of-Experts layer for Flax NNX."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jax_ep._src.groups.group import EpGroup
from jax_ep._src.moe import Activation
from jax_ep._src.routing import Score
from jax_ep.flax import _layer
from jax_ep.flax._apply import apply
from jax_ep.flax._layer import Initializer, LayerStats

__all__ = ["LayerStats", "MoE", "MoeStat", "SelectionBias"]

_LECUN_NORMAL = nnx.initializers.lecun_normal()


class MoeStat(nnx.Variable):
    """A statistic of the last call of a layer: `nnx.state(model, MoeStat)` has those of a model."""


class SelectionBias(nnx.Variable):
    """`[E]` float32, added to the router's scores when experts are chosen. Not a parameter."""


class MoE(nnx.Module):
    """Router, gated experts spread over an `EpGroup`, and shared experts.

    Called on a global array `[..., H]`, outside of `shard_map`; it opens `jax.shard_map` over the
    group's mesh itself. Tokens are split over the data axes and the group's axes, along the first
    dimension of `x` where that divides, else along all tokens in order; on a mesh with explicit
    axes they stay where `x` has them, and axes that `x` is not split over split them further. Works
    in `nnx.jit`, `nnx.grad`, `nnx.remat` and `nnx.scan`, and in JAX's own transformations (see
    `with_stats`).

    How many rows an expert's device has room for is the group's to say: by default as many as can
    come, with `EpConfig.with_capacity_factor` fewer; what finds no room counts as 0.

    Parameters (`nnx.Param`), whose metadata shards them over the group's axes:

    * `router`: `[H, E]` float32, replicated.
    * `w_gate`, `w_up`: `[E, H, F]`, `w_down`: `[E, F, H]`, sharded along `E`.
    * `shared_gate`, `shared_up`: `[H, S]`, `shared_down`: `[S, H]`, replicated, where `S` is
      `num_shared_experts * F`; only if there are shared experts.

    Other variables:

    * `selection_bias` (`SelectionBias`): `[E]` float32; only with `selection_bias=True`.
    * `tokens_per_expert`, `num_dropped`, `load_balance_loss`, `router_z_loss` (`MoeStat`): of the
      last call, see `LayerStats`. The losses are differentiable: add them to the objective inside
      of the function that is differentiated.
    """

    def __init__(
        self,
        group: EpGroup,
        ffn: int,
        *,
        num_shared_experts: int = 0,
        activation: Activation = jax.nn.silu,
        score: Score = "softmax",
        selection_bias: bool = False,
        num_groups: int | None = None,
        num_topk_groups: int | None = None,
        normalize: bool = True,
        scale: float = 1.0,
        data_axes: Sequence[str] | None = None,
        param_dtype: Any = jnp.float32,
        kernel_init: Initializer = _LECUN_NORMAL,
        router_init: Initializer = _LECUN_NORMAL,
        rngs: nnx.Rngs,
    ) -> None:
        """Makes the layer; sizes that the group's config has come from there.

        Args:
            group: an open `EpGroup` whose config has layout "expert".
            ffn: `F`, inner size of one expert.
            num_shared_experts: experts that every token uses besides its top-k, each of size `F`.
                They run where the token is, as one dense gated FFN.
            activation: of the gate, elementwise; the same function for equal layers, because
                compilations are found by it.
            score: of the router, see `jax_ep.route`.
            selection_bias: whether there is a bias that decides who is chosen; see `update_bias`.
            num_groups: see `jax_ep.route`.
            num_topk_groups: see `jax_ep.route`.
            normalize: see `jax_ep.route`. Pass False where `EpConfig.num_topk` is 1: else the
                output has no gradient for the router, and a UserWarning says so.
            scale: see `jax_ep.route`.
            data_axes: mesh axes over which the tokens are split, besides the group's. None: all
                others. On an axis that is not named, every device does the same work.
            param_dtype: of the parameters but the router's, which are float32. They are
                converted to `EpConfig.dtype` for every call.
            kernel_init: of one expert's matrices, and of the shared ones.
            router_init: of the router.
            rngs: gives keys from its stream "params".

        Raises:
            ValueError: an argument has a value that is not allowed; the message names it.
        """
        self.spec = _layer.LayerSpec(
            group=group,
            ffn=ffn,
            num_shared_experts=num_shared_experts,
            activation=activation,
            score=score,
            num_groups=num_groups,
            num_topk_groups=num_topk_groups,
            normalize=normalize,
            scale=scale,
            data_axes=None if data_axes is None else tuple(data_axes),
            param_dtype=param_dtype,
        )
        for name, param in self.spec.params().items():
            init = param.init(router_init if name == "router" else kernel_init)
            init = nnx.with_partitioning(init, param.partition, mesh=group.mesh)
            setattr(self, name, nnx.Param(init(rngs.params(), param.shape, param.dtype)))
        bias = self.spec.bias()
        self.selection_bias = SelectionBias(self._zeros(bias)) if selection_bias else None
        for name, stat in self.spec.stats().items():
            setattr(self, name, MoeStat(self._zeros(stat)))

    def _zeros(self, array: _layer.ArraySpec) -> Any:
        """The value of a variable, with metadata that says where it is."""
        mesh = self.spec.group.mesh
        init = functools.partial(_layer.zeros, mesh)
        if array.shape:  # Flax has no metadata for scalars
            init = nnx.with_partitioning(init, array.partition, mesh=mesh)
        return init(array)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Runs the layer and keeps the statistics of this call.

        Args:
            x: `[..., H]`, floating point; the router sees it in float32, the experts in
                `EpConfig.dtype`. At most `EpConfig.max_tokens_per_rank` tokens per device.

        Returns:
            `[..., H]` of `EpConfig.dtype`.

        Raises:
            ValueError: `x` does not fit the group's config.
            EpGroupClosed: the group has been closed.
        """
        # Not by `with_stats`: what nnx.tabulate shows of a public method has to be arrays.
        out, stats = self._apply(x)
        for name, value in stats.as_dict().items():
            getattr(self, name).set_value(value)
        return out

    def with_stats(self, x: jax.Array) -> tuple[jax.Array, LayerStats]:
        """Runs the layer and returns the statistics; changes no variable.

        So it also works in a function that JAX's own `grad`, `checkpoint` or `scan` transforms
        and that closes over the layer, where variables must not be changed.

        Args:
            x: as in `__call__`.

        Returns:
            What `__call__` returns, and the statistics of this call.

        Raises:
            ValueError: as `__call__` does.
            EpGroupClosed: as `__call__` does.
        """
        return self._apply(x)

    def _apply(self, x: jax.Array) -> tuple[jax.Array, LayerStats]:
        params = {name: getattr(self, name).get_value() for name in self.spec.params()}
        bias = None if self.selection_bias is None else self.selection_bias.get_value()
        return apply(self.spec, params, bias, x)

    def update_bias(self, rate: float) -> None:
        """One step of balancing without an auxiliary loss, by the load of the last call.

        To be called once per training step, outside of the function that is differentiated; see
        `jax_ep.update_bias`. Layers that are stacked by `nnx.vmap` are updated each by its own.

        Args:
            rate: the step; 0.001 in the papers.

        Raises:
            ValueError: the layer has no selection bias.
        """
        if self.selection_bias is None:
            raise ValueError("selection_bias is False for this MoE; allowed for update_bias: True")
        stats: dict[str, Any] = vars(self)  # set by name in __init__
        bias, load = self.selection_bias.get_value(), stats["tokens_per_expert"].get_value()
        self.selection_bias.set_value(_layer.updated_bias(bias, load, rate))
