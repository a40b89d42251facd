# SPDX-License-Identifier: Apache-2.0
"""Runs the work of a benchmark on ranks, by the launcher of the GPU tests."""

import os
import pathlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ep_launch.placement import Placement
from ep_launch.ranks import Case, failure_report, run_ranks

# Of one set of processes. Less than a piece of `make nvlink` may take, so that what was measured by
# then is reported.
DEADLINE_S = 480.0
# Of what is not ours and may never end: longer than it takes where it works.
DEADLINE_OF_OTHERS_S = 60.0


def run_on_ranks(
    work: Sequence[Case],
    num_ranks: int,
    placement: Placement,
    environment: Mapping[str, str],
    each: Callable[[int, list[Any]], None] | None = None,
    deadline: float = DEADLINE_S,
) -> list[list[Any]]:
    """Runs all work in one set of processes; the values of each item, by rank.

    Args:
        work: what to run.
        num_ranks: `R`.
        placement: of the ranks.
        environment: variables of the processes, beside this one's and its `XLA_FLAGS`.
        each: called with an item's number and its values, by rank, as soon as they are there.
        deadline: seconds after which the processes are killed, having said where they stand.

    Raises:
        RuntimeError: a rank failed; the message has the first one's traceback first.
    """
    with tempfile.TemporaryDirectory() as name:
        runs = run_ranks(
            work,
            num_ranks=num_ranks,
            folder=pathlib.Path(name),
            environment={
                "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
                **environment,
            },
            placement=placement,
            deadline=deadline,
            each=each,
        )
    if failure := failure_report(runs, work):
        raise RuntimeError(failure)
    return [[run.outcomes[i].value for run in runs] for i in range(len(work))]
