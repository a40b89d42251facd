# SPDX-License-Identifier: Apache-2.0
"""Groups that span domains: JAX_EP_NODE_RANKS makes domains of one host's ranks.

Mapped memory joins them, or NVSHMEM (over its own mapped memory: it has no network here).

Also random scenarios of the kernels alone, all ranks in one process, each with a stream of its own.
With two GPUs neighboring ranks share one there: what crosses goes over NVLink, and what is pulled
where a domain has ranks on both (of three).
"""

import functools
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from ep_launch import slurm
from ep_launch.placement import Placement, count_gpus
from ep_launch.ranks import Case, RankRun, failure_report
from ep_testing.graph_flags import GRAPHS
from ep_testing.rank_cases import case_of, check_cases
from ep_testing.rank_layers import MIXED_TURNS, check_turns, layer_cases
from ep_testing.rank_problems import low_latency_cases, problem_cases
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
    on_ranks: Callable[..., list[RankRun]],
    of_node: int,
    link: str,
    flags: str = "",
    plan: str = "auto",
) -> Callable[..., list[RankRun]]:
    variables = {
        "JAX_EP_NODE_RANKS": str(of_node),
        "JAX_EP_NODE_TRANSPORT": link,
        "JAX_EP_NODE_PLAN": plan,
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


# Among so few domains plans gather the routing of all ranks, unless they are told not to.
@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize(("num_ranks", "of_node"), NODES)
def test_plans_by_counts_get_the_oracles_bits(num_ranks, of_node, link, on_ranks):
    cases = problem_cases(num_ranks, domain_size=of_node)
    check_cases(_on_nodes(on_ranks, of_node, link, plan="counts"), cases, num_ranks)


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize(("num_ranks", "of_node"), NODES)
def test_low_latency_kernels_give_the_oracles_bits(num_ranks, of_node, link, on_ranks):
    cases = low_latency_cases(num_ranks, domain_size=of_node)
    check_cases(_on_nodes(on_ranks, of_node, link), cases, num_ranks)


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize(("num_ranks", "of_node"), NODES[:2])
def test_layers_in_graphs_have_the_cpus_bits(num_ranks, of_node, link, on_ranks):
    cases = layer_cases(num_ranks, domain_size=of_node)
    check_cases(_on_nodes(on_ranks, of_node, link, GRAPHS), cases, num_ranks)


@pytest.mark.parametrize("plan", ["routing", "counts"])
@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize(("num_ranks", "of_node"), SOAK_NODES)
def test_graphs_replay_with_changing_routing(num_ranks, of_node, link, plan, on_ranks):
    # Each turn has exchanges of both kinds of kernels.
    problem = MIXED_TURNS.replace(num_ranks=num_ranks)
    cases = [case_of(turns, problem, rounds=2, turns_each=500)]
    assert _check_turns(_on_nodes(on_ranks, of_node, link, GRAPHS, plan), cases, num_ranks) == 2


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize(("num_ranks", "of_node"), SOAK_NODES)
def test_soak(num_ranks, of_node, link, on_ranks):
    rounds = int(os.environ.get("JAX_EP_SOAK", "5000")) // 1000
    problem = MIXED_TURNS.replace(num_ranks=num_ranks)
    cases = [case_of(turns, problem, rounds=rounds, turns_each=1000)]
    assert _check_turns(_on_nodes(on_ranks, of_node, link), cases, num_ranks) == rounds


# --- the language model of examples/ -----------------------------------------------------------

_STEPS = 6
_MODEL = [
    *("--layers", "2", "--hidden", "64", "--heads", "2", "--ffn", "64", "--seq-len", "64"),
    *("--batch", "8", "--eval-every", "0", "--sample-bytes", "0", "--steps", str(_STEPS)),
]
# XLA adds up gradients by NCCL, which refuses ranks on one GPU if they are on one host: so each
# says another, and they are joined by TCP. Of the GPU it takes little beside our kernels.
_NCCL_ON_ONE_GPU = {
    "NCCL_IB_DISABLE": "1",
    "NCCL_MAX_NCHANNELS": "2",
    "NCCL_NVLS_ENABLE": "0",
    "NCCL_SOCKET_IFNAME": "lo",
}


def _train_command(folder: pathlib.Path, platform: str, num_ranks: int, *more: str) -> list[str]:
    program = pathlib.Path(__file__).parents[2] / "examples" / "train_moe_lm.py"
    mesh = ["--platform", platform, "--mesh", f"1x{num_ranks}", "--out", str(folder)]
    return [sys.executable, str(program), *_MODEL, *mesh, *more]


def _losses(folder: pathlib.Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def _train_on_nodes(
    mps, placement: Placement, folder: pathlib.Path, num_ranks: int, environment: dict[str, str]
) -> str:
    """What the first process prints: of each rank, as SLURM starts it, or of all ranks."""
    num_processes = placement.num_processes(num_ranks)
    is_shared = placement is Placement.SHARED
    if is_shared:
        environment = environment | mps.environment | placement.environment(num_ranks)
        environment |= _NCCL_ON_ONE_GPU
    cluster = ["--cluster"] if num_processes > 1 else []
    return slurm.run(
        _train_command(folder, "cuda", num_ranks, *cluster),
        num_processes,
        lambda i: environment | ({"NCCL_HOSTID": f"rank{i}"} if is_shared else {}),
        folder=folder,
        deadline=240,
        local_id=lambda i: 0 if is_shared else i,
    )[0]


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize(("num_ranks", "of_node"), SOAK_NODES)
def test_the_language_model_learns_what_it_learns_on_cpu(
    num_ranks, of_node, link, mps, placement, tmp_path
):
    if mps is None and num_ranks > count_gpus():
        pytest.skip(f"{num_ranks} ranks on GPUs of their own: there are {count_gpus()} GPUs")
    of_both = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "MPLBACKEND": "Agg"}
    of_both["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"
    nodes = {
        "JAX_EP_NODE_RANKS": str(of_node),
        "JAX_EP_NODE_TRANSPORT": link,
        "NVSHMEM_REMOTE_TRANSPORT": "none",
    }
    on_nodes, on_cpu = tmp_path / "nodes", tmp_path / "cpu"
    on_nodes.mkdir()
    try:
        said = _train_on_nodes(mps, placement, on_nodes, num_ranks, of_both | nodes)
    except BaseException:
        if mps is not None:
            mps.restart()
        raise
    assert f"expert {num_ranks} of gpu, backend ffi" in said
    subprocess.run(
        _train_command(on_cpu, "cpu", num_ranks), env=os.environ | of_both, check=True, timeout=200
    )
    losses, expected = _losses(on_nodes), _losses(on_cpu)
    assert len(losses) == _STEPS
    assert losses[-1] < losses[0]
    # Other orders of sums, and what the optimizer makes of the last bits.
    np.testing.assert_allclose(losses, expected, rtol=1e-3)


def _num_gpus() -> int:
    return 1 if Placement.chosen() is Placement.SHARED else min(count_gpus(), 2)


@pytest.mark.skipif(
    Placement.chosen() is Placement.OWN, reason="all ranks in one process: placement one_process"
)
@pytest.mark.parametrize("kind", ["internode", "by-counts", "internode-low-latency"])
@pytest.mark.parametrize(("first", "last"), [(1, 100), (101, 200), (201, 300)])
def test_scenarios_agree_with_the_cpu_backend(first, last, kind):
    done = subprocess.run(
        [
            os.environ["JAX_EP_VIRTUAL_RANKS"],
            "scenarios",
            str(first),
            str(last),
            str(_num_gpus()),
            kind,
        ],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert f"scenarios {first} to {last} passed" in done.stdout
