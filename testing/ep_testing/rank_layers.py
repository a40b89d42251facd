# SPDX-License-Identifier: Apache-2.0
"""What ranks on GPUs run in several tests: layers under transformations, and many turns."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ep_launch.ranks import Case, RankRun, stacked
from ep_testing.problems import PROBLEMS, EpProblem
from ep_testing.rank_cases import case_of
from ep_testing.rank_programs import (
    chosen,
    jitted,
    scanned,
    turn_payload,
    turn_routing,
    two_groups,
)
from jax_ep import reference

LAYER = PROBLEMS["eight_ranks"].replace(num_tokens=40, hidden=48)
TURNS = EpProblem(
    name="turns", num_ranks=8, num_tokens=32, hidden=64, num_topk=4, num_experts=64, dtype="float32"
)

# Half of the exchanges are of few tokens, by the low-latency kernels.
MIXED_TURNS = TURNS.replace(name="mixed_turns", low_latency_tokens=8)


def check_turns(problem: EpProblem, runs: Sequence[RankRun], index: int, turns_each: int) -> int:
    """Checks case `index`, of `turns`; returns its rounds.

    No element was wrong in any turn, and each round's last turn is the oracle's.
    """
    rounds = stacked(runs, index)
    for number, (wrong, (idx, slot, row_source, rows, out)) in enumerate(rounds):
        np.testing.assert_array_equal(wrong, 0, "wrong elements, by rank")
        turn = (number + 1) * turns_each - 1
        ranks = range(problem.num_ranks)
        np.testing.assert_array_equal(idx, [turn_routing(problem, r, turn, np) for r in ranks])
        source = np.arange(problem.num_ranks * problem.num_tokens, dtype=np.int32)
        x = turn_payload(problem, source, turn, np).reshape(*idx.shape[:2], -1)
        want = reference.dispatch(x, idx, **problem.dispatch_kwargs())
        np.testing.assert_array_equal(slot, want.plan.slot)
        np.testing.assert_array_equal(row_source, want.plan.row_source)
        np.testing.assert_array_equal(rows, want.x)
        sums = np.where(idx >= 0, idx + 1, 0).sum(axis=-1, keepdims=True) * x
        np.testing.assert_array_equal(out, sums)
    return len(rounds)


def layer_cases(num_ranks: int, **changes: Any) -> list[Case]:
    """A layer in programs of all kinds; `changes` are fields of the problem."""
    problem = LAYER.replace(num_ranks=num_ranks, **changes)
    return [
        case_of(jitted, problem),
        case_of(scanned, problem),
        case_of(scanned, problem, remat=True),
        case_of(two_groups, problem),
        case_of(chosen, problem, how="cond"),
        case_of(chosen, problem, how="switch"),
        case_of(jitted, problem.replace(dtype="bfloat16", wire_dtype="float8_e4m3fn")),
    ]
