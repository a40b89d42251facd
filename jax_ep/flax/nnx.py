# SPDX-License-Identifier: Apache-2.0
"""A Mixture-of-Experts layer for Flax NNX."""

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

import jax
import jax.numpy as jnp
from flax import nnx
from flax.core.spmd import get_logical_axis_rules
from jax.sharding import PartitionSpec

from jax_ep._src.balancing.arrays import PlacementArrays
from jax_ep._src.experts.kinds import Activation, Experts
from jax_ep._src.groups.group import EpGroup
from jax_ep._src.moe import Weigh
from jax_ep._src.routing import GroupScore, Score
from jax_ep.flax import _layer, _params, _placed
from jax_ep.flax._apply import apply
from jax_ep.flax._layer import Replicas, Router
from jax_ep.flax._params import Initializer
from jax_ep.flax._stats import LayerStats, Stats

__all__ = ["ExpertMap", "LayerStats", "MoE", "MoeStat", "SelectionBias"]

_LECUN_NORMAL = nnx.initializers.lecun_normal()


class MoeStat(nnx.Variable[jax.Array]):
    """A statistic of the last call of a layer: `nnx.state(model, MoeStat)` has those of a model."""


class SelectionBias(nnx.Variable[jax.Array]):
    """`[E]` float32, added to the router's scores when experts are chosen. Not a parameter."""


class ExpertMap(nnx.Variable[jax.Array]):
    """A table of a layer's placement: which copies its experts have. Not a parameter."""


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

    With a `placement` experts have copies: the group's `num_experts` is `P = R * S`, the slots of
    all ranks, and `E` that of the router, its biases, the losses and the statistics. `replicas`
    says which weights there are: "stored", for serving: one for each slot, `[P, ...]`; copies begin
    alike, and training would make them differ. "expanded", for training: one for each expert,
    `[E, ...]`, copied to the slots in each call, where gradients of copies are added up; the layer
    makes a group of its own for that, with room on each rank for the largest array of its slots,
    which is closed with `group`. `R` has to divide `E` then.

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
    * `slot_expert`, `copies`, `upper` (`ExpertMap`): see `jax_ep.PlacementArrays`; only with a
      placement. Replaced by `set_placement`, which compiles nothing again.
    * `tokens_per_expert`, `num_dropped`, `load_balance_loss`, `router_z_loss` (`MoeStat`): of the
      last call, see `LayerStats`. The losses are differentiable: add them to the objective inside
      of the function that is differentiated.
    """

    if TYPE_CHECKING:  # `__init__` sets them by name, and those of other kinds of experts
        router: Any  # Param, or what was passed
        router_bias: nnx.Param[jax.Array]
        w_gate: nnx.Param[jax.Array]
        w_up: nnx.Param[jax.Array]
        w_down: nnx.Param[jax.Array]
        shared_gate: nnx.Param[jax.Array]
        shared_up: nnx.Param[jax.Array]
        shared_down: nnx.Param[jax.Array]
        shared_expert_gate: nnx.Param[jax.Array]
        slot_expert: ExpertMap
        copies: ExpertMap
        upper: ExpertMap
        tokens_per_expert: MoeStat
        num_dropped: MoeStat
        load_balance_loss: MoeStat
        router_z_loss: MoeStat

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
        placement: PlacementArrays | None = None,
        num_logical_experts: int | None = None,
        replicas: Replicas = "stored",
        renormalize: bool = False,
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
            placement: where experts and their copies are, as `ExpertPlacement.layer` gives it.
                None: experts have no copies, or with `num_logical_experts` as a placement for even
                loads says.
            num_logical_experts: `E`, where there are copies. None: that of the placement.
            replicas: "stored" or "expanded": whether there are weights of slots or of experts.
            renormalize: whether the weights of a token of which selections are lost, to a
                `rank_mask` or because an expert has no copy, are multiplied by the sum of all of
                them over the sum of those that are left.
            rngs: gives keys from its stream "params".

        Raises:
            ValueError: an argument has a value that is not allowed; the message names it.
        """
        arrays = _placed.initial_placement(group, placement, num_logical_experts)
        self.spec: _layer.LayerSpec = _layer.LayerSpec(
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
            replicas=replicas,
            renormalize=renormalize,
            **_placed.sizes_of(arrays),
        )
        if replicas == "expanded":
            _placed.weight_group(self.spec)  # opened here, where every process comes by
        if router is not None:
            self.router = router
        for name, param in self.spec.params().items():
            init = router_init if name == "router" else kernel_init
            init = _placed.initializer_of(self.spec, param, init, arrays)
            init = self._partitioned(init, param)
            setattr(self, name, nnx.Param(init(rngs.params(), param.shape, param.dtype)))
        bias = self.spec.bias()
        self.selection_bias: SelectionBias | None = (
            SelectionBias(self._zeros(bias)) if selection_bias else None
        )
        for name, stat in self.spec.stats().items():
            setattr(self, name, MoeStat(self._zeros(stat)))
        if arrays is not None:
            for name, table in _placed.as_tables(arrays).items():
                setattr(self, name, ExpertMap(self._everywhere(table)))

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

    def _everywhere(self, table: jax.Array) -> Any:
        """The value of a variable that all devices have."""
        array = _params.everywhere(table)
        mesh = self.spec.group.mesh
        init = functools.partial(_params.with_sharding, mesh)
        return nnx.with_partitioning(init, array.partition, mesh=mesh)(table, array)

    def __call__(
        self,
        x: jax.Array,
        *,
        mask: jax.Array | None = None,
        logits: jax.Array | None = None,
        topk: tuple[jax.Array, jax.Array | None] | None = None,
        router_input: jax.Array | None = None,
        token_ids: jax.Array | None = None,
        rank_mask: jax.Array | None = None,
        expert_mask: jax.Array | None = None,
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
            token_ids: `[...]` int32 or uint32, what stands for each token where one of an expert's
                copies is chosen, see `jax_ep.place`: with it a token of a rank goes to the same
                copies whatever tokens are beside it. Without effect where experts have no copies.
            rank_mask: `[R]` bool, the ranks of the group that take part, see `jax_ep.dispatch`;
                None: all. An operand, which may change from call to call. Selections of the others'
                experts, and of their tokens, are lost; shared experts do not see it. The others may
                be drained, and not absent: all devices add up the statistics that this method
                keeps. With `with_stats(..., stats="load")` they may be absent, too, but for what
                `tensor_axes`, `fsdp_axes` and `replicas="expanded"` exchange.
            expert_mask: `[E]` bool, False for experts that no token may choose, see
                `jax_ep.route`, such as those of ranks that are left out; None: all. An operand.
                Losses see the logits as they are.

        Returns:
            `[..., H]` of `EpConfig.dtype`.

        Raises:
            ValueError: an argument does not fit the group's config.
            EpGroupClosed: the group has been closed.
        """
        # Not by `with_stats`: what nnx.tabulate shows of a public method has to be arrays.
        out, stats = self._apply(
            x,
            mask=mask,
            logits=logits,
            topk=topk,
            router_input=router_input,
            token_ids=token_ids,
            rank_mask=rank_mask,
            expert_mask=expert_mask,
        )
        for name in self.spec.stats():
            getattr(self, name).set_value(getattr(stats, name))
        return out

    @overload
    def with_stats(
        self,
        x: jax.Array,
        *,
        stats: Literal["all", "load"] = ...,
        routing: bool = ...,
        mask: jax.Array | None = ...,
        logits: jax.Array | None = ...,
        topk: tuple[jax.Array, jax.Array | None] | None = ...,
        router_input: jax.Array | None = ...,
        token_ids: jax.Array | None = ...,
        rank_mask: jax.Array | None = ...,
        expert_mask: jax.Array | None = ...,
    ) -> tuple[jax.Array, LayerStats]: ...

    @overload
    def with_stats(
        self,
        x: jax.Array,
        *,
        stats: None,
        routing: bool = ...,
        mask: jax.Array | None = ...,
        logits: jax.Array | None = ...,
        topk: tuple[jax.Array, jax.Array | None] | None = ...,
        router_input: jax.Array | None = ...,
        token_ids: jax.Array | None = ...,
        rank_mask: jax.Array | None = ...,
        expert_mask: jax.Array | None = ...,
    ) -> tuple[jax.Array, None]: ...

    def with_stats(
        self,
        x: jax.Array,
        *,
        stats: Stats = "all",
        routing: bool = False,
        mask: jax.Array | None = None,
        logits: jax.Array | None = None,
        topk: tuple[jax.Array, jax.Array | None] | None = None,
        router_input: jax.Array | None = None,
        token_ids: jax.Array | None = None,
        rank_mask: jax.Array | None = None,
        expert_mask: jax.Array | None = None,
    ) -> tuple[jax.Array, LayerStats | None]:
        """Runs the layer and returns the statistics; changes no variable.

        So it also works in a function that JAX's own `grad`, `checkpoint` or `scan` transforms
        and that closes over the layer, where variables must not be changed.

        Args:
            x: as in `__call__`.
            stats: "all": over all devices, with losses, which takes collectives. "load": what each
                device knows, without any collective, see `LayerStats`. None: no statistics.
            routing: whether the statistics have the logits and the experts of all tokens, for
                losses of one's own.
            mask: as in `__call__`.
            logits: as in `__call__`.
            topk: as in `__call__`.
            router_input: as in `__call__`.
            token_ids: as in `__call__`.
            rank_mask: as in `__call__`.
            expert_mask: as in `__call__`.

        Returns:
            What `__call__` returns, and the statistics of this call, or None.

        Raises:
            ValueError: as `__call__` does.
            EpGroupClosed: as `__call__` does.
        """
        return self._apply(
            x,
            stats=stats,
            routing=routing,
            mask=mask,
            logits=logits,
            topk=topk,
            router_input=router_input,
            token_ids=token_ids,
            rank_mask=rank_mask,
            expert_mask=expert_mask,
        )

    def _apply(self, x: jax.Array, **options: Any) -> tuple[jax.Array, LayerStats | None]:
        params = {name: getattr(self, name).get_value() for name in self.spec.params()}
        bias = None if self.selection_bias is None else self.selection_bias.get_value()
        router: Any = None if self.spec.has_router else self.router
        return apply(self.spec, params, bias, x, placement=self.placement, router=router, **options)

    @property
    def placement(self) -> PlacementArrays | None:
        """Where experts and their copies are; None: they have no copies."""
        if not self.spec.has_placement:
            return None
        tables = {name: table.get_value() for name, table in self._tables().items()}
        return _placed.as_arrays(tables, self.spec.group.num_ranks)

    def set_placement(self, arrays: PlacementArrays) -> None:
        """Replaces the placement. Compiled programs go on with it, as it is an operand.

        With `replicas="stored"` the weights have to move to their slots before the next call, by
        `jax_ep.move_experts`; with "expanded" nothing else is to be done.

        Args:
            arrays: of this layer, from `ExpertPlacement.layer`, with tables of the same shapes. Of
                layers that are stacked by `nnx.vmap`: with a first dimension of layers.

        Raises:
            ValueError: the tables have other shapes, or the layer has no placement.
        """
        if not self.spec.has_placement:
            raise ValueError(
                "placement is None for this MoE; allowed for set_placement: a layer that was made "
                "with placement or num_logical_experts"
            )
        old = {name: table.get_value() for name, table in self._tables().items()}
        new = _placed.check_placement(old, arrays, self.spec.group.num_ranks)
        for name, table in self._tables().items():
            table.set_value(new[name])

    def _tables(self) -> dict[str, ExpertMap]:
        own: dict[str, Any] = vars(self)  # set by name in __init__
        return {name: own[name] for name in _placed.TABLES}

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
