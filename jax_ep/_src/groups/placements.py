# SPDX-License-Identifier: Apache-2.0
"""Which device is which rank of which of a mesh's EP groups."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np


class Placement(NamedTuple):
    """Where a rank of the mesh's groups is."""

    process: int
    device_id: int  # of the device among those of all processes
    device_ordinal: int  # of the device in its process
    group_index: int  # position along the mesh's other axes, row-major
    rank: int  # position along the group's axes, row-major in the order that they were given


def placements(mesh: jax.sharding.Mesh, axis_names: Sequence[str]) -> list[Placement]:
    """The ranks of all of the mesh's groups."""
    others = [name for name in mesh.axis_names if name not in axis_names]
    axes = [mesh.axis_names.index(name) for name in (*others, *axis_names)]
    num_ranks = math.prod(mesh.shape[name] for name in axis_names)
    by_group = np.transpose(mesh.devices, axes).reshape(-1, num_ranks)
    return [
        Placement(device.process_index, device.id, device.local_hardware_id, group_index, rank)
        for (group_index, rank), device in np.ndenumerate(by_group)
    ]


def has_local_devices(mesh: jax.sharding.Mesh) -> bool:
    """Whether a device of the mesh belongs to this process."""
    return any(device.process_index == jax.process_index() for device in mesh.devices.flat)
