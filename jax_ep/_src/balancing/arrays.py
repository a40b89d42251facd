# SPDX-License-Identifier: Apache-2.0
"""`PlacementArrays`: the placement of one layer as it travels to devices."""

import dataclasses
from typing import Any

import jax
import numpy as np

from jax_ep._src.checks import check_array
from jax_ep._src.groups.group import EpGroup
from jax_ep._src.public import set_module


@set_module("jax_ep")
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PlacementArrays:
    """The placement of one layer on devices: a pytree, for `place`.

    It is small, and an operand: a new placement with arrays of the same shapes compiles nothing.

    Attributes:
        slot_expert: `[P]` int32, the logical expert of each slot, or -1.
        copies: `[E, J]` int32, the slots of each expert, ascending; -1 behind.
        upper: `[E, J]` int32, where the share of each copy ends, in 2^-16; that of the last copy
            65536, -1 behind.
        num_ranks: `R` of the placement, static, which has to be the group's. None: not known.
    """

    slot_expert: jax.Array
    copies: jax.Array
    upper: jax.Array
    num_ranks: int | None = dataclasses.field(default=None, metadata={"static": True})


def check_ranks(name: str, arrays: PlacementArrays, num_ranks: int) -> None:
    """Raises unless a placement is for so many ranks, as far as it says."""
    if arrays.num_ranks not in (None, num_ranks):
        raise ValueError(
            f"{name} is a placement for {arrays.num_ranks} ranks; allowed: one for the group's "
            f"{num_ranks}"
        )


def check_placement(name: str, arrays: Any, group: EpGroup) -> None:
    """Raises unless a placement is for the group's ranks and experts, which are its slots."""
    if not isinstance(arrays, PlacementArrays):
        raise ValueError(
            f"{name} is a {type(arrays).__name__}; allowed: a PlacementArrays, as "
            "ExpertPlacement.layer gives it"
        )
    check_ranks(name, arrays, group.num_ranks)
    int32, slots = np.dtype(np.int32), (group.config.num_experts,)
    of = ", a slot for each of EpConfig.num_experts"
    check_array(f"{name}.slot_expert", arrays.slot_expert, slots, int32, of=of)
    check_array(f"{name}.copies", arrays.copies, ("E", "J"), int32)
    check_array(f"{name}.upper", arrays.upper, arrays.copies.shape, int32, of=f", as {name}.copies")
