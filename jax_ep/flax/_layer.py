# SPDX-License-Identifier: Apache-2.0
"""What the NNX and the Linen layer share: sizes, options, and which arrays they have where.

Experts are split over the expert axes; all else that a layer keeps is on every device.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jax_ep._src.checks import check_group
from jax_ep._src.groups.group import EpGroup
from jax_ep._src.limits import is_int
from jax_ep._src.moe import Activation
from jax_ep._src.routing import Score, route, update_bias

Initializer = Callable[..., jax.Array]
_FLOAT32 = np.dtype(np.float32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerStats:
    """What one call of a layer says about its routing, over all tokens of all devices.

    Attributes:
        tokens_per_expert: `[E]` int32, selections of each expert, before any drop.
        num_dropped: `[]` int32, of those the ones that found no room.
        load_balance_loss: `[]` float32, see `jax_ep.load_balance_loss`. Differentiable.
        router_z_loss: `[]` float32, see `jax_ep.router_z_loss`. Differentiable.
    """

    tokens_per_expert: jax.Array
    num_dropped: jax.Array
    load_balance_loss: jax.Array
    router_z_loss: jax.Array

    @classmethod
    def zeros(cls, num_experts: int) -> "LayerStats":
        """Those of a layer that has not been called."""
        return cls(
            tokens_per_expert=jnp.zeros((num_experts,), jnp.int32),
            num_dropped=jnp.zeros((), jnp.int32),
            load_balance_loss=jnp.zeros((), jnp.float32),
            router_z_loss=jnp.zeros((), jnp.float32),
        )

    def as_dict(self) -> dict[str, jax.Array]:
        """By name, in the order of the attributes."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArraySpec:
    """One array that a layer keeps, or that its statistics are.

    Attributes:
        shape: of the global array.
        dtype: as it is stored.
        partition: mesh axes (or None) by dimension.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    partition: tuple[str | tuple[str, ...] | None, ...]

    def init(self, initializer: Initializer) -> Initializer:
        """An initializer of the whole array. Experts get independent values each."""
        if len(self.shape) < 3:
            return initializer

        def init_experts(key: jax.Array, shape: Sequence[int], dtype: Any) -> jax.Array:
            # One by one, so that an initializer sees the fan-in and fan-out of one expert.
            keys = jax.random.split(key, shape[0])
            return jax.vmap(lambda k: initializer(k, tuple(shape[1:]), dtype))(keys)

        return init_experts


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """The static parameters of a layer; hashable. See `jax_ep.flax.nnx.MoE` for the fields."""

    group: EpGroup
    ffn: int
    num_shared_experts: int = 0
    activation: Activation = jax.nn.silu
    score: Score = "softmax"
    num_groups: int | None = None
    num_topk_groups: int | None = None
    normalize: bool = True
    scale: float = 1.0
    data_axes: tuple[str, ...] | None = None
    param_dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        check_group(self.group, expert_layout_for="MoE")
        _check_int("ffn", self.ffn, 1)
        _check_int("num_shared_experts", self.num_shared_experts, 0)
        object.__setattr__(self, "ffn", int(self.ffn))
        object.__setattr__(self, "num_shared_experts", int(self.num_shared_experts))
        object.__setattr__(self, "data_axes", _data_axes(self.group, self.data_axes))
        param_dtype = np.dtype(self.param_dtype)
        if not jnp.issubdtype(param_dtype, jnp.floating):
            raise ValueError(f"param_dtype is {param_dtype.name!r}; allowed: a floating point type")
        object.__setattr__(self, "param_dtype", param_dtype)
        # Bad routing options are reported here instead of at the first call.
        logits = jax.ShapeDtypeStruct((1, self.group.config.num_experts), _FLOAT32)
        jax.eval_shape(self.route, logits)

    def route(
        self, logits: jax.Array, bias: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """`jax_ep.route` with the layer's options."""
        return route(
            logits,
            num_topk=self.group.config.num_topk,
            score=self.score,
            bias=bias,
            num_groups=self.num_groups,
            num_topk_groups=self.num_topk_groups,
            normalize=self.normalize,
            scale=self.scale,
        )

    @property
    def expert_axes(self) -> tuple[str, ...]:
        """Mesh axes over which the experts are split."""
        return self.group.axis_names

    @property
    def token_axes(self) -> tuple[str, ...]:
        """Mesh axes over which the tokens are split."""
        return (*(self.data_axes or ()), *self.expert_axes)

    @property
    def num_token_shards(self) -> int:
        """Devices among which the tokens are split."""
        return math.prod(self.group.mesh.shape[name] for name in self.token_axes)

    @property
    def _experts(self) -> str | tuple[str, ...]:
        """Entry of a partition for a dimension of experts."""
        return self.expert_axes[0] if len(self.expert_axes) == 1 else self.expert_axes

    @property
    def is_explicit(self) -> bool:
        """Whether arrays on the group's mesh have shardings that a trace sees."""
        return AxisType.Explicit in self.group.mesh.axis_types

    def params(self) -> dict[str, ArraySpec]:
        """The parameters by name."""
        config = self.group.config
        hidden, ffn, shared = config.hidden, self.ffn, self.num_shared_experts * self.ffn

        def spec(shape: tuple[int, ...]) -> ArraySpec:
            partition = (self._experts, None, None) if len(shape) == 3 else (None, None)
            return ArraySpec(shape=shape, dtype=self.param_dtype, partition=partition)

        specs = {
            "router": dataclasses.replace(spec((hidden, config.num_experts)), dtype=_FLOAT32),
            "w_gate": spec((config.num_experts, hidden, ffn)),
            "w_up": spec((config.num_experts, hidden, ffn)),
            "w_down": spec((config.num_experts, ffn, hidden)),
        }
        if shared:
            specs["shared_gate"] = spec((hidden, shared))
            specs["shared_up"] = spec((hidden, shared))
            specs["shared_down"] = spec((shared, hidden))
        return specs

    def bias(self) -> ArraySpec:
        """The selection bias."""
        shape = (self.group.config.num_experts,)
        return ArraySpec(shape=shape, dtype=_FLOAT32, partition=(None,))

    def stats(self) -> dict[str, ArraySpec]:
        """The fields of `LayerStats`, as a call leaves them."""
        shape, int32 = (self.group.config.num_experts,), np.dtype(np.int32)
        return {
            "tokens_per_expert": ArraySpec(shape=shape, dtype=int32, partition=(self._experts,)),
            "num_dropped": ArraySpec(shape=(), dtype=int32, partition=()),
            "load_balance_loss": ArraySpec(shape=(), dtype=_FLOAT32, partition=()),
            "router_z_loss": ArraySpec(shape=(), dtype=_FLOAT32, partition=()),
        }


def _check_int(name: str, value: Any, minimum: int) -> None:
    if not is_int(value, minimum):
        raise ValueError(f"{name} is {value!r}; allowed: an int, at least {minimum}")


def _data_axes(group: EpGroup, asked: Sequence[str] | None) -> tuple[str, ...]:
    others = tuple(name for name in group.mesh.axis_names if name not in group.axis_names)
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


# --- where arrays are --------------------------------------------------------------------------


def zeros(mesh: jax.sharding.Mesh, spec: ArraySpec) -> jax.Array:
    """An array of zeros on the devices where the layer has it, not on the default one.

    Checkpoints are restored to where the arrays of the new model are, and stay there.
    """
    return with_sharding(mesh, jnp.zeros(spec.shape, spec.dtype), spec)


def with_sharding(mesh: jax.sharding.Mesh, array: jax.Array, spec: ArraySpec) -> jax.Array:
    """Moves an array, in `jit` or not, to where the layer has it."""
    sharding = NamedSharding(mesh, PartitionSpec(*spec.partition))
    if AxisType.Explicit in mesh.axis_types:
        return jax.sharding.reshard(array, sharding)
    return jax.lax.with_sharding_constraint(array, sharding)
