# SPDX-License-Identifier: Apache-2.0
"""A Mixture-of-Experts layer for Flax NNX."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.core.spmd import get_logical_axis_rules
from jax.sharding import PartitionSpec

from jax_ep._src.experts.kinds import Activation, Experts
from jax_ep._src.groups.group import EpGroup
from jax_ep._src.moe import Weigh
from jax_ep._src.routing import GroupScore, Score
from jax_ep.flax import _layer, _params
from jax_ep.flax._apply import apply
from jax_ep.flax._layer import LayerStats, Router
from jax_ep.flax._params import Initializer

__all__ = ["LayerStats", "MoE", "MoeStat", "SelectionBias"]

_LECUN_NORMAL = nnx.initializers.lecun_normal()


class MoeStat(nnx.Variable):
    """A statistic of the last call of a layer: `nnx.state(model, MoeStat)` has those of a model."""


class SelectionBias(nnx.Variable):
    """`[E]` float32, added to the router's scores when experts are chosen. Not a parameter."""


class MoE(nnx.Module):
    """Router, experts spread over an `EpGroup`, and shared experts.

    Called on a global array `[..., H]`, outside of `shard_map`; it opens `jax.shard_map` over the
    group's mesh itself. Tokens are split over the data axes and the group's axes: as `token_spec`
    says; without it, along the first dimension of `x` where that divides, else along all tokens in
    order; on a mesh with explicit axes they stay where `x` has them. Axes that do not split `x`
    split its shards further. Works
    in `nnx.jit`, `nnx.grad`, `nnx.remat` and `nnx.scan`, and in JAX's own transformations (see
    `with_stats`).

    How many rows an expert's device has room for is the group's to say: by default as many as can
    come, with `EpConfig.with_capacity_factor` fewer; what finds no room counts as 0.

    Parameters (`nnx.Param`), whose metadata shards them over the group's axes:

    * `router`: `[H, E]` float32, replicated; `router_bias`: `[E]` float32, if asked for.
    * Those of the experts: `w_gate`, `w_up`: `[E, H, F]`, `w_down`: `[E, F, H]`, sharded along
      `E`, along `F` over the tensor axes, along `H` over the FSDP axes; of other kinds of experts
      those that the kind names. With `EpConfig.pad_experts`, `R * L` in the place of `E`.
    * `shared_gate`, `shared_up`: `[H, S]`, `shared_down`: `[S, H]`, sharded likewise, where `S` is
      `shared_ffn` or `num_shared_experts * F`; only if there are shared experts.
      `shared_expert_gate`: `[H, 1]`, with `shared_gate=True`.

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
        shared_ffn: int | None = None,
        shared_gate: bool = False,
        activation: Activation = jax.nn.silu,
        experts: Experts | None = None,
        weigh: Weigh = "output",
        router: Router | None = None,
        router_bias: bool = False,
        router_dtype: Any = jnp.float32,
        score: Score = "softmax",
        selection_bias: bool = False,
        num_groups: int | None = None,
        num_topk_groups: int | None = None,
        group_score: GroupScore = "top2",
        normalize: bool = True,
        epsilon: float = 1e-20,
        scale: float = 1.0,
        data_axes: Sequence[str] | None = None,
        tensor_axes: Sequence[str] = (),
        fsdp_axes: Sequence[str] = (),
        token_spec: PartitionSpec | None = None,
        partition_names: Mapping[str, str | None] | None = None,
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
                They run where the token is, as one dense FFN, gated like the experts.
            shared_ffn: `S`, the width of shared experts, in the place of `num_shared_experts`.
            shared_gate: whether the shared experts' output is multiplied by
                `sigmoid(x @ shared_expert_gate)`.
            activation: of the gate, elementwise; the same function for equal layers, because
                compilations are found by it.
            experts: what experts compute, such as `jax_ep.experts.GptOss()`. None: gated, with
                `activation`.
            weigh: what weights multiply, see `jax_ep.moe_with_experts`.
            router: in the place of the layer's own: a function, or a module, of the router's input
                to `(logits [..., E] or None, topk_idx [..., K] int32, topk_weights [..., K]
                float32)`, on global arrays, outside of `shard_map`.
            router_bias: whether the router has a bias, which is part of the logits.
            router_dtype: in which logits are computed: float32, or `EpConfig.dtype` to have the
                choices of a model whose router is in it. They go on in float32.
            score: of the router, see `jax_ep.route`.
            selection_bias: whether there is a bias that decides who is chosen; see `update_bias`.
            num_groups: see `jax_ep.route`.
            num_topk_groups: see `jax_ep.route`.
            group_score: see `jax_ep.route`.
            normalize: see `jax_ep.route`. Pass False where `EpConfig.num_topk` is 1: else the
                output has no gradient for the router, and a UserWarning says so.
            epsilon: see `jax_ep.route`.
            scale: see `jax_ep.route`.
            data_axes: mesh axes over which the tokens are split, besides the group's. None: all
                others but the tensor axes. On an axis that is not named, every device does the same
                work.
            tensor_axes: mesh axes over which `F` and `S` are split: every device computes with its
                part of the weights, and the results are added up.
            fsdp_axes: mesh axes over which `H` of the experts' weights is split, out of the data
                axes: gathered before they are used, gradients reduce-scattered.
            token_spec: of `x`, see `jax_ep.sharded_moe`. None: see above.
            partition_names: names for "experts", "hidden" and "ffn" in the parameters' metadata.
                Flax's rules say which mesh axes they are (`nnx.logical_axis_rules`); without, they
                are those of the layer. None: the mesh axes themselves.
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
            shared_ffn=shared_ffn,
            shared_gate=shared_gate,
            activation=activation,
            experts=experts,
            weigh=weigh,
            has_router=_layer.is_own_router(router),
            selection_bias=selection_bias,
            router_bias=router_bias,
            router_dtype=router_dtype,
            score=score,
            num_groups=num_groups,
            num_topk_groups=num_topk_groups,
            group_score=group_score,
            normalize=normalize,
            epsilon=epsilon,
            scale=scale,
            data_axes=data_axes,  # type: ignore[arg-type]  # a tuple from here on
            tensor_axes=tensor_axes,  # type: ignore[arg-type]
            fsdp_axes=fsdp_axes,  # type: ignore[arg-type]
            token_spec=token_spec,
            partition_names=_layer.as_names(partition_names),
            param_dtype=param_dtype,
        )
        if router is not None:
            self.router = router
        for name, param in self.spec.params().items():
            init = param.init(router_init if name == "router" else kernel_init)
            init = self._partitioned(init, param)
            setattr(self, name, nnx.Param(init(rngs.params(), param.shape, param.dtype)))
        bias = self.spec.bias()
        self.selection_bias = SelectionBias(self._zeros(bias)) if selection_bias else None
        for name, stat in self.spec.stats().items():
            setattr(self, name, MoeStat(self._zeros(stat)))

    def _partitioned(self, init: Initializer, param: _params.ArraySpec) -> Initializer:
        """An initializer whose values are where the layer has them, with metadata that says so."""
        mesh = self.spec.group.mesh
        if param.names is None:
            return nnx.with_partitioning(init, param.partition, mesh=mesh)
        # Flax refuses rules that differ from those in force, which say where values are then.
        in_force = dict(get_logical_axis_rules() or ())
        axes = zip(param.names, param.partition, strict=True)
        rules = tuple((n, e) for n, e in axes if n is not None and n not in in_force)
        return nnx.with_partitioning(init, param.names, mesh=mesh, sharding_rules=rules)

    def _zeros(self, array: _params.ArraySpec) -> Any:
        """The value of a variable, with metadata that says where it is."""
        mesh = self.spec.group.mesh
        init = functools.partial(_params.zeros, mesh)
        if array.shape:  # Flax has no metadata for scalars
            init = nnx.with_partitioning(init, array.partition, mesh=mesh)
        return init(array)

    def __call__(
        self,
        x: jax.Array,
        *,
        mask: jax.Array | None = None,
        logits: jax.Array | None = None,
        topk: tuple[jax.Array, jax.Array | None] | None = None,
        router_input: jax.Array | None = None,
    ) -> jax.Array:
        """Runs the layer and keeps the statistics of this call.

        Args:
            x: `[..., H]`, floating point; the router sees it in `router_dtype`, the experts in
                `EpConfig.dtype`. At most `EpConfig.max_tokens_per_rank` tokens per device.
            mask: `[...]` bool: False for tokens that go to no expert and count in no statistic,
                such as padding. Shared experts do not see it.
            logits: `[..., E]`, floating point, in the place of the router's.
            topk: `(topk_idx [..., K] int32, topk_weights [..., K] float32)`: the experts, in the
                place of those that the logits say. With None for the weights: those that the logits
                give these experts, as when routing is replayed.
            router_input: `[..., H]`, floating point, what the router sees in the place of `x`.

        Returns:
            `[..., H]` of `EpConfig.dtype`.

        Raises:
            ValueError: an argument does not fit the group's config.
            EpGroupClosed: the group has been closed.
        """
        # Not by `with_stats`: what nnx.tabulate shows of a public method has to be arrays.
        out, stats = self._apply(x, mask=mask, logits=logits, topk=topk, router_input=router_input)
        for name, value in stats.as_dict().items():
            getattr(self, name).set_value(value)
        return out

    def with_stats(
        self,
        x: jax.Array,
        *,
        routing: bool = False,
        mask: jax.Array | None = None,
        logits: jax.Array | None = None,
        topk: tuple[jax.Array, jax.Array | None] | None = None,
        router_input: jax.Array | None = None,
    ) -> tuple[jax.Array, LayerStats]:
        """Runs the layer and returns the statistics; changes no variable.

        So it also works in a function that JAX's own `grad`, `checkpoint` or `scan` transforms
        and that closes over the layer, where variables must not be changed.

        Args:
            x: as in `__call__`.
            routing: whether the statistics have the logits and the experts of all tokens, for
                losses of one's own.
            mask: as in `__call__`.
            logits: as in `__call__`.
            topk: as in `__call__`.
            router_input: as in `__call__`.

        Returns:
            What `__call__` returns, and the statistics of this call.

        Raises:
            ValueError: as `__call__` does.
            EpGroupClosed: as `__call__` does.
        """
        return self._apply(
            x, routing=routing, mask=mask, logits=logits, topk=topk, router_input=router_input
        )

    def _apply(self, x: jax.Array, **options: Any) -> tuple[jax.Array, LayerStats]:
        params = {name: getattr(self, name).get_value() for name in self.spec.params()}
        bias = None if self.selection_bias is None else self.selection_bias.get_value()
        router: Any = None if self.spec.has_router else self.router
        return apply(self.spec, params, bias, x, router=router, **options)

    def update_bias(self, rate: float, tokens_per_expert: jax.Array | None = None) -> None:
        """One step of balancing without an auxiliary loss, by the load of the last call.

        To be called once per training step, outside of the function that is differentiated; see
        `jax_ep.update_bias`. Layers that are stacked by `nnx.vmap` are updated each by its own.

        Args:
            rate: the step; 0.001 in the papers.
            tokens_per_expert: `[E]` int32, the load in the place of that of the last call: where
                a step has several calls, such as with accumulated gradients, the sum of theirs.

        Raises:
            ValueError: the layer has no selection bias, or the load is of another shape.
        """
        if self.selection_bias is None:
            raise ValueError("selection_bias is False for this MoE; allowed for update_bias: True")
        stats: dict[str, Any] = vars(self)  # set by name in __init__
        bias, load = self.selection_bias.get_value(), tokens_per_expert
        if load is None:
            load = stats["tokens_per_expert"].get_value()
        self.selection_bias.set_value(_layer.updated_bias(bias, load, rate))
