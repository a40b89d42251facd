# SPDX-License-Identifier: Apache-2.0
"""What the NNX and the Linen layer share: sizes, options, and which arrays they have where."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec

from jax_ep._src.checks import check_group
from jax_ep._src.experts.kinds import Activation, Custom, Experts, Gated, Ungated
from jax_ep._src.experts.matrices import Dim, Dims
from jax_ep._src.groups.group import EpGroup
from jax_ep._src.limits import is_int
from jax_ep._src.moe import Weigh
from jax_ep._src.routing import GroupScore, Score, route, update_bias
from jax_ep._src.sharded.token_split import check_token_spec
from jax_ep._src.sharded.weights import WeightAxes, check_axes, check_parts
from jax_ep.flax._params import ArraySpec
from jax_ep.flax._placed import OTHERS, TABLES

_FLOAT32 = np.dtype(np.float32)
_DIM_NAMES = ("experts", "hidden", "ffn")
# What layers have under names of their own.
_TAKEN = {
    *(*OTHERS, *TABLES),
    *("placement", "set_placement", "spec", "update_bias", "with_stats"),
    *("tokens_per_expert", "num_dropped", "load_balance_loss", "router_z_loss"),
}
Replicas = Literal["stored", "expanded"]
# Of what a layer's router is, on global arrays: x to logits (or None), topk_idx, topk_weights.
Router = Callable[[jax.Array], tuple[jax.Array | None, jax.Array, jax.Array]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """The static parameters of a layer; hashable. See `jax_ep.flax.nnx.MoE` for the fields.

    `shared_ffn` is the width of the shared experts, 0 for none; `experts` is never None.
    `num_logical_experts` is None where experts have no copies, else there is a placement, with
    tables of width `max_copies`.
    """

    group: EpGroup
    ffn: int
    num_shared_experts: int = 0
    shared_ffn: int | None = None
    shared_gate: bool = False
    activation: Activation = jax.nn.silu
    experts: Experts | None = None
    weigh: Weigh = "output"
    has_router: bool = True
    selection_bias: bool = False
    router_bias: bool = False
    router_dtype: Any = jnp.float32
    score: Score = "softmax"
    num_groups: int | None = None
    num_topk_groups: int | None = None
    group_score: GroupScore = "top2"
    normalize: bool = True
    epsilon: float = 1e-20
    scale: float = 1.0
    data_axes: tuple[str, ...] | None = None
    tensor_axes: tuple[str, ...] = ()
    fsdp_axes: tuple[str, ...] = ()
    token_spec: PartitionSpec | None = None
    partition_names: tuple[tuple[str, str | None], ...] | None = None
    param_dtype: Any = jnp.float32
    num_logical_experts: int | None = None
    max_copies: int = 0
    replicas: Replicas = "stored"
    renormalize: bool = False

    def __post_init__(self) -> None:
        check_group(self.group, expert_layout_for="MoE")
        _check_int("ffn", self.ffn, 1)
        self._set(ffn=int(self.ffn), shared_ffn=self._shared_ffn())
        self._set(experts=self._kind(), weigh=_one_of("weigh", self.weigh, get_args(Weigh)))
        self._check_mesh_axes()
        _one_of("replicas", self.replicas, get_args(Replicas))
        if self.replicas == "expanded" and not self.has_placement:
            raise ValueError(
                "replicas is 'expanded', and experts have no copies; allowed: 'stored', or a "
                "placement or num_logical_experts with it"
            )
        param_dtype = np.dtype(self.param_dtype)
        if not jnp.issubdtype(param_dtype, jnp.floating):
            raise ValueError(f"param_dtype is {param_dtype.name!r}; allowed: a floating point type")
        router_dtype = np.dtype(self.router_dtype)
        if router_dtype not in (_FLOAT32, self.group.config.dtype):
            raise ValueError(
                f"router_dtype is {router_dtype.name!r}; allowed: 'float32', or EpConfig.dtype, "
                f"{self.group.config.dtype.name!r}"
            )
        self._set(param_dtype=param_dtype, router_dtype=router_dtype)
        for name, array in self.params().items():
            self.axes.check(name, array.shape, array.dims)
        # Bad routing options are reported here instead of at the first call.
        if not self.has_router and (self.selection_bias or self.router_bias):
            name = "selection_bias" if self.selection_bias else "router_bias"
            raise ValueError(f"{name} is True, and router is given; allowed with it: False")
        if self.has_router:
            logits = jax.ShapeDtypeStruct((1, self.num_routed), _FLOAT32)
            jax.eval_shape(self.route, logits)

    def _set(self, **values: Any) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def _shared_ffn(self) -> int:
        _check_int("num_shared_experts", self.num_shared_experts, 0)
        width = self.shared_ffn
        if width is not None:
            _check_int("shared_ffn", width, 1)
            if self.num_shared_experts:
                raise ValueError(
                    f"shared_ffn is {width} and num_shared_experts {self.num_shared_experts}; "
                    "allowed: one of them, because each says how wide shared experts are"
                )
        width = int(width or self.num_shared_experts * self.ffn)
        if self.shared_gate and not width:
            raise ValueError(
                "shared_gate is True, and there are no shared experts; allowed: shared_ffn or "
                "num_shared_experts with it"
            )
        return width

    def _kind(self) -> Experts:
        if self.experts is None:
            return Gated(activation=self.activation)
        if not isinstance(self.experts, Experts):
            raise ValueError(
                f"experts is a {type(self.experts).__name__}; allowed: None, or a kind of "
                "jax_ep.experts such as Gated(), Ungated(), GptOss(), Custom(...)"
            )
        if self.activation is not jax.nn.silu and not isinstance(self.experts, Custom):
            raise ValueError(
                "activation is given, and experts has its own; allowed: "
                f"{type(self.experts).__name__}(activation=...)"
            )
        check_parts(self.experts, check_axes(self.group.mesh, "tensor_axes", self.tensor_axes, ()))
        if taken := sorted(self.experts.dims().keys() & _TAKEN):
            raise ValueError(f"experts has weights {taken}; allowed: names that a layer has not")
        unsized = [name for name, dims in self.experts.dims().items() if None in dims]
        if unsized:
            raise ValueError(
                f"experts has the weights {unsized} with a dimension None; allowed in a layer, "
                f"which makes them: {', '.join(map(repr, _DIM_NAMES))}, or an int, its size"
            )
        return self.experts

    def _check_mesh_axes(self) -> None:
        mesh, own = self.group.mesh, self.group.axis_names
        tensor = check_axes(mesh, "tensor_axes", self.tensor_axes, own)
        data = _data_axes(self.group, self.data_axes, tensor)
        if self.token_spec is not None:
            named = check_token_spec(mesh, self.token_spec)
            data = (*data, *(n for n in named if n not in (*data, *own, *tensor)))
        fsdp = check_axes(mesh, "fsdp_axes", self.fsdp_axes, (*own, *tensor))
        if not set(fsdp) <= set(data):
            raise ValueError(
                f"fsdp_axes is {fsdp}; allowed: axes that split the tokens, which are {data} "
                "besides the group's"
            )
        self._set(data_axes=data, tensor_axes=tensor, fsdp_axes=fsdp)
        names = dict(self.partition_names or ())
        if not set(names) <= set(_DIM_NAMES):
            raise ValueError(
                f"partition_names has the keys {sorted(names)}; allowed: {', '.join(_DIM_NAMES)}"
            )

    def route(
        self,
        logits: jax.Array,
        bias: jax.Array | None = None,
        expert_mask: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """`jax_ep.route` with the layer's options."""
        return route(
            logits,
            num_topk=self.group.config.num_topk,
            score=self.score,
            bias=bias,
            num_groups=self.num_groups,
            num_topk_groups=self.num_topk_groups,
            group_score=self.group_score,
            normalize=self.normalize,
            epsilon=self.epsilon,
            scale=self.scale,
            expert_mask=expert_mask,
        )

    @property
    def kind(self) -> Experts:
        """What experts compute."""
        assert self.experts is not None
        return self.experts

    @property
    def axes(self) -> WeightAxes:
        """Where the experts' weights are."""
        return WeightAxes(
            mesh=self.group.mesh,
            experts=self.group.axis_names,
            ffn=self.tensor_axes,
            hidden=self.fsdp_axes,
        )

    @property
    def token_axes(self) -> tuple[str, ...]:
        """Mesh axes over which the tokens are split where nothing else is said."""
        return (*(self.data_axes or ()), *self.group.axis_names)

    @property
    def has_placement(self) -> bool:
        """Whether experts may have copies."""
        return self.num_logical_experts is not None

    @property
    def num_routed(self) -> int:
        """`E`: experts that the router knows."""
        return self.num_logical_experts or self.group.config.num_experts

    @property
    def num_experts(self) -> int:
        """Experts that there are weights of: those that can be selected, padding, copies."""
        if self.replicas == "expanded":
            return self.num_routed
        return self.group.num_ranks * self.group.num_local_experts

    @property
    def is_explicit(self) -> bool:
        """Whether arrays on the group's mesh have shardings that a trace sees."""
        return AxisType.Explicit in self.group.mesh.axis_types

    @property
    def shared_kind(self) -> Gated | Ungated:
        """What shared experts compute: what the others do, if they are gated or ungated plainly."""
        if type(self.kind) in (Gated, Ungated):
            return self.kind  # type: ignore[return-value]
        return Gated(activation=self.activation)

    def params(self) -> dict[str, ArraySpec]:
        """The parameters by name."""
        config = self.group.config
        hidden, width = config.hidden, self.shared_ffn or 0
        specs: dict[str, ArraySpec] = {}
        if self.has_router:
            specs["router"] = self._whole((hidden, self.num_routed))
            if self.router_bias:
                specs["router_bias"] = self._whole((self.num_routed,))
        specs.update({name: self._array(dims, self.ffn) for name, dims in self.kind.dims().items()})
        if width:
            if isinstance(self.shared_kind, Gated):
                specs["shared_gate"] = self._array(("hidden", "ffn"), width)
            specs["shared_up"] = self._array(("hidden", "ffn"), width)
            specs["shared_down"] = self._array(("ffn", "hidden"), width)
        if self.shared_gate:
            specs["shared_expert_gate"] = dataclasses.replace(
                self._whole((hidden, 1)), dtype=self.param_dtype
            )
        return specs

    def _whole(self, shape: tuple[int, ...]) -> ArraySpec:
        nothing = (None,) * len(shape)
        names = None if self.partition_names is None else nothing
        return ArraySpec(shape=shape, dtype=_FLOAT32, partition=nothing, dims=nothing, names=names)

    def _array(self, dims: Dims, ffn: int) -> ArraySpec:
        sizes: dict[Dim, int] = {
            "experts": self.num_experts,
            "hidden": self.group.config.hidden,
            "ffn": ffn,
        }
        names = None
        if self.partition_names is not None:
            known: dict[Any, str | None] = dict(self.partition_names)
            names = tuple(known.get(dim) for dim in dims)
        return ArraySpec(
            shape=tuple(dim if isinstance(dim, int) else sizes[dim] for dim in dims),
            dtype=self.param_dtype,
            partition=tuple(map(self.axes.entry, dims)),
            dims=dims,
            names=names,
        )

    def bias(self) -> ArraySpec:
        """The selection bias."""
        return self._whole((self.num_routed,))

    def stats(self) -> dict[str, ArraySpec]:
        """The fields of `LayerStats` that every call leaves."""
        num, int32 = self.num_routed, np.dtype(np.int32)
        is_split = not self.has_placement and num == self.num_experts
        experts = self.axes.entry("experts") if is_split else None
        return {
            "tokens_per_expert": ArraySpec(shape=(num,), dtype=int32, partition=(experts,)),
            "num_dropped": ArraySpec(shape=(), dtype=int32, partition=()),
            "load_balance_loss": ArraySpec(shape=(), dtype=_FLOAT32, partition=()),
            "router_z_loss": ArraySpec(shape=(), dtype=_FLOAT32, partition=()),
        }


def as_names(names: Mapping[str, str | None] | None) -> tuple[tuple[str, str | None], ...] | None:
    """`partition_names` in a form that can be hashed."""
    return None if names is None else tuple(sorted(names.items()))


def is_own_router(router: Any) -> bool:
    """Whether a layer has the router that is built in; raises where it can have none."""
    if router is not None and not callable(router):
        raise ValueError(
            f"router is a {type(router).__name__}; allowed: None, or a function or module of x"
        )
    return router is None


def _check_int(name: str, value: Any, minimum: int) -> None:
    if not is_int(value, minimum):
        raise ValueError(f"{name} is {value!r}; allowed: an int, at least {minimum}")


def _one_of(name: str, value: Any, allowed: Sequence[str]) -> Any:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; allowed: {', '.join(map(repr, allowed))}")
    return value


def _data_axes(
    group: EpGroup, asked: Sequence[str] | None, tensor_axes: tuple[str, ...]
) -> tuple[str, ...]:
    taken = (*group.axis_names, *tensor_axes)
    others = tuple(name for name in group.mesh.axis_names if name not in taken)
    if asked is None:
        return others
    axes = (asked,) if isinstance(asked, str) else tuple(asked)
    if len(set(axes)) != len(axes) or not set(axes) <= set(others):
        raise ValueError(
            f"data_axes is {asked!r}; allowed: None, or distinct axes of the mesh that are not "
            f"the group's: {others}"
        )
    return axes


def updated_bias(bias: jax.Array, tokens_per_expert: jax.Array, rate: float) -> jax.Array:
    """`jax_ep.update_bias` of one layer, or of layers stacked along leading axes."""
    update = functools.partial(update_bias, rate=rate)
    for _ in range(bias.ndim - 1):
        update = jax.vmap(update)
    return update(bias, tokens_per_expert)
