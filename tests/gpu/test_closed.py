# SPDX-License-Identifier: Apache-2.0
"""Programs of closed groups, and ranks that are late: nothing is lost, and the log says what is."""

import numpy as np
import pytest

from ep_launch.placement import Placement, count_gpus
from ep_launch.ranks import failure_report
from ep_testing.closed_groups import called_after_close, late_but_in_time
from ep_testing.graph_flags import FLAGS
from ep_testing.problems import EpProblem
from ep_testing.rank_cases import case_of

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(540)]

PROBLEM = EpProblem(
    name="closed",
    num_ranks=2,
    num_tokens=32,
    hidden=64,
    num_topk=4,
    num_experts=64,
    dtype="float32",
)


@pytest.fixture
def num_ranks(placement) -> int:
    """Four, or as many as there are GPUs for."""
    return 4 if placement is Placement.SHARED else min(4, count_gpus())


@pytest.mark.parametrize("with_new_group", [False, True], ids=["alone", "new_group"])
@pytest.mark.parametrize("flags", ["default", "short", "no_graphs"])
def test_a_call_after_close_gives_an_error_or_nan_and_costs_nothing(
    flags, with_new_group, num_ranks, placement, on_ranks
):
    problem = PROBLEM.replace(num_ranks=num_ranks)
    cases = [case_of(called_after_close, problem, with_new_group=with_new_group)]
    runs = on_ranks(cases, num_ranks=num_ranks, environment={"XLA_FLAGS": FLAGS[flags]})
    assert failure_report(runs, cases) is None, failure_report(runs, cases)
    for run in runs:
        report = run.outcomes[0].value
        print(run.rank, {name: report[name] for name in ("error", "all_nan", "log")})
        assert report["alive"]
        assert report["new_is_right"]
        if report["error"] is not None:
            assert "FAILED_PRECONDITION" in report["error"]
            assert f"{report['name']} of this " in report["error"]
            continue
        # Replayed without asking: what it gave cannot be taken for a result, and the log has it.
        assert report["all_nan"]
        said = [text for level, text in report["log"] if level == "ERROR"]
        assert any("was called after the EpGroup had been closed" in text for text in said), said
        assert all(report["name"] in text for text in said), said
    # XLA records a graph again, and asks our handlers, once its buffers have moved: after a new
    # group's programs, say, and with a GPU for each rank sometimes without. Where nothing moves
    # them the graph is replayed, or no test would see what a replay gives.
    if placement is Placement.SHARED and flags == "short" and not with_new_group:
        assert any(run.outcomes[0].value["error"] is None for run in runs), "no graph was replayed"


def test_a_late_rank_is_named_in_the_log_and_then_comes(num_ranks, placement, on_ranks):
    if placement is Placement.ONE_PROCESS or num_ranks < 2:
        pytest.skip("one process launches all of its ranks")
    problem = PROBLEM.replace(num_ranks=num_ranks)
    kwargs = {"victim": 1, "delay": 4.0, "warn_after": 1.0}
    cases = [case_of(late_but_in_time, problem, **kwargs)]
    runs = on_ranks(cases, num_ranks=num_ranks)
    assert failure_report(runs, cases) is None, failure_report(runs, cases)
    for run in runs:
        report = run.outcomes[0].value
        print(run.rank, report)
        assert report["right"]
        if run.rank == 1:
            continue
        warnings = [text for level, text in report["log"] if level == "WARNING"]
        waited = "has waited 1 s in plan_dispatch for the routing or the rows of rank 1"
        assert any(f"rank {run.rank} {waited}" in text for text in warnings), warnings
        assert all("rank 1 waits for nobody: look at process 1 (pid " in w for w in warnings)
        assert any(level == "INFO" and "rank 1 came" in text for level, text in report["log"])
        assert report["health"].waiting_for == (1,)
        assert 1.0 <= report["health"].seconds <= 4.0
    assert np.all([run.exit_code == 0 for run in runs])
