# SPDX-License-Identifier: Apache-2.0
"""A rank that dies or comes late in a group that goes on: the others do, with the oracle's bits.

As in `test_failures.py`, ranks run under MPS, and two with a context each on the same GPU. Only
there, and on GPUs of their own, is one killed while its kernels run: under MPS that would end the
other clients' kernels, too.
"""

import functools
import signal
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import pytest

from ep_launch.placement import Placement, count_gpus
from ep_launch.ranks import RankRun, failure_report, run_ranks, stacked
from ep_testing import masking_checks, masking_ranks
from ep_testing.graph_flags import DEFAULT, GRAPHS, NO_GRAPHS
from ep_testing.problems import EpProblem
from ep_testing.rank_cases import case_of

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(540)]

# Rows of three segments: enough for a rank to be lost in one.
PROBLEM = EpProblem(
    name="missing", num_ranks=3, num_tokens=4, num_topk=3, num_experts=12, hidden=2048,
    low_latency_tokens=4,
)  # fmt: skip
VICTIM = 1  # not 0: its process serves the others as JAX's coordinator
TIMEOUT_S = 4.0
# Where ranks are told long before.
LONG_S, TOLD_S = 10.0, 1.0
# JAX takes most of it to start; who is left has less, see `ranks.run_ranks`.
DEADLINE_S = 90.0
ENVIRONMENT = {"XLA_FLAGS": NO_GRAPHS}

OnSomeRanks = tuple[int, Callable[..., list[RankRun]]]


@pytest.fixture(autouse=True)
def needs_several_processes(placement):
    if placement is Placement.ONE_PROCESS:
        pytest.skip("a process that is lost takes all ranks with it")


@pytest.fixture
def num_ranks(placement) -> int:
    """Three, or as many as there are GPUs for."""
    if placement is Placement.SHARED:
        return 3
    if count_gpus() < 2:
        pytest.skip("one rank is not lost to others")
    return min(4, count_gpus())


@pytest.fixture(params=["placed", "own_context"])
def on_some_ranks(request, placement, num_ranks, mps, on_ranks, tmp_path) -> Iterator[OnSomeRanks]:
    """Runs ranks as placed, or two with a context each on the same GPU; and how many."""
    if request.param == "placed":
        yield num_ranks, functools.partial(on_ranks, environment=ENVIRONMENT)
        if mps:
            mps.restart()
    elif placement is not Placement.SHARED:
        pytest.skip("the same GPU is not what is tested now")
    else:
        yield 2, functools.partial(run_ranks, folder=tmp_path, environment=ENVIRONMENT)


@pytest.fixture
def on_two_ranks(placement, on_ranks, tmp_path) -> Callable[..., list[RankRun]]:
    """Runs two ranks, of which none ends the other's kernels."""
    if placement is Placement.SHARED:
        return functools.partial(run_ranks, folder=tmp_path, environment=ENVIRONMENT)
    if count_gpus() < 2:
        pytest.skip("one rank is not lost to others")
    return functools.partial(on_ranks, environment=ENVIRONMENT)


def _problem(num_ranks: int, **changes: Any) -> EpProblem:
    return PROBLEM.replace(num_ranks=num_ranks, num_experts=4 * num_ranks, **changes)


def _values(runs: list[RankRun], of: set[int]) -> Any:
    """What ranks have left of the one case, over all ranks; fails where one of them has nothing."""
    for run in runs:
        error = run.outcomes[0].error if run.outcomes else "no outcome"
        print(f"rank {run.rank}, exit code {run.exit_code}: {error}")
        if error:
            print(run.log)
    values = {run.rank: run.outcomes[0].value for run in runs if run.rank in of and run.outcomes}
    assert set(values) == of, "a rank did not end its case"
    assert not any(runs[rank].outcomes[0].error for rank in of), "a rank ended with an error"
    return masking_ranks.of_all(values, len(runs))


def _of_survivors(runs: list[RankRun]) -> Any:
    """What is left when the victim has been killed."""
    value = _values(runs, set(range(len(runs))) - {VICTIM})
    assert runs[VICTIM].exit_code == -signal.SIGKILL
    return value


@pytest.mark.parametrize("flags", [DEFAULT, GRAPHS], ids=["default", "graphs"])
def test_nobody_is_missing(flags, num_ranks, on_ranks):
    problems = [_problem(num_ranks, layout=layout) for layout in ("expert", "rank")]
    problems.append(_problem(num_ranks, dtype="bfloat16", wire_dtype="float8_e4m3fn"))
    cases = [
        case_of(masking_ranks.nobody, problem, on_timeout=on_timeout, timeout=30.0)
        for problem in problems
        for on_timeout in ("mask", "error")
    ]
    environment = {"XLA_FLAGS": flags}
    runs = on_ranks(cases, num_ranks=num_ranks, environment=environment, deadline=DEADLINE_S)
    assert failure_report(runs, cases) is None, failure_report(runs, cases)
    for i, problem in enumerate(problems):
        masking, failing = stacked(runs, 2 * i), stacked(runs, 2 * i + 1)
        masking_checks.check_nobody(problem, masking, failing)


def test_the_others_go_on_without_a_rank_that_is_killed(on_some_ranks):
    num_ranks, run = on_some_ranks
    problem = _problem(num_ranks)
    case = case_of(masking_ranks.killed, problem, victim=VICTIM, timeout=TIMEOUT_S)
    runs = run([case], num_ranks=num_ranks, deadline=DEADLINE_S)
    value = _of_survivors(runs)
    masking_checks.check_killed(problem, value, VICTIM, TIMEOUT_S)


def test_nobody_waits_for_a_killed_rank_that_is_given_up(on_some_ranks):
    num_ranks, run = on_some_ranks
    problem = _problem(num_ranks)
    kwargs = {"victim": VICTIM, "timeout": LONG_S, "after": TOLD_S}
    case = case_of(masking_ranks.given_up, problem, **kwargs)
    runs = run([case], num_ranks=num_ranks, deadline=DEADLINE_S)
    value = _of_survivors(runs)
    masking_checks.check_given_up(problem, value, VICTIM, LONG_S, TOLD_S)


def test_a_rank_that_is_late_comes_back(on_some_ranks):
    num_ranks, run = on_some_ranks
    problem = _problem(num_ranks)
    case = case_of(masking_ranks.late, problem, victim=VICTIM, timeout=TIMEOUT_S)
    runs = run([case], num_ranks=num_ranks, deadline=DEADLINE_S)
    value = _values(runs, set(range(num_ranks)))
    steps = [*value["found"], *value["left"]]
    for step in steps:
        received, *combined = step["outs"]
        missing = [received.missing_ranks, *(lost for _, lost in combined)]
        print("the late one,", step["seconds"][VICTIM], "s, misses", *(m[VICTIM] for m in missing))
        assert not np.array([m[VICTIM, VICTIM] for m in missing]).any()
    # It waits for nobody.
    assert sum(step["seconds"][VICTIM] for step in steps) < TIMEOUT_S
    masking_checks.check_late(problem, value, VICTIM, TIMEOUT_S)


@pytest.mark.parametrize("delay", [0.05, 0.31])
def test_nothing_is_torn_when_a_rank_is_killed_in_its_kernels(delay, on_two_ranks):
    problem = _problem(2)
    kwargs = {"victim": VICTIM, "timeout": TIMEOUT_S, "delay": delay}
    case = case_of(masking_ranks.killed_in_kernels, problem, **kwargs)
    runs = on_two_ranks([case], num_ranks=2, deadline=DEADLINE_S)
    value = _of_survivors(runs)
    print("a step took", jax.tree.map(float, [s["seconds"][0] for s in value["before"]]), "s")
    masking_checks.check_killed_in_kernels(problem, value, VICTIM, TIMEOUT_S)
