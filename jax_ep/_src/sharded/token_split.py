# SPDX-License-Identifier: Apache-2.0
"""Which device works on which tokens of a global array, and `shard_map` over them.

Dimensions that do not divide are padded. Axes that should split the tokens, but split none of the
array's dimensions, split each shard further, in order.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jax_ep._src import compat
from jax_ep._src.groups.group import EpGroup

# By name: arrays whose first dimensions are the tokens'.
Tokens = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenSplit:
    """How tokens of a shape are spread over a mesh.

    Attributes:
        mesh: of the group.
        shape: of the tokens: that of `x` without its last dimension.
        dims: for each dimension of the shape, the mesh axes that split it.
        others: axes that split each shard further.
        gathered: those of the axes in `dims` along which devices work on all of each other's
            tokens, each on its part of the experts' weights, and share out the sums.
    """

    mesh: Mesh
    shape: tuple[int, ...]
    dims: tuple[tuple[str, ...], ...]
    others: tuple[str, ...] = ()
    gathered: tuple[str, ...] = ()

    @property
    def own(self) -> tuple[str, ...]:
        """Axes that split a dimension."""
        return tuple(name for names in self.dims for name in names)

    @property
    def axes(self) -> tuple[str, ...]:
        """Axes along which devices work on other tokens."""
        return tuple(n for n in (*self.own, *self.others) if n not in self.gathered)

    @property
    def padded_shape(self) -> tuple[int, ...]:
        """The shape, with dimensions that divide."""
        counts = [self._count(names) for names in self.dims]
        return tuple(
            -(-size // count) * count for size, count in zip(self.shape, counts, strict=True)
        )

    @property
    def shard_shape(self) -> tuple[int, ...]:
        """That of one shard along the dimensions."""
        counts = [self._count(names) for names in self.dims]
        return tuple(size // count for size, count in zip(self.padded_shape, counts, strict=True))

    @property
    def shard_tokens(self) -> int:
        """Tokens of a shard, so padded that `others` divide them."""
        parts = self._count(self.others)
        return -(-math.prod(self.shard_shape) // parts) * parts

    @property
    def is_padded(self) -> bool:
        """Whether there are tokens that are not the caller's."""
        return self.padded_shape != self.shape or self.shard_tokens != math.prod(self.shard_shape)

    @property
    def tokens_per_rank(self) -> int:
        """Tokens that a device passes to `dispatch`."""
        return self.shard_tokens // self._count(self.others) * self._count(self.gathered)

    def partition(self, ndim: int) -> PartitionSpec:
        """Of an array of tokens with so many dimensions."""
        entries = [names or None for names in self.dims]
        return PartitionSpec(*entries, *[None] * (ndim - len(entries)))

    def _count(self, names: tuple[str, ...]) -> int:
        return math.prod(self.mesh.shape[name] for name in names)


def split_by_spec(
    group: EpGroup,
    token_spec: Any,
    shape: tuple[int, ...],
    tensor_axes: tuple[str, ...],
    other_axes: tuple[str, ...] = (),
) -> TokenSplit:
    """How `token_spec` splits tokens of a shape; `other_axes` split them, too, if it does not.

    Raises:
        ValueError: it names something else than axes of the mesh for these dimensions, or leaves
            more tokens to a device than the group is made for.
    """
    mesh = group.mesh
    named = check_token_spec(mesh, token_spec)
    if any(token_spec[len(shape) :]):
        raise ValueError(
            f"token_spec is {token_spec}, and x has {len(shape) + 1} dimensions; allowed: axes for "
            "all but the last"
        )
    dims = partition_dims(token_spec, len(shape))
    wanted = (*other_axes, *group.axis_names)
    split = TokenSplit(
        mesh=mesh,
        shape=shape,
        dims=dims,
        others=tuple(name for name in wanted if name not in named),
        gathered=tuple(name for name in named if name in tensor_axes),
    )
    check_tokens_per_rank(group, split)
    return split


def check_token_spec(mesh: Mesh, token_spec: Any) -> tuple[str, ...]:
    """The axes that it names; raises unless they are distinct ones of the mesh."""
    if not isinstance(token_spec, PartitionSpec):
        raise ValueError(f"token_spec is {token_spec!r}; allowed: a jax.sharding.PartitionSpec")
    named = tuple(name for names in partition_dims(token_spec, len(token_spec)) for name in names)
    if len(set(named)) != len(named) or not set(named) <= set(mesh.axis_names):
        raise ValueError(
            f"token_spec is {token_spec}; allowed: distinct axes of the mesh, {mesh.axis_names}"
        )
    return named


def check_tokens_per_rank(group: EpGroup, split: TokenSplit) -> None:
    """Raises where a device has more tokens than the group is made for."""
    most = group.config.max_tokens_per_rank
    if split.tokens_per_rank > most:
        devices = math.prod(split.mesh.shape[name] for name in split.axes)
        raise ValueError(
            f"x has {math.prod(split.shape)} tokens, {split.tokens_per_rank} on each of {devices} "
            f"devices (axes {split.axes}); allowed: up to EpConfig.max_tokens_per_rank on each, "
            f"which is {most}"
        )


Body = Callable[[Tokens, Any], tuple[Tokens, Any]]


def run_on_tokens(
    body: Body,
    split: TokenSplit,
    tokens: Tokens,
    weights: Any,
    *,
    weight_specs: Any,
    stats_specs: Any,
    fills: dict[str, Any],
) -> tuple[Tokens, Any]:
    """Calls `body` on every device with its tokens and its part of the weights.

    Args:
        body: of tokens `[T, ...]` by name and weights, to tokens `[T, ...]` by name and statistics.
        split: of the tokens.
        tokens: global arrays by name, `[*split.shape, ...]`.
        weights: a pytree of global arrays.
        weight_specs: a `PartitionSpec` for each.
        stats_specs: a `PartitionSpec` for each of the statistics.
        fills: by name: what padding consists of; 0 for those that have none.

    Returns:
        What `body` returns, as global arrays.
    """
    mesh = split.mesh
    padding = [(0, p - s) for p, s in zip(split.padded_shape, split.shape, strict=True)]
    tokens = {
        name: _pad(array, [*padding, *[(0, 0)] * (array.ndim - len(padding))], fills.get(name, 0))
        for name, array in tokens.items()
    }
    where = {name: split.partition(array.ndim) for name, array in tokens.items()}
    tokens = {name: reshard(mesh, tokens[name], spec) for name, spec in where.items()}
    specs: Any = where
    flat = PartitionSpec(split.own or None)
    if split.others:
        flatten = functools.partial(_flatten, split, fills)
        tokens = jax.shard_map(flatten, mesh=mesh, in_specs=(where,), out_specs=flat)(tokens)
        specs = PartitionSpec((*split.own, *split.others))
        tokens = {name: reshard(mesh, array, specs) for name, array in tokens.items()}
    weights = jax.tree.map(functools.partial(reshard, mesh), weights, weight_specs)

    def on_device(tokens: Tokens, weights: Any) -> tuple[Tokens, Any]:
        if not split.others:
            tokens = _flatten(split, fills, tokens)
        out, stats = body(tokens, weights)
        return (out if split.others else _unflatten(split, out)), stats

    by_dims = split.partition(len(split.dims))
    out_specs = specs if split.others else by_dims
    out, stats = jax.shard_map(
        on_device, mesh=mesh, in_specs=(specs, weight_specs), out_specs=(out_specs, stats_specs)
    )(tokens, weights)
    if split.others:
        out = {name: reshard(mesh, array, flat) for name, array in out.items()}
        unflatten = functools.partial(_unflatten, split)
        out = jax.shard_map(unflatten, mesh=mesh, in_specs=(flat,), out_specs=by_dims)(out)
    return {name: _cut(split, array) for name, array in out.items()}, stats


def reshard(mesh: Mesh, array: jax.Array, partition: PartitionSpec) -> jax.Array:
    """Moves an array where `shard_map` wants it; with automatic axes the compiler does that."""
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    if AxisType.Explicit not in mesh.axis_types:
        return array

    def explicit(names: tuple[str, ...]) -> tuple[str, ...] | None:
        return tuple(name for name in names if kinds[name] == AxisType.Explicit) or None

    entries = partition_dims(partition, len(partition))
    spec = PartitionSpec(*map(explicit, entries))
    return jax.sharding.reshard(array, NamedSharding(mesh, spec))


def sharding_dims(array: jax.Array, ndim: int) -> tuple[tuple[str, ...], ...]:
    """The axes that split each of the first dimensions, by the array's type."""
    sharding = jax.typeof(array).sharding
    return partition_dims(() if sharding.mesh.empty else sharding.spec, ndim)


def partition_dims(spec: Any, ndim: int) -> tuple[tuple[str, ...], ...]:
    """The axes that split each of the first dimensions, by a `PartitionSpec`."""
    entries = (*tuple(spec), *[None] * ndim)[:ndim]
    return tuple((e,) if isinstance(e, str) else tuple(e or ()) for e in entries)


def _pad(array: jax.Array, padding: list[tuple[int, int]], fill: Any) -> jax.Array:
    if not any(after for _, after in padding):
        return array
    return jnp.pad(array, padding, constant_values=fill)


def _flatten(split: TokenSplit, fills: dict[str, Any], tokens: Tokens) -> Tokens:
    """Of one shard: `[T, ...]`, padded so that the other axes divide it."""
    lead = len(split.dims)

    def flatten(name: str, block: jax.Array) -> jax.Array:
        flat = block.reshape(-1, *block.shape[lead:])
        after = split.shard_tokens - flat.shape[0]
        return _pad(flat, [(0, after), *[(0, 0)] * (flat.ndim - 1)], fills.get(name, 0))

    return {name: flatten(name, block) for name, block in tokens.items()}


def _unflatten(split: TokenSplit, tokens: Tokens) -> Tokens:
    num = math.prod(split.shard_shape)
    return {
        name: array[:num].reshape(*split.shard_shape, *array.shape[1:])
        for name, array in tokens.items()
    }


def _cut(split: TokenSplit, array: jax.Array) -> jax.Array:
    if split.padded_shape == split.shape:
        return array
    # Explicit axes have no arrays whose shards differ in size.
    divides = [s == p for s, p in zip(split.shape, split.padded_shape, strict=True)]
    entries = [names or None if d else None for names, d in zip(split.dims, divides, strict=True)]
    array = reshard(split.mesh, array, PartitionSpec(*entries))
    return array[tuple(slice(size) for size in split.shape)]


def gather_tokens(split: TokenSplit, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Inside of `shard_map`: `[T, ...]`, tokens of all devices that work on them together."""
    if not split.gathered or not arrays[0].shape[0]:  # collectives of nothing are refused
        return arrays
    return tuple(jax.lax.all_gather(a, split.gathered, axis=0, tiled=True) for a in arrays)


def sum_of_parts(split: TokenSplit, out: jax.Array, tensor_axes: tuple[str, ...]) -> jax.Array:
    """`[T, ...]`: what devices along the tensor axes have computed in parts, added up.

    Where they have gathered their tokens, each gets the sums of its own.
    """
    whole = tuple(name for name in tensor_axes if name not in split.gathered)
    (out,) = compat.as_varying(frozenset(tensor_axes), out)
    if whole:
        out = jax.lax.psum(out, whole)
    if split.gathered and out.shape[0]:
        out = jax.lax.psum_scatter(out, split.gathered, scatter_dimension=0, tiled=True)
    return out
