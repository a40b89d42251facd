# SPDX-License-Identifier: Apache-2.0
"""What must be found when ranks of a masking group were lost: of the cases of `masking_ranks`."""

from typing import Any

import jax
import numpy as np

from ep_testing import assertions
from ep_testing.masking_ranks import problem_of
from ep_testing.missing_ranks import check, expert_outputs, missing_of
from ep_testing.problems import EpProblem
from jax_ep import reference

# Of a step of which nobody waits for anybody who is gone: far less, but ranks may take turns.
QUICK_S = 1.5
# More than a timer: the step itself, and threads that come late.
SLACK_S = 2.0


def check_nobody(problem: EpProblem, masking: Any, failing: Any) -> None:
    """The oracle's bits, and those of a group that fails; all ranks' values of `nobody`."""
    everybody = np.ones(problem.num_ranks, bool)
    _check_steps(problem, masking["steps"], everybody, None, of=everybody)
    _check_scan(problem, masking["scan"], everybody, None)
    pairs = zip([*masking["steps"], masking["scan"]], [*failing["steps"], failing["scan"]],
                strict=True)  # fmt: skip
    for got, want in pairs:
        (received, *sums), (plain, *plain_sums) = got["outs"], want["outs"]
        assert plain.missing_ranks is None
        same = [(received.x, plain.x), (received.weights, plain.weights)]
        same += [(received.handle.slot, plain.handle.slot)]
        same += [(a, b) for (a, _), (b, _) in zip(sums, plain_sums, strict=True)]
        for a, b in same:
            np.testing.assert_array_equal(assertions.bits(a), assertions.bits(b))


def check_killed(problem: EpProblem, value: Any, victim: int, timeout: float) -> None:
    """One timeout is waited, once; all values of `killed`."""
    here = _all_but(problem, victim)
    _check_before(problem, value, here)
    _check_steps(problem, value["found"], here, None, of=here)
    _check_seconds(value["found"][0], here, 0.9 * timeout, 2 * timeout)
    _check_without_it(problem, value, here)


def check_given_up(
    problem: EpProblem, value: Any, victim: int, timeout: float, after: float
) -> None:
    """Nobody waits longer than until it is told; all values of `given_up`."""
    here = _all_but(problem, victim)
    _check_before(problem, value, here)
    _check_steps(problem, value["found"], here, None, of=here)
    told, known = value["found"]
    assert after + SLACK_S < timeout
    _check_seconds(told, here, 0.9 * after, after + SLACK_S)
    _check_seconds(known, here, 0, QUICK_S)
    _check_without_it(problem, value, here)


def check_late(problem: EpProblem, value: Any, victim: int, timeout: float) -> None:
    """The others go on, and it comes back; all values of `late`."""
    here, everybody = _all_but(problem, victim), np.ones(problem.num_ranks, bool)
    _check_steps(problem, value["before"], everybody, None, of=everybody)
    others = _without(value, victim)
    _check_steps(problem, others["found"], here, None, of=here)
    _check_seconds(others["found"][0], here, 0.9 * timeout, 2 * timeout)
    _check_left(problem, others, here)
    _check_steps(problem, value["again"], everybody, None, of=everybody)


def check_killed_in_kernels(
    problem: EpProblem, value: Any, victim: int, timeout: float
) -> tuple[str, str, str]:
    """Of two ranks: all that one has is as with the other or as without it; which it was.

    Values of `killed_in_kernels`. Returns how dispatch and combines have found it: "there",
    "missing" or "torn", which is after its routing had come.
    """
    assert problem.num_ranks == 2
    here, survivor = _all_but(problem, victim), 1 - victim
    _check_before(problem, value, here)
    (step,) = value["found"]
    _check_seconds(step, here, 0.9 * timeout, 2 * timeout + SLACK_S)
    of_step = problem_of(problem, int(step["number"][survivor]))
    found = _check_whole(of_step, step["outs"], survivor)
    _check_without_it(problem, value, here)
    return found


def _check_whole(problem: EpProblem, outs: Any, survivor: int) -> tuple[str, str, str]:
    received, *combined = outs
    victim, y = 1 - survivor, expert_outputs(problem)
    without = missing_of(np.arange(2) == survivor)
    args = problem.x, problem.topk_idx, problem.topk_weights
    there = reference.dispatch(*args, **problem.dispatch_kwargs())
    missing = reference.dispatch(*args, **problem.dispatch_kwargs(), missing=without)
    is_missing = bool(received.missing_ranks[survivor, victim])
    row_source = np.asarray(received.handle.row_source)[survivor]
    is_torn = is_missing and not np.array_equal(row_source, missing.plan.row_source[survivor])
    want = missing if is_missing and not is_torn else there
    empty = np.zeros(row_source.shape, bool)
    if is_torn:  # its rows keep their places
        empty = want.plan.row_source[survivor] // problem.num_tokens == victim
    rows = {
        "row_source": (row_source, np.where(empty, -1, want.plan.row_source[survivor])),
        "x": (received.x[survivor], np.where(empty[:, None], 0, want.x[survivor])),
        "weights": (received.weights[survivor], np.where(empty, 0, want.weights[survivor])),
        "group_sizes": (received.group_sizes[survivor], want.group_sizes[survivor]),
        "tokens": (received.tokens_per_expert[survivor], want.tokens_per_expert[survivor]),
        "dropped": (received.num_dropped[survivor], want.num_dropped[survivor]),
    }
    if not is_torn:
        rows["slot"] = received.handle.slot[survivor], want.plan.slot[survivor]
    found = ["torn" if is_torn else "missing" if is_missing else "there"]
    for name, weights, (out, lost) in zip(
        ("weighted", "unweighted"), (want.weights, None), combined, strict=True
    ):
        is_lost = bool(lost[survivor, victim])
        found.append("missing" if is_lost else "there")
        sums = reference.combine(
            y, want.plan, weights, dtype=problem.np_dtype,
            missing=without if is_lost or is_missing else np.zeros_like(without),
        )  # fmt: skip
        rows[name] = out[survivor], sums[survivor]
    print("dispatch, weighted and unweighted combine:", *found)
    assert "missing" in found or "torn" in found
    for name, (got, wanted) in rows.items():
        got = np.asarray(got)
        wanted = np.asarray(wanted).astype(got.dtype)
        np.testing.assert_array_equal(assertions.bits(got), assertions.bits(wanted), name)
    return found[0], found[1], found[2]


def _all_but(problem: EpProblem, victim: int) -> np.ndarray:
    return np.arange(problem.num_ranks) != victim


def _without(value: Any, victim: int) -> Any:
    """The values, zeros for one rank: what it has is not looked at."""

    def cleared(a: np.ndarray) -> np.ndarray:
        a = np.array(a)
        a[victim] = 0
        return a

    return jax.tree.map(cleared, value)


def _check_before(problem: EpProblem, value: Any, here: np.ndarray) -> None:
    _check_steps(problem, value["before"], np.ones_like(here), None, of=here)


def _check_without_it(problem: EpProblem, value: Any, here: np.ndarray) -> None:
    _check_left(problem, value, here)
    _check_scan(problem, value["scan"], here, here)
    _check_seconds(value["scan"], here, 0, QUICK_S)
    print("closed after", value["closed_s"][here], "s")


def _check_left(problem: EpProblem, value: Any, here: np.ndarray) -> None:
    _check_steps(problem, value["left"], here, here, of=here)
    for step in value["left"]:
        _check_seconds(step, here, 0, QUICK_S)


def _check_steps(
    problem: EpProblem, steps: Any, here: np.ndarray, mask: np.ndarray | None, *, of: np.ndarray
) -> None:
    for step in steps:
        (number,) = set(np.asarray(step["number"])[of].tolist())
        check(problem_of(problem, number), step["outs"], here, mask, of=of)


def _check_scan(problem: EpProblem, scan: Any, here: np.ndarray, mask: np.ndarray | None) -> None:
    for turn in range(scan["outs"][1][0].shape[1]):
        outs = jax.tree.map(lambda a, turn=turn: np.asarray(a)[:, turn], scan["outs"])
        check(problem_of(problem, turn), outs, here, mask)


def _check_seconds(step: Any, of: np.ndarray, least: float, most: float) -> None:
    seconds = np.asarray(step["seconds"])[of]
    print(f"{seconds} s, expected {least:g} to {most:g}")
    assert (seconds >= least).all()
    assert (seconds < most).all()
