# SPDX-License-Identifier: Apache-2.0
"""What `EpGroup` needs of the kinds of groups: `cpu.py`, `cuda.py` and `xla.py` are siblings here.

A module of a platform has `offer(parameters) -> Offer`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol

import jax

from jax_ep._src.config import EpConfig
from jax_ep._src.groups.health import EpHealth
from jax_ep._src.tuning.launches import Tuning
from jax_ep._src.tuning.lookup import TuningArgument


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupParameters:
    """What a group is made from. Fields as in `EpGroup`."""

    mesh: jax.sharding.Mesh
    axis_names: tuple[str, ...]
    config: EpConfig
    num_ranks: int
    warn_after: float
    timeout: float
    tuning: TuningArgument = None
    on_timeout: str = "error"

    @property
    def domain_size(self) -> int:
        """`D`, where it does not depend on where the ranks are."""
        return self.config.domain_size or self.num_ranks


class BackendGroup(Protocol):
    """What a backend keeps for an `EpGroup` while that is open.

    Attributes:
        group_id: by which the compiled module knows it; -1 where there is none.
        heap_bytes: bytes of GPU memory that each rank holds for its peers' rows.
        domain_size: `D`, consecutive ranks whose sum `combine` rounds before it adds the next.
        why_no_rank_mask: why calls cannot leave ranks out; None if they can.
        tuning: what it uses instead of the model's choices.
    """

    group_id: int
    heap_bytes: int
    domain_size: int
    why_no_rank_mask: str | None
    tuning: Tuning

    def health(self) -> EpHealth:
        """Whom the ranks of this process wait for."""
        ...

    def dispatches_in_halves(self, num_tokens: int, *, quantized: bool) -> bool:
        """Whether a dispatch of so many tokens on each rank, quantized or not, has two halves."""
        ...

    def combines_in_halves(self, num_tokens: int) -> bool:
        """The same of a combine."""
        ...

    def give_up_on(self, ranks: Sequence[int], group_indices: Sequence[int]) -> None:
        """From now on nobody waits for these ranks, where `on_timeout` is "mask"."""
        ...

    def close(self) -> None:
        """Frees it; called once, when no program that is running needs it."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Offer:
    """Whether a platform's own kernels can serve a group, and how.

    Attributes:
        why_not: why they cannot; None if they can.
        make: makes the group of this name.
    """

    why_not: str | None
    make: Callable[[str], BackendGroup]

    @classmethod
    def refusal(cls, why_not: str) -> "Offer":
        """Says that they cannot."""

        def make(name: str) -> BackendGroup:
            raise AssertionError(f"{name} cannot be made: {why_not}")

        return cls(why_not=why_not, make=make)
