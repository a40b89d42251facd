# SPDX-License-Identifier: Apache-2.0
"""Which part of the experts' weights is on which device.

Experts are split over the group's axes, "ffn" over the tensor axes (tensor parallelism, Shoeybi et
al. 2019, arXiv:1909.08053), "hidden" over the FSDP axes, along which weights are gathered before
they are used, and their gradients reduce-scattered (Rajbhandari et al. 2019, arXiv:1910.02054).
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from jax_ep._src.experts.bound import ExpertWeights
from jax_ep._src.experts.kinds import Experts
from jax_ep._src.experts.matrices import Dim, Dims


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightAxes:
    """Mesh axes by what a dimension of a weight is along; hashable.

    Attributes:
        mesh: of the group.
        experts: the group's.
        ffn: tensor axes.
        hidden: FSDP axes.
    """

    mesh: Mesh
    experts: tuple[str, ...]
    ffn: tuple[str, ...] = ()
    hidden: tuple[str, ...] = ()

    def entry(self, dim: Dim) -> str | tuple[str, ...] | None:
        """A partition's entry for a dimension."""
        names = self._axes(dim)
        return names[0] if len(names) == 1 else (names or None)

    def partition(self, dims: Dims) -> PartitionSpec:
        """Of an array."""
        return PartitionSpec(*map(self.entry, dims))

    def check(self, name: str, shape: Sequence[int], dims: Dims) -> None:
        """Raises ValueError unless the axes divide an array's dimensions."""
        for size, dim in zip(shape, dims, strict=True):
            axes = self._axes(dim)
            count = math.prod(self.mesh.shape[axis] for axis in axes)
            if size % count:
                argument = {"ffn": "tensor_axes", "hidden": "fsdp_axes"}.get(str(dim), "group")
                raise ValueError(
                    f"{argument} has the axes {axes} with {count} devices, and {name} is "
                    f"{list(shape)}; allowed: axes that divide {size}, its dimension of {dim!r}"
                )

    def _axes(self, dim: Dim) -> tuple[str, ...]:
        return getattr(self, dim) if isinstance(dim, str) else ()

    def gather(self, array: jax.Array, dims: Dims) -> jax.Array:
        """Inside of `shard_map`: an array with all of what is along "hidden"."""
        if not self.hidden:
            return array
        for axis, dim in enumerate(dims):
            if dim == "hidden":
                array = jax.lax.all_gather(array, self.hidden, axis=axis, tiled=True)
        return array

    def only_on_first(self, array: jax.Array) -> jax.Array:
        """Inside of `shard_map`: an array, zeros but on the first device of the tensor axes."""
        if not self.ffn:
            return array
        is_first = jax.lax.axis_index(self.ffn) == 0
        return jnp.where(is_first, array, jnp.zeros((), array.dtype))


def check_axes(mesh: Mesh, name: str, asked: Any, taken: Sequence[str]) -> tuple[str, ...]:
    """Names of axes as a tuple; raises unless they are distinct ones that may be taken."""
    is_axes = asked is None or isinstance(asked, (str, tuple, list))
    axes = (asked,) if isinstance(asked, str) else tuple((asked or ()) if is_axes else ())
    free = tuple(axis for axis in mesh.axis_names if axis not in taken)
    if not is_axes or len(set(axes)) != len(axes) or not set(axes) <= set(free):
        raise ValueError(f"{name} is {asked!r}; allowed: distinct axes of the mesh out of {free}")
    return axes


def expert_specs(axes: WeightAxes, experts: ExpertWeights) -> ExpertWeights:
    """A `PartitionSpec` in the place of each array; raises where one does not divide."""
    leaves, tree = jax.tree_util.tree_flatten_with_path(experts)
    dims = experts.leaf_dims()
    for (path, leaf), entries in zip(leaves, dims, strict=True):
        axes.check(f"experts{jax.tree_util.keystr(path)}", leaf.shape, entries)
    return jax.tree.unflatten(tree, [axes.partition(entries) for entries in dims])


def check_parts(kind: Experts, tensor_axes: tuple[str, ...]) -> None:
    """Raises where devices along tensor axes would compute the same, which would be added up."""
    if tensor_axes and not any("ffn" in dims for dims in kind.dims().values()):
        raise ValueError(
            f"tensor_axes is {tensor_axes}, and experts has no weight with a dimension 'ffn' to "
            "split over them; allowed: (), or dims that say which dimension is the inner one"
        )


def gather_experts(axes: WeightAxes, experts: ExpertWeights, dims: Sequence[Dims]) -> ExpertWeights:
    """Inside of `shard_map`: weights as the experts of this device use them.

    `dims` are `leaf_dims()` of the global arrays: of a device's part they may look otherwise.
    """
    leaves, tree = jax.tree.flatten(experts)
    whole = [axes.gather(leaf, d) for leaf, d in zip(leaves, dims, strict=True)]
    gathered: ExpertWeights = jax.tree.unflatten(tree, whole)
    biases = {
        name: jax.tree.map(axes.only_on_first, gathered.weights[name])
        for name in experts.kind.output_biases
        if name in gathered.weights
    }
    return dataclasses.replace(gathered, weights={**gathered.weights, **biases})
