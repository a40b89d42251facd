# SPDX-License-Identifier: Apache-2.0
"""Arrays that a layer keeps: their shapes, where they are, and how they are made."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jax_ep._src.experts.matrices import Dims

Initializer = Callable[..., jax.Array]
# Entry of a partition: mesh axes, or None.
Entry = str | tuple[str, ...] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArraySpec:
    """One array that a layer keeps, or that its statistics are.

    Attributes:
        shape: of the global array.
        dtype: as it is stored.
        partition: mesh axes (or None) by dimension.
        dims: what each dimension is along, see `jax_ep.experts`.
        names: what metadata says of each dimension, if that is no mesh axes.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    partition: tuple[Entry, ...]
    dims: Dims = ()
    names: tuple[str | None, ...] | None = None

    @property
    def of_experts(self) -> bool:
        """Whether there is one for each expert."""
        return self.dims[:1] == ("experts",)

    @property
    def is_bias(self) -> bool:
        """Whether it has no matrices, but vectors."""
        return len(self.shape) - self.of_experts < 2

    def init(self, initializer: Initializer) -> Initializer:
        """An initializer of the whole array. Experts get independent values each; biases zeros."""
        if self.is_bias:
            return lambda key, shape, dtype: jnp.zeros(shape, dtype)
        if not self.of_experts:
            return initializer

        def init_experts(key: jax.Array, shape: Sequence[int], dtype: Any) -> jax.Array:
            # One by one, so that an initializer sees the fan-in and fan-out of one expert.
            keys = jax.random.split(key, shape[0])
            return jax.vmap(lambda k: initializer(k, tuple(shape[1:]), dtype))(keys)

        return init_experts


def everywhere(array: jax.Array) -> ArraySpec:
    """Of an array that all devices have."""
    return ArraySpec(shape=array.shape, dtype=array.dtype, partition=(None,) * array.ndim)


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
