# SPDX-License-Identifier: Apache-2.0
"""What a backend works out from the routing, before any row travels."""

from typing import Any, NamedTuple

from jax_ep._src.types import DispatchHandle

# An array; in the rules of a primitive its shape, its tangent, or what stands for it in MLIR.
Value = Any


class Plan(NamedTuple):
    """Where every selection's row is. Fields as in `DispatchHandle`."""

    topk_idx: Value | None
    slot: Value
    row_source: Value
    row_topk_idx: Value | None
    source_slot: Value | None = None
    arrival_slot: Value | None = None
    arrival_topk: Value | None = None
    rank_mask: Value | None = None

    @classmethod
    def of(cls, handle: DispatchHandle) -> "Plan":
        """The plan of the dispatch that made a handle."""
        return cls(**{name: getattr(handle, name) for name in cls._fields})

    def unweighted(self) -> "Plan":
        """What is read of it where there are no weights: the exchanges that are linear."""
        return self._replace(row_topk_idx=None)


class Counts(NamedTuple):
    """How many rows there are. Fields as in `Dispatched`."""

    group_sizes: Value
    tokens_per_expert: Value
    num_dropped: Value
