# SPDX-License-Identifier: Apache-2.0
"""The fewest bytes that operations read and write in memory, and what they send to other ranks.

In memory rows alone: routing, slots, weights and flags are less than a hundredth of them.
"""

import dataclasses
import math

import numpy as np

from ep_bench.cases import HIDDEN, GpuCase, Rows

ROW = 2 * HIDDEN
FP8_ROW = HIDDEN + 4 * math.ceil(HIDDEN / 128)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Floor:
    """Bytes of all ranks together.

    Attributes:
        own: what the operation is about: its inputs read once, its outputs written once.
        through_heap: these, and what staging in the heap adds; docs/design/kernels.md has the
            steps.
    """

    own: int
    through_heap: int


def floor(operation: str, rows: Rows, *, fp8_wire: bool = False) -> Floor | None:
    """The bytes of an operation; None for the plan, which moves no rows.

    Args:
        operation: a key of `cases.OPERATIONS`.
        rows: what the routing moves.
        fp8_wire: whether dispatch sends FP8. Backward passes send bfloat16 in any case.
    """
    ends = (rows.tokens + rows.held) * ROW
    staged = rows.away + rows.home
    if operation == "dispatch" and fp8_wire:
        return Floor(own=ends, through_heap=ends + 2 * staged * FP8_ROW)
    # A row that stays is read from x once more, by its receiver.
    sent = ends + (2 * rows.away + rows.home) * ROW
    if operation == "dispatch":
        return Floor(own=ends, through_heap=sent)
    if operation in ("combine", "dispatch_vjp"):
        return Floor(own=ends, through_heap=ends + 2 * rows.away * ROW)
    if operation == "combine_vjp":
        # A dispatch that reads y's rows, too, where it writes its own.
        held = rows.held * ROW
        return Floor(own=ends + held, through_heap=sent + held)
    return None


# Index and weight of a selection.
SELECTION = 12


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traffic:
    """Bytes that a rank gets in one operation, the mean of all ranks.

    Attributes:
        logical: of each token that a rank gets, once, and of its selections there.
        wire: the same without what a rank gets from itself.
    """

    logical: float
    wire: float


def traffic(operation: str, case: GpuCase) -> Traffic | None:
    """The bytes of an operation; None for the plan, which moves no rows, and for several."""
    if operation in ("plan", "there_and_back"):
        return None
    row = FP8_ROW if operation == "dispatch" and case.wire_dtype else ROW
    destination = case.topk_idx // (case.num_experts // case.num_ranks)
    away = destination != np.arange(case.num_ranks)[:, None, None]
    rows, num_ranks = case.rows, case.num_ranks
    return Traffic(
        logical=((rows.away + rows.home) * row + away.size * SELECTION) / num_ranks,
        wire=(rows.away * row + int(away.sum()) * SELECTION) / num_ranks,
    )


def chain_length(operation: str, case: GpuCase, *, sample_s: float = 0.01) -> int:
    """Operations of a sample: as many as take about `sample_s` at 4 TB/s and 20 us each."""
    least = floor(operation, case.rows, fp8_wire=case.wire_dtype is not None)
    seconds = 20e-6 + (least.through_heap / 4e12 if least else 1e-6 * case.num_tokens / 40)
    return min(max(round(sample_s / seconds), 4), 300)
