# SPDX-License-Identifier: Apache-2.0
"""A group in the compiled module for CPU: ranks are devices of one process and share its memory."""

import functools
from collections.abc import Sequence

from jax_ep._src.groups import native, notices
from jax_ep._src.groups.bootstrap import mesh_digest, next_group_id
from jax_ep._src.groups.health import EpHealth
from jax_ep._src.groups.interface import GroupParameters, Offer
from jax_ep._src.groups.placements import placements
from jax_ep._src.tuning.launches import Tuning


def offer(parameters: GroupParameters) -> Offer:
    """Whether the handlers for CPU can serve a mesh of CPU devices."""
    return Offer(
        why_not=why_not(parameters), make=functools.partial(CpuGroup, parameters=parameters)
    )


def why_not(parameters: GroupParameters) -> str | None:
    if len({device.process_index for device in parameters.mesh.devices.flat}) > 1:
        return "on CPU it serves the devices of one process, and this mesh spans several"
    return native.why_unavailable()


class CpuGroup:
    """A `BackendGroup` in the compiled module for CPU.

    Attributes:
        group_id: the group's id in the compiled module.
        heap_bytes: 0, as ranks share an address space.
        domain_size: that of the config, or all ranks.
        why_no_rank_mask: None.
        tuning: nothing.
    """

    heap_bytes = 0
    tuning = Tuning()

    def __init__(self, name: str, parameters: GroupParameters) -> None:
        """Registers the group.

        Args:
            name: for messages.
            parameters: of the group.

        Raises:
            EpUnavailable: the compiled module does not load.
        """
        self._module = native.load()
        native.register_targets()
        notices.start(self._module)
        mesh, axis_names = parameters.mesh, parameters.axis_names
        self.group_id = next_group_id(mesh_digest(mesh, axis_names))
        self.domain_size = parameters.domain_size
        self.why_no_rank_mask = None
        self._module.create_group(
            group_id=self.group_id,
            name=name,
            num_ranks=parameters.num_ranks,
            warn_after_s=parameters.warn_after,
            timeout_s=parameters.timeout,
            ranks=[(p.device_id, p.group_index, p.rank) for p in placements(mesh, axis_names)],
        )

    def health(self) -> EpHealth:
        """Whom the ranks wait for: the wait that the compiled module names first."""
        waits = self._module.waits_of(self.group_id)
        if not waits:
            return EpHealth()
        group_index, operation, _, missing, seconds, root = waits[0]
        return EpHealth(
            waiting_for=tuple(missing),
            seconds=seconds,
            operation=operation,
            group_index=group_index,
            root=root,
        )

    def dispatches_in_halves(self, num_tokens: int, *, quantized: bool) -> bool:
        """Yes."""
        del num_tokens, quantized
        return True

    def combines_in_halves(self, num_tokens: int) -> bool:
        """Yes."""
        del num_tokens
        return True

    def give_up_on(self, ranks: Sequence[int], group_indices: Sequence[int]) -> None:
        """Ends the waits that are for these ranks alone, those to come too."""
        self._module.give_up_on(
            group_id=self.group_id, group_indices=list(group_indices), ranks=list(ranks)
        )

    def close(self) -> None:
        """Calls that come later fail."""
        self._module.close_group(self.group_id)
