# SPDX-License-Identifier: Apache-2.0
"""What a mutant is: an edit of the kernels' headers that the simulator must notice."""

import dataclasses

DEVICE = "csrc/device/"


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One edit.

    Attributes:
        name: what it takes away.
        path: of the header.
        old: text that occurs in it; the first occurrence after `after` is replaced.
        new: what it becomes.
        after: text before the position, if `old` occurs more than once.
        seeds: within how many scenarios it must be caught.
        harmless: the edit changes nothing that matters: no scenario may fail.
        mishaps: it is caught by scenarios in which something goes wrong, not by random ones.
        low_latency: it is one of the low-latency kernels.
        internode: it is one of the kernels between domains.
        by_counts: of these, it is one of the plan by counts.
        masks: it is caught by scenarios in which who takes part changes from step to step.
        absences: it is caught by stories of ranks that do not come and are left out.
        every_dtype: it is not seen in bfloat16 alone.
        in_plan_dispatch: it is seen in the kernel of a plan with its dispatch alone.
    """

    name: str
    path: str
    old: str
    new: str
    after: str = ""
    seeds: int = 40
    harmless: bool = False
    mishaps: bool = False
    low_latency: bool = False
    internode: bool = False
    by_counts: bool = False
    masks: bool = False
    absences: bool = False
    every_dtype: bool = False
    in_plan_dispatch: bool = False

    @property
    def in_bfloat16(self) -> bool:
        """Whether it is compiled for rows of bfloat16 alone, in less than half of the time."""
        return not (self.every_dtype or self.mishaps)
