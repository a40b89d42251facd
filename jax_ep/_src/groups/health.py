# SPDX-License-Identifier: Apache-2.0
"""`EpHealth`: whom a group's ranks wait for."""

import dataclasses

from jax_ep._src.public import set_module


@set_module("jax_ep")
@dataclasses.dataclass(frozen=True, kw_only=True)
class EpHealth:
    """What a group's ranks of this process wait for at one moment; of several waits, the longest.

    Attributes:
        waiting_for: the ranks that have not come, ascending; empty if nobody waits.
        seconds: since when the first rank has waited; 0.0 if nobody waits.
        operation: "plan_dispatch" (what `dispatch` calls), "plan", "dispatch" or "combine"; on CPU
            also a half of one, such as "dispatch_done"; None if nobody waits.
        group_index: position of the ranks' EP group along the mesh's other axes; None if nobody
            waits.
        root: what is known of why the ranks have not come; None if nobody waits.
        exchange: number of the exchange in the group's life, on GPUs; None elsewhere.
        aborted: why a rank gave up, on GPUs, where the group serves no calls from then on; None if
            none has.
    """

    waiting_for: tuple[int, ...] = ()
    seconds: float = 0.0
    operation: str | None = None
    group_index: int | None = None
    root: str | None = None
    exchange: int | None = None
    aborted: str | None = None

    @property
    def ok(self) -> bool:
        """Whether nobody waits and no rank has given up; ranks wait a moment in every exchange."""
        return not self.waiting_for and self.aborted is None
