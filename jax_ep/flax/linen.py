# SPDX-License-Identifier: Apache-2.0
"""A Mixture-of-Experts layer for Flax Linen."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding, PartitionSpec

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

__all__ = ["BIAS", "PLACEMENT", "STATS", "LayerStats", "MoE", "set_placement", "update_bias"]

STATS = "moe_stats"
"""Collection of the statistics of a call; apply with `mutable=[STATS]` to get them."""

BIAS = "moe_bias"
"""Collection of selection biases, which are not parameters."""

PLACEMENT = "moe_placement"
"""Collection of the tables that say which copies experts have. Not parameters."""


class PartitionedOnMesh(nn.Partitioned[jax.Array]):
    """`nn.Partitioned` over a mesh, where names that are no axes of the mesh shard nothing.

    Such a name is what `nn.scan` and `nn.vmap` add for the axis along which they stack layers.
    """

    def unbox(self, apply_constraint: bool = True) -> Any:
        """The value, on the mesh."""
        if not apply_constraint or self.mesh is None:
            return self.value
        return jax.lax.with_sharding_constraint(self.value, self.get_sharding(self.mesh))

    def get_sharding(self, mesh: jax.sharding.Mesh) -> NamedSharding:
        """Where the value belongs on a mesh."""

        def known(entry: Any) -> Any:
            names = (entry,) if isinstance(entry, str) else tuple(entry or ())
            kept = tuple(name for name in names if name in mesh.axis_names)
            return kept if len(kept) > 1 else next(iter(kept), None)

        return NamedSharding(mesh, PartitionSpec(*map(known, self.names)))


class MoE(nn.Module):
    """Router, experts spread over an `EpGroup`, and shared experts.

    The same layer as `jax_ep.flax.nnx.MoE`, which says how tokens and experts are spread and what
    the capacity is: with the same parameters, which have the same names and shapes, it gives the
    same output. Works in `nn.jit`, `nn.remat` and `nn.scan`.

    Collections:

    * "params": `router`, `w_gate`, `w_up`, `w_down`, and `shared_gate`, `shared_up`, `shared_down`
      if there are shared experts; boxed in a `nn.Partitioned` that shards the experts over the
      group's axes (with `partition_names` in a `nn.LogicallyPartitioned`). In it, a name that is no
      axis of the group's mesh shards nothing, such as "layers" from
      `nn.scan(metadata_params={nn.PARTITION_NAME: "layers"})`.
    * `BIAS`: `selection_bias`, `[E]` float32; only with `selection_bias=True`. See `update_bias`.
    * `PLACEMENT`: `slot_expert`, `copies`, `upper`, see `jax_ep.PlacementArrays`; only with a
      placement. See `set_placement`.
    * `STATS`, sown: `tokens_per_expert`, `num_dropped`, `load_balance_loss`, `router_z_loss`, a
      tuple each with one entry per call, see `LayerStats`. The losses are differentiable.

    Attributes:
        group: an open `EpGroup` whose config has layout "expert", on a mesh whose axes have type
            `AxisType.Auto` (that is not the default of `jax.make_mesh`).
        ffn: `F`, inner size of one expert.
        num_shared_experts: experts that every token uses besides its top-k, each of size `F`.
        shared_ffn: `S`, the width of shared experts, in the place of `num_shared_experts`.
        shared_gate: whether shared experts are multiplied by `sigmoid(x @ shared_expert_gate)`.
        activation: of the gate, elementwise; the same function for equal layers.
        experts: what experts compute, such as `jax_ep.experts.GptOss()`. None: gated.
        weigh: what weights multiply, see `jax_ep.moe_with_experts`.
        router: in the place of the layer's own, see `jax_ep.flax.nnx.MoE`.
        router_bias: whether the router has a bias, which is part of the logits.
        router_dtype: in which logits are computed: float32, or `EpConfig.dtype`.
        score: of the router, see `jax_ep.route`.
        selection_bias: whether there is a bias that decides who is chosen.
        num_groups: see `jax_ep.route`.
        num_topk_groups: see `jax_ep.route`.
        group_score: see `jax_ep.route`.
        normalize: see `jax_ep.route`. Pass False where `EpConfig.num_topk` is 1: else the output
            has no gradient for the router, and a UserWarning says so.
        epsilon: see `jax_ep.route`.
        scale: see `jax_ep.route`.
        data_axes: mesh axes over which the tokens are split, besides the group's. None: all
            others but the tensor axes.
        tensor_axes: mesh axes over which `F` and `S` are split.
        fsdp_axes: mesh axes over which `H` of the experts' weights is split.
        token_spec: of `x`, see `jax_ep.sharded_moe`.
        partition_names: names for "experts", "hidden" and "ffn" in the parameters' metadata, for
            `nn.logical_to_mesh` and its rules. None: the mesh axes themselves.
        param_dtype: of the parameters but the router's, which are float32.
        kernel_init: of one expert's matrices, and of the shared ones.
        router_init: of the router.
        placement: with which the collection `PLACEMENT` begins, see `jax_ep.flax.nnx.MoE`. In calls
            that collection counts.
        num_logical_experts: `E`, where experts have copies. Alone: the placement begins as one for
            even loads.
        replicas: "stored" or "expanded": whether there are weights of slots or of experts.
        renormalize: whether weights make up for selections that are lost, see
            `jax_ep.flax.nnx.MoE`.

    Raises:
        ValueError: an attribute has a value that is not allowed (at `init` and `apply`).
    """

    group: EpGroup
    ffn: int
    num_shared_experts: int = 0
    shared_ffn: int | None = None
    shared_gate: bool = False
    activation: Activation = jax.nn.silu
    experts: Experts | None = None
    weigh: Weigh = "output"
    router: Router | None = None
    router_bias: bool = False
    router_dtype: Any = jnp.float32
    score: Score = "softmax"
    selection_bias: bool = False
    num_groups: int | None = None
    num_topk_groups: int | None = None
    group_score: GroupScore = "top2"
    normalize: bool = True
    epsilon: float = 1e-20
    scale: float = 1.0
    data_axes: Sequence[str] | None = None
    tensor_axes: Sequence[str] = ()
    fsdp_axes: Sequence[str] = ()
    token_spec: PartitionSpec | None = None
    partition_names: Mapping[str, str | None] | None = None
    param_dtype: Any = jnp.float32
    kernel_init: Initializer = nn.initializers.lecun_normal()
    router_init: Initializer = nn.initializers.lecun_normal()
    placement: PlacementArrays | None = None
    num_logical_experts: int | None = None
    replicas: Replicas = "stored"
    renormalize: bool = False

    def setup(self) -> None:
        """Declares parameters and state."""
        if isinstance(self.group, EpGroup) and AxisType.Explicit in self.group.mesh.axis_types:
            raise ValueError(
                f"group has a mesh with axis_types {self.group.mesh.axis_types}; allowed in "
                "Linen: AxisType.Auto, because nn.Partitioned cannot shard over explicit axes"
            )
        self.arrays: PlacementArrays | None = self._placement()
        self.spec: _layer.LayerSpec = _layer.LayerSpec(
            group=self.group,
            ffn=self.ffn,
            num_shared_experts=self.num_shared_experts,
            shared_ffn=self.shared_ffn,
            shared_gate=self.shared_gate,
            activation=self.activation,
            experts=self.experts,
            weigh=self.weigh,
            has_router=_layer.is_own_router(self.router),
            selection_bias=self.selection_bias,
            router_bias=self.router_bias,
            router_dtype=self.router_dtype,
            score=self.score,
            num_groups=self.num_groups,
            num_topk_groups=self.num_topk_groups,
            group_score=self.group_score,
            normalize=self.normalize,
            epsilon=self.epsilon,
            scale=self.scale,
            data_axes=self.data_axes,  # type: ignore[arg-type]  # a tuple from here on
            tensor_axes=self.tensor_axes,  # type: ignore[arg-type]
            fsdp_axes=self.fsdp_axes,  # type: ignore[arg-type]
            token_spec=self.token_spec,
            partition_names=_layer.as_names(self.partition_names),
            param_dtype=self.param_dtype,
            replicas=self.replicas,
            renormalize=self.renormalize,
            **_placed.sizes_of(self.arrays),
        )
        if self.replicas == "expanded":
            _placed.weight_group(self.spec)  # opened here, where every process comes by
        params = self.spec.params().items()
        self.weights: dict[str, Any] = {name: self._param(name, param) for name, param in params}
        mesh, bias = self.group.mesh, self.spec.bias()
        self.bias: nn.Variable[jax.Array] | None = (
            self.variable(BIAS, "selection_bias", _params.zeros, mesh, bias)
            if self.selection_bias
            else None
        )

    def _placement(self) -> PlacementArrays | None:
        group = self.group
        arrays = _placed.initial_placement(group, self.placement, self.num_logical_experts)
        if arrays is None:
            return None
        tables = {}
        for name, table in _placed.as_tables(arrays).items():
            spec = _params.everywhere(table)
            tables[name] = self.variable(
                PLACEMENT, name, _params.with_sharding, group.mesh, table, spec
            ).value
        return _placed.as_arrays(tables, group.num_ranks)

    def _param(self, name: str, param: _params.ArraySpec) -> Any:
        init = self.router_init if name == "router" else self.kernel_init
        init = _placed.initializer_of(self.spec, param, init, self.arrays)
        return self.param(name, self._boxed(init, param), param.shape, param.dtype)

    def _boxed(self, init: Initializer, param: _params.ArraySpec) -> Callable[..., Any]:
        """An initializer whose values are where the layer has them, outside of `jit` too."""
        if param.names is not None:
            return nn.with_logical_partitioning(init, cast(Any, param.names))
        # An entry may name several axes, which Flax's own annotation does not say.
        mesh, partition = self.group.mesh, cast(Any, param.partition)
        return lambda *args: PartitionedOnMesh(
            _params.with_sharding(mesh, init(*args), param), names=partition, mesh=mesh
        )

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
        """Runs the layer and sows the statistics of this call into the collection `STATS`.

        Args:
            x: `[..., H]`, floating point; the router sees it in `router_dtype`, the experts in
                `EpConfig.dtype`. At most `EpConfig.max_tokens_per_rank` tokens per device.
            mask: `[...]` bool, see `jax_ep.flax.nnx.MoE.__call__`, as the following.
            logits: `[..., E]`, floating point.
            topk: `(topk_idx [..., K] int32, topk_weights [..., K] float32 or None)`.
            router_input: `[..., H]`, floating point.
            token_ids: `[...]` int32 or uint32.
            rank_mask: `[R]` bool, the ranks that take part.
            expert_mask: `[E]` bool, the experts that may be chosen.

        Returns:
            `[..., H]` of `EpConfig.dtype`.

        Raises:
            ValueError: an argument does not fit the group's config.
            EpGroupClosed: the group has been closed.
        """
        out, stats = self.with_stats(
            x,
            mask=mask,
            logits=logits,
            topk=topk,
            router_input=router_input,
            token_ids=token_ids,
            rank_mask=rank_mask,
            expert_mask=expert_mask,
        )
        # Variables from init() are passed on to apply(), which would append to what is in there.
        if not self.is_initializing():
            for name in self.spec.stats():
                self.sow(STATS, name, getattr(stats, name))
        return out

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
        """Runs the layer and returns the statistics instead of sowing them.

        Args:
            x: as in `__call__`.
            stats: "all", "load" or None, see `jax_ep.flax.nnx.MoE.with_stats`.
            routing: whether the statistics have the logits and the experts of all tokens.
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
        return apply(
            self.spec,
            self.weights,
            None if self.bias is None else self.bias.value,
            x,
            placement=self.arrays,
            router=self.router,
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


def update_bias(
    biases: Mapping[str, Any], stats: Mapping[str, Any], *, rate: float, all_calls: bool = False
) -> dict[str, Any]:
    """One step of balancing without an auxiliary loss, for all MoE layers of a model.

    To be called once per training step, outside of the function that is differentiated; see
    `jax_ep.update_bias`. Layers that are stacked by `nn.scan` are updated each by its own load.

    Args:
        biases: the collection `BIAS`.
        stats: the collection `STATS` of the step.
        rate: the step; 0.001 in the papers.
        all_calls: whether all of a layer's calls in `stats` count, such as those of accumulated
            gradients; else the last one does.

    Returns:
        The collection `BIAS` for the next step.

    Raises:
        ValueError: `stats` has no load for a layer of `biases`.
    """
    updated: dict[str, Any] = {}
    for name, value in biases.items():
        if isinstance(value, Mapping):
            updated[name] = update_bias(value, stats.get(name, {}), rate=rate, all_calls=all_calls)
        elif "tokens_per_expert" not in stats:
            raise ValueError(
                "stats has no 'tokens_per_expert' for a layer that has a bias; allowed: the "
                f"collection {STATS!r} of a call of the same model"
            )
        else:
            loads = stats["tokens_per_expert"]
            load = sum(loads[1:], loads[0]) if all_calls else loads[-1]
            updated[name] = _layer.updated_bias(value, load, rate)
    return updated


def set_placement(tables: Mapping[str, Any], arrays: PlacementArrays) -> dict[str, Any]:
    """The collection `PLACEMENT` of a layer with another placement.

    Compiled programs go on with it, as it is an operand. With `replicas="stored"` the weights have
    to move to their slots before the next call, by `jax_ep.move_experts`.

    Args:
        tables: the layer's part of the collection, `slot_expert`, `copies` and `upper`.
        arrays: from `ExpertPlacement.layer`, with tables of the same shapes. Of layers that are
            stacked by `nn.scan`: with a first dimension of layers.

    Returns:
        What takes the place of `tables`.

    Raises:
        ValueError: `tables` is something else, or the tables have other shapes.
    """
    if set(tables) != set(_placed.TABLES):
        raise ValueError(
            f"tables has {sorted(tables)}; allowed: {sorted(_placed.TABLES)}, one layer's part of "
            f"the collection {PLACEMENT!r}"
        )
    return _placed.check_placement(tables, arrays, None)
