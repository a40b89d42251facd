# SPDX-License-Identifier: Apache-2.0
"""Groups that span domains: JAX_EP_NODE_RANKS makes domains of one host's ranks.

Mapped memory joins them, or NVSHMEM (over its own mapped memory: it has no network here).

Also random scenarios of the kernels alone, all ranks in one process, each with a stream of its own.
With two GPUs neighboring ranks share one there: what crosses goes over NVLink, and what is pulled
where a domain has ranks on both (of three).
"""

import functools
import os
import subprocess
from collections.abc import Callable, Sequence

import pytest

from ep_launch.placement import Placement, count_gpus
from ep_launch.ranks import Case, RankRun, failure_report
from ep_testing.graph_flags import GRAPHS
from ep_testing.rank_cases import case_of, check_cases
from ep_testing.rank_layers import TURNS, check_turns, layer_cases
from ep_testing.rank_problems import problem_cases
from ep_testing.rank_programs import turns
from jax_ep._src.groups import rdma

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(540)]

# Ranks, and ranks of a domain. With GPUs of their own, as many as there are.
NODES = {
    Placement.SHARED: [(4, 2), (8, 4), (8, 2), (6, 2), (3, 1)],
    Placement.OWN: [(2, 1), (4, 2), (8, 4)],
    Placement.ONE_PROCESS: [(2, 1), (4, 2), (8, 4)],
}[Placement.chosen()]
SOAK_NODES = NODES[:1]
LINKS = [
    "loopback",
    pytest.param(
        "rdma",
        marks=[
            pytest.mark.skipif(
                rdma.library_path() is None,
                reason="not built: tests/gpu/run.py builds libjax_ep_rdma.so where NVSHMEM is",
            ),
            pytest.mark.skipif(
                Placement.chosen() is Placement.ONE_PROCESS,
                reason="NVSHMEM needs a process for each rank: placements shared and own",
            ),
        ],
    ),
]


def _on_nodes(
    on_ranks: Callable[..., list[RankRun]], of_node: int, link: str, flags: str = ""
) -> Callable[..., list[RankRun]]:
    variables = {
        "JAX_EP_NODE_RANKS": str(of_node),
        "JAX_EP_NODE_TRANSPORT": link,
        "NVSHMEM_REMOTE_TRANSPORT": "none",
    }
    if flags:
        variables["XLA_FLAGS"] = flags
    return functools.partial(on_ranks, environment=variables)


def _check_turns(run: Callable[..., list[RankRun]], cases: Sequence[Case], num_ranks: int) -> int:
    """Runs one case of `turns`; how many rounds it had."""
    runs = run(cases, num_ranks=num_ranks, deadline=480)
    assert failure_report(runs, cases) is None, failure_report(runs, cases)
    problem, each = cases[0].kwargs["problem"], cases[0].kwargs["turns_each"]
    return check_turns(problem, runs, 0, turns_each=each)


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize(("num_ranks", "of_node"), NODES)
def test_ranks_get_the_oracles_bits(num_ranks, of_node, link, on_ranks):
    cases = problem_cases(num_ranks, domain_size=of_node)
    check_cases(_on_nodes(on_ranks, of_node, link), cases, num_ranks)


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize(("num_ranks", "of_node"), NODES[:2])
def test_layers_in_graphs_have_the_cpus_bits(num_ranks, of_node, link, on_ranks):
    cases = layer_cases(num_ranks, domain_size=of_node)
    check_cases(_on_nodes(on_ranks, of_node, link, GRAPHS), cases, num_ranks)


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize(("num_ranks", "of_node"), SOAK_NODES)
def test_graphs_replay_with_changing_routing(num_ranks, of_node, link, on_ranks):
    problem = TURNS.replace(num_ranks=num_ranks)
    cases = [case_of(turns, problem, rounds=2, turns_each=500)]
    assert _check_turns(_on_nodes(on_ranks, of_node, link, GRAPHS), cases, num_ranks) == 2


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize(("num_ranks", "of_node"), SOAK_NODES)
def test_soak(num_ranks, of_node, link, on_ranks):
    rounds = int(os.environ.get("JAX_EP_SOAK", "5000")) // 1000
    problem = TURNS.replace(num_ranks=num_ranks)
    cases = [case_of(turns, problem, rounds=rounds, turns_each=1000)]
    assert _check_turns(_on_nodes(on_ranks, of_node, link), cases, num_ranks) == rounds


def _num_gpus() -> int:
    return 1 if Placement.chosen() is Placement.SHARED else min(count_gpus(), 2)


@pytest.mark.skipif(
    Placement.chosen() is Placement.OWN, reason="all ranks in one process: placement one_process"
)
@pytest.mark.parametrize(("first", "last"), [(1, 100), (101, 200), (201, 300)])
def test_scenarios_agree_with_the_cpu_backend(first, last):
    done = subprocess.run(
        [
            os.environ["JAX_EP_VIRTUAL_RANKS"],
            "scenarios",
            str(first),
            str(last),
            str(_num_gpus()),
            "internode",
        ],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert f"scenarios {first} to {last} passed" in done.stdout
