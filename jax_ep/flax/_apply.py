# SPDX-License-Identifier: Apache-2.0
"""What a layer of either flavor computes, from global arrays to global arrays.

It opens `jax.shard_map` itself, over all axes of the group's mesh. Tokens are split over the data
axes and the expert axes, on a mesh with explicit axes along the shards that `x` has.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jax_ep._src import compat
from jax_ep._src.checks import is_array
from jax_ep._src.groups.group import kept
from jax_ep._src.moe import moe
from jax_ep._src.routing import load_balance_loss, router_z_loss
from jax_ep.flax._layer import LayerSpec, LayerStats


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
    _check_tokens(spec, x)

    # Compiled even where the model is not, and traced once for all layers that are alike. Not by
    # static arguments, which JAX also has where it keeps no function: they hold the group. JAX
    # names the function and its arguments in messages.
    def moe_layer(params: Any, selection_bias: Any, x: Any) -> tuple[jax.Array, LayerStats]:
        run = _where_x_is if spec.is_explicit else _in_order
        return run(spec, params, selection_bias, x)

    return kept(spec.group, (apply, spec), lambda: jax.jit(moe_layer))(dict(params), bias, x)


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


def _check_tokens(spec: LayerSpec, x: Any) -> None:
    config = spec.group.config
    if not is_array(x):
        raise ValueError(f"x is a {type(x).__name__}; allowed: an array")
    is_right = x.ndim > 0 and x.shape[-1] == config.hidden
    # Numbers of 8 bits mean nothing without their scales.
    is_float = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize > 1
    if not is_right or not is_float:
        raise ValueError(
            f"x is {x.dtype}{list(x.shape)}; allowed: floating point of 16 bits or more, "
            f"[..., {config.hidden}] as EpConfig.hidden says"
        )
    num_tokens = math.prod(x.shape[:-1])
    per_device = -(-num_tokens // spec.num_token_shards)
    if per_device > config.max_tokens_per_rank:
        raise ValueError(
            f"x is {x.dtype}{list(x.shape)}: {num_tokens} tokens, {per_device} on each of "
            f"{spec.num_token_shards} devices (axes {spec.token_axes}); allowed: up to "
            f"EpConfig.max_tokens_per_rank on each, which is {config.max_tokens_per_rank}"
        )


# --- which device has which tokens -------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Split:
    """How dimension 0 of the tokens is split, and which of them are the caller's.

    Attributes:
        axes: mesh axes over which it is split.
        padded_axes: the last of them, that split something padded at its end.
        num_tokens: that something's length without the padding; None where there is none.
    """

    axes: tuple[str, ...]
    padded_axes: tuple[str, ...] = ()
    num_tokens: int | None = None


def _in_order(
    spec: LayerSpec, params: dict[str, jax.Array], bias: jax.Array | None, x: jax.Array
) -> tuple[jax.Array, LayerStats]:
    """Along the first dimension of `x` if that divides, else along all tokens in order."""
    axes, shards = spec.token_axes, spec.num_token_shards
    if x.ndim > 1 and x.shape[0] % shards == 0:
        return _run_blocks(spec, _Split(axes=axes), params, bias, x)
    # Tokens without a selection fill up what does not divide: they are sent nowhere.
    num_tokens = math.prod(x.shape[:-1])
    padded = -(-num_tokens // shards) * shards
    tokens = jnp.pad(x.reshape(-1, x.shape[-1]), ((0, padded - num_tokens), (0, 0)))
    split = _Split(axes=axes, padded_axes=axes, num_tokens=num_tokens)
    out, stats = _run_blocks(spec, split, params, bias, tokens)
    return out[:num_tokens].reshape(x.shape), stats


def _where_x_is(
    spec: LayerSpec, params: dict[str, jax.Array], bias: jax.Array | None, x: jax.Array
) -> tuple[jax.Array, LayerStats]:
    """Each shard of `x` along the axes that it has, so that no token moves to its rank.

    Token axes that `x` is not split over split each shard further, in order; axes that are none
    are gathered. The result is sharded like `x`.
    """
    mesh, hidden = spec.group.mesh, x.shape[-1]
    dims = _token_axes_of(spec, x)
    own = tuple(name for names in dims for name in names)
    others = tuple(name for name in spec.token_axes if name not in own)
    sizes = [
        size // math.prod(mesh.shape[name] for name in names)
        for size, names in zip(x.shape[:-1], dims, strict=True)
    ]
    num_tokens, parts = math.prod(sizes), math.prod(mesh.shape[name] for name in others)
    padded = -(-num_tokens // parts) * parts

    def flatten(block: jax.Array) -> jax.Array:
        return jnp.pad(block.reshape(-1, hidden), ((0, padded - num_tokens), (0, 0)))

    def unflatten(tokens: jax.Array) -> jax.Array:
        return tokens[:num_tokens].reshape(*sizes, hidden)

    where = PartitionSpec(*(names or None for names in dims), None)
    flat = PartitionSpec(own or None, None)
    tokens = jax.shard_map(flatten, mesh=mesh, in_specs=where, out_specs=flat)(
        _reshard(spec, x, where)
    )
    split = _Split(
        axes=(*own, *others),
        padded_axes=others,
        num_tokens=None if padded == num_tokens else num_tokens,
    )
    out, stats = _run_blocks(spec, split, params, bias, tokens)
    out = jax.shard_map(unflatten, mesh=mesh, in_specs=flat, out_specs=where)(
        _reshard(spec, out, flat)
    )
    sharding = jax.typeof(x).sharding
    return out if sharding.mesh.empty else _reshard(spec, out, sharding.spec), stats


def _token_axes_of(spec: LayerSpec, x: jax.Array) -> tuple[tuple[str, ...], ...]:
    """The token axes over which each dimension of `x` but the last is split."""
    sharding = jax.typeof(x).sharding
    entries = () if sharding.mesh.empty else tuple(sharding.spec)
    entries = (*entries, *[None] * x.ndim)[: x.ndim - 1]
    named = [(entry,) if isinstance(entry, str) else tuple(entry or ()) for entry in entries]
    return tuple(tuple(name for name in names if name in spec.token_axes) for names in named)


def _reshard(spec: LayerSpec, array: jax.Array, partition: PartitionSpec) -> jax.Array:
    """Moves an array where `shard_map` wants it; with automatic axes the compiler does that."""
    if not spec.is_explicit:
        return array
    return jax.sharding.reshard(array, NamedSharding(spec.group.mesh, partition))


# --- what each device does ---------------------------------------------------------------------


def _run_blocks(
    spec: LayerSpec,
    split: _Split,
    params: dict[str, jax.Array],
    bias: jax.Array | None,
    x: jax.Array,
) -> tuple[jax.Array, LayerStats]:
    token_spec = PartitionSpec(split.axes, *[None] * (x.ndim - 1))
    param_specs = {name: PartitionSpec(*p.partition) for name, p in spec.params().items()}
    params = {name: _reshard(spec, params[name], s) for name, s in param_specs.items()}
    stats_specs: Any = {name: PartitionSpec(*s.partition) for name, s in spec.stats().items()}
    blocks = jax.shard_map(
        functools.partial(_block, spec, split),
        mesh=spec.group.mesh,
        in_specs=(param_specs, PartitionSpec(), token_spec),
        out_specs=(token_spec, LayerStats(**stats_specs)),
    )
    if bias is not None:
        bias = _reshard(spec, bias, PartitionSpec())
    return blocks(params, bias, _reshard(spec, x, token_spec))


def _block(
    spec: LayerSpec,
    split: _Split,
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
        topk_idx, topk_weights = spec.route(logits, bias)
    if split.num_tokens is not None:
        is_token = _is_token(split, tokens.shape[0], split.num_tokens)
        topk_idx = jnp.where(is_token, topk_idx, -1)
    tokens = tokens.astype(config.dtype)
    weights = {name: w.astype(config.dtype) for name, w in params.items() if name != "router"}
    shared = functools.partial(_shared_experts, spec, weights) if spec.num_shared_experts else None
    out, stats = moe(
        tokens,
        topk_idx,
        topk_weights,
        *(weights[name] for name in ("w_gate", "w_up", "w_down")),
        group=spec.group,
        activation=spec.activation,
        overlap=shared,
        with_stats=True,
    )
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


def _shared_experts(
    spec: LayerSpec, weights: Mapping[str, jax.Array], tokens: jax.Array
) -> jax.Array:
    with jax.named_scope("jax_ep.shared_experts"):
        gate = spec.activation(tokens @ weights["shared_gate"])
        return (gate * (tokens @ weights["shared_up"])) @ weights["shared_down"]


def _is_token(split: _Split, block_tokens: int, num_tokens: int) -> jax.Array:
    """`[T, 1]` bool: whether a token is one of the caller's, not padding at the end."""
    first = jax.lax.axis_index(split.padded_axes) * block_tokens
    return (first + jnp.arange(block_tokens, dtype=first.dtype) < num_tokens)[:, None]
