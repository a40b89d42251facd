# SPDX-License-Identifier: Apache-2.0
"""What the NNX and the Linen layer share: everything but how parameters and statistics are kept.

A layer is called on global arrays and opens `jax.shard_map` itself, over all axes of the group's
mesh. Tokens are split over the data axes and the expert axes, experts over the expert axes, all
else is on every device.
"""

import dataclasses
import functools
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jax_ep._src import compat
from jax_ep._src.group import EpGroup, kept
from jax_ep._src.moe import Activation, moe_with_stats
from jax_ep._src.routing import Score, load_balance_loss, route, router_z_loss, update_bias

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
        if not isinstance(self.group, EpGroup):
            raise ValueError(f"group is a {type(self.group).__name__}; allowed: an EpGroup")
        if self.group.config.layout != "expert":
            raise ValueError(
                f"group has EpConfig.layout {self.group.config.layout!r}; allowed for MoE: 'expert'"
            )
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
        jax.eval_shape(self._route, logits)

    def _route(
        self, logits: jax.Array, bias: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
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


def _check_int(name: str, value: Any, least: int) -> None:
    is_int = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not is_int or value < least:
        raise ValueError(f"{name} is {value!r}; allowed: an int, at least {least}")


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


# --- the computation ---------------------------------------------------------------------------


def apply(
    spec: LayerSpec, params: Mapping[str, jax.Array], bias: jax.Array | None, x: jax.Array
) -> tuple[jax.Array, LayerStats]:
    """Runs the layer on a global array.

    Args:
        spec: of the layer.
        params: by the names of `spec.params()`.
        bias: `[E]` float32, see `jax_ep.route`, or None.
        x: `[..., H]`, floating point.

    Returns:
        `[..., H]` of `config.dtype`, and statistics.

    Raises:
        ValueError: `x` does not fit the group's config, or the call is inside of `shard_map` or of
            another mesh.
        EpGroupClosed: the group has been closed.
    """
    spec.group.check_open()
    _check_context(spec.group.mesh)
    x = compat.as_array(x)
    num_tokens = _check_tokens(spec, x)
    shards, hidden = spec.num_token_shards, spec.group.config.hidden
    if x.ndim > 1 and x.shape[0] % shards == 0:
        return _jitted_blocks(spec, None)(dict(params), bias, x)
    # Tokens without a selection fill up what does not divide: they are sent nowhere.
    padded = -(-num_tokens // shards) * shards
    tokens = _reshard(spec, x, PartitionSpec()).reshape(-1, hidden)
    tokens = jnp.pad(tokens, ((0, padded - num_tokens), (0, 0)))
    out, stats = _jitted_blocks(spec, num_tokens)(dict(params), bias, tokens)
    out = _reshard(spec, out, PartitionSpec())[:num_tokens].reshape(x.shape)
    return _reshard_like(spec, out, x), stats


def _check_context(mesh: jax.sharding.Mesh) -> None:
    """Raises where `shard_map` over the group's mesh cannot be opened."""
    context = jax.sharding.get_abstract_mesh()
    if context.manual_axes:
        raise ValueError(
            f"an MoE layer is called inside of jax.shard_map over the axes {context.manual_axes}; "
            "allowed: outside of it, because the layer opens one over the whole mesh of its group. "
            "Inside of one over at least the group's axes, call jax_ep.route and jax_ep.moe"
        )
    if not context.empty and context != mesh.abstract_mesh:
        raise ValueError(
            f"an MoE layer is called under a mesh (jax.set_mesh) that is {_show_mesh(context)}; "
            f"allowed: no mesh, or that of the layer's group, {_show_mesh(mesh)}. Make the group "
            "on the mesh that the program uses"
        )


def _show_mesh(mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> str:
    axes = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
    return "(" + ", ".join(f"{name}: {size} {kind.name}" for name, size, kind in axes) + ")"


def _check_tokens(spec: LayerSpec, x: Any) -> int:
    config = spec.group.config
    if not isinstance(x, (jax.Array, np.ndarray)):
        raise ValueError(f"x is a {type(x).__name__}; allowed: an array")
    is_right = x.ndim > 0 and x.shape[-1] == config.hidden
    if not is_right or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"x is {x.dtype}{list(x.shape)}; allowed: floating point, [..., {config.hidden}] as "
            "EpConfig.hidden says"
        )
    num_tokens = math.prod(x.shape[:-1])
    per_device = -(-num_tokens // spec.num_token_shards)
    if per_device > config.max_tokens_per_rank:
        raise ValueError(
            f"x is {x.dtype}{list(x.shape)}: {num_tokens} tokens, {per_device} on each of "
            f"{spec.num_token_shards} devices (axes {spec.token_axes}); allowed: up to "
            f"EpConfig.max_tokens_per_rank on each, which is {config.max_tokens_per_rank}"
        )
    return num_tokens


def _jitted_blocks(
    spec: LayerSpec, num_tokens: int | None
) -> Callable[..., tuple[jax.Array, LayerStats]]:
    """Compiled even where the model is not, and traced once for all layers that are alike."""

    # Not by static arguments, which JAX also has where it keeps no function: they hold the group.
    # Named like this because JAX names it in messages.
    def moe_layer(params: Any, selection_bias: Any, x: Any) -> tuple[jax.Array, LayerStats]:
        return _apply_blocks(spec, num_tokens, params, selection_bias, x)

    return kept(spec.group, (_apply_blocks, spec, num_tokens), lambda: jax.jit(moe_layer))


def _apply_blocks(
    spec: LayerSpec,
    num_tokens: int | None,
    params: dict[str, jax.Array],
    bias: jax.Array | None,
    x: jax.Array,
) -> tuple[jax.Array, LayerStats]:
    token_spec = PartitionSpec(spec.token_axes, *[None] * (x.ndim - 1))
    param_specs = {name: PartitionSpec(*p.partition) for name, p in spec.params().items()}
    params = {name: _reshard(spec, params[name], s) for name, s in param_specs.items()}
    stats_specs: Any = {name: PartitionSpec(*s.partition) for name, s in spec.stats().items()}
    blocks = jax.shard_map(
        functools.partial(_block, spec, num_tokens),
        mesh=spec.group.mesh,
        in_specs=(param_specs, PartitionSpec(), token_spec),
        out_specs=(token_spec, LayerStats(**stats_specs)),
    )
    if bias is not None:
        bias = _reshard(spec, bias, PartitionSpec())
    out, stats = blocks(params, bias, _reshard(spec, x, token_spec))
    return _reshard_like(spec, out, x), stats


def _block(
    spec: LayerSpec,
    num_tokens: int | None,
    params: dict[str, jax.Array],
    bias: jax.Array | None,
    x: jax.Array,
) -> tuple[jax.Array, LayerStats]:
    """One device's part: `x` is its tokens, `params` has its experts."""
    config = spec.group.config
    tokens = x.reshape(-1, config.hidden)
    # Not rounded to config.dtype: a small error in a score sends a token to another expert.
    with jax.named_scope("jax_ep.router"):
        logits = jnp.dot(
            tokens.astype(jnp.float32),
            params["router"].astype(jnp.float32),
            precision=jax.lax.Precision.HIGHEST,
        )
        topk_idx, topk_weights = spec._route(logits, bias)
    if num_tokens is not None:
        topk_idx = jnp.where(_is_token(spec, tokens.shape[0], num_tokens), topk_idx, -1)
    tokens = tokens.astype(config.dtype)
    weights = {name: w.astype(config.dtype) for name, w in params.items() if name != "router"}
    out, stats = moe_with_stats(
        tokens,
        topk_idx,
        topk_weights,
        weights["w_gate"],
        weights["w_up"],
        weights["w_down"],
        group=spec.group,
        activation=spec.activation,
    )
    if spec.num_shared_experts:
        with jax.named_scope("jax_ep.shared_experts"):
            gate = spec.activation(tokens @ weights["shared_gate"])
            out = out + (gate * (tokens @ weights["shared_up"])) @ weights["shared_down"]
    # Counts of no tokens are constants, which vary over no axis and could not be summed over any.
    tokens_per_expert, num_dropped = compat.as_varying(
        frozenset(spec.token_axes), stats.tokens_per_expert, stats.num_dropped
    )
    if spec.data_axes:
        tokens_per_expert = jax.lax.psum(tokens_per_expert, spec.data_axes)
    losses = functools.partial(load_balance_loss, score=spec.score), router_z_loss
    balance, z = (loss(logits, topk_idx, axis_name=spec.token_axes) for loss in losses)
    return out.reshape(x.shape), LayerStats(
        tokens_per_expert=tokens_per_expert,
        num_dropped=jax.lax.psum(num_dropped, spec.token_axes),
        load_balance_loss=balance,
        router_z_loss=z,
    )


def _is_token(spec: LayerSpec, block_tokens: int, num_tokens: int) -> jax.Array:
    """`[T, 1]` bool: whether a token is one of the caller's, not padding at the end."""
    first = jax.lax.axis_index(spec.token_axes) * block_tokens
    return (first + jnp.arange(block_tokens, dtype=first.dtype) < num_tokens)[:, None]


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
    return place(mesh, jnp.zeros(spec.shape, spec.dtype), spec)


def place(mesh: jax.sharding.Mesh, array: jax.Array, spec: ArraySpec) -> jax.Array:
    """Moves an array, in `jit` or not, to where the layer has it."""
    sharding = NamedSharding(mesh, PartitionSpec(*spec.partition))
    if AxisType.Explicit in mesh.axis_types:
        return jax.sharding.reshard(array, sharding)
    return jax.lax.with_sharding_constraint(array, sharding)


def _reshard(spec: LayerSpec, array: jax.Array, partition: PartitionSpec) -> jax.Array:
    """Moves an array where `shard_map` wants it; with automatic axes the compiler does that."""
    mesh = spec.group.mesh
    if AxisType.Explicit not in mesh.axis_types:
        return array
    return jax.sharding.reshard(array, NamedSharding(mesh, partition))


def _reshard_like(spec: LayerSpec, array: jax.Array, like: jax.Array) -> jax.Array:
    sharding = jax.typeof(like).sharding
    if AxisType.Explicit not in spec.group.mesh.axis_types or sharding.mesh.empty:
        return array
    return _reshard(spec, array, sharding.spec)
