# SPDX-License-Identifier: Apache-2.0
"""A group that collectives of XLA serve: it keeps nothing."""

from collections.abc import Sequence

from jax_ep._src.groups.health import EpHealth
from jax_ep._src.groups.interface import GroupParameters
from jax_ep._src.tuning.launches import Tuning


class XlaGroup:
    """A `BackendGroup` of no compiled module; attributes as there."""

    group_id = -1
    heap_bytes = 0
    tuning = Tuning()  # nothing

    def __init__(self, name: str, parameters: GroupParameters) -> None:
        """Takes the name that others use for messages."""
        del name
        self.domain_size = parameters.domain_size
        self.why_no_rank_mask = None

    def health(self) -> EpHealth:
        """Nothing is known."""
        return EpHealth()

    def dispatches_in_halves(self, num_tokens: int, *, quantized: bool) -> bool:
        """No."""
        del num_tokens, quantized
        return False

    def combines_in_halves(self, num_tokens: int) -> bool:
        """No."""
        del num_tokens
        return False

    def give_up_on(self, ranks: Sequence[int], group_indices: Sequence[int]) -> None:
        """Changes nothing: collectives wait for everybody."""
        del ranks, group_indices

    def close(self) -> None:
        """Has nothing to free."""
