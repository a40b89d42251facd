# SPDX-License-Identifier: Apache-2.0
"""Meshes of 8 devices on which blocks are tried, and where tokens and weights are on them."""

import dataclasses

from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from ep_testing.programs import make_mesh


@dataclasses.dataclass(frozen=True, kw_only=True)
class Placement:
    """A mesh, and which of its axes are for what; experts are over "expert".

    Attributes:
        shape: of the mesh.
        names: of its axes.
        token_spec: of `[B, S, H]` tokens.
        tensor_axes: over which `F` is split.
        fsdp_axes: over which `H` of the weights is split.
    """

    shape: tuple[int, ...]
    names: tuple[str, ...]
    token_spec: P
    tensor_axes: tuple[str, ...] = ()
    fsdp_axes: tuple[str, ...] = ()

    def mesh(self) -> Mesh:
        """The mesh, of CPU devices."""
        return make_mesh(self.shape, self.names)

    @property
    def axes(self) -> dict[str, object]:
        """As arguments of `sharded_moe` and of the layers."""
        names = ("token_spec", "tensor_axes", "fsdp_axes")
        return {name: getattr(self, name) for name in names}


# 4 sequences for 8 devices: half of them have padding only.
DATA = Placement(shape=(2, 4), names=("data", "expert"), token_spec=P(("data", "expert")))

TENSOR = Placement(
    shape=(2, 2, 2),
    names=("fsdp", "tensor", "expert"),
    token_spec=P(("fsdp", "expert")),
    tensor_axes=("tensor",),
    fsdp_axes=("fsdp",),
)

# The same; tokens are split over the tensor axis, too, as sequence parallelism leaves them.
TENSOR_SEQUENCE = dataclasses.replace(TENSOR, token_spec=P(("fsdp", "expert"), "tensor"))

SEQUENCE = Placement(
    shape=(2, 4), names=("sequence", "expert"), token_spec=P(None, ("sequence", "expert"))
)

BATCH_AND_SEQUENCE = dataclasses.replace(SEQUENCE, token_spec=P("expert", "sequence"))

PLACEMENTS = {
    "data": DATA,
    "tensor": TENSOR,
    "tensor_sequence": TENSOR_SEQUENCE,
    "sequence": SEQUENCE,
    "batch_and_sequence": BATCH_AND_SEQUENCE,
}
