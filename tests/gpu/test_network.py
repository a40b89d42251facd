# SPDX-License-Identifier: Apache-2.0
"""The kernels between domains over NVSHMEM's own network: domains are hosts in name alone.

All ranks share one GPU, each in a process: without Python, on random scenarios; and in JAX, on the
named problems. See testing/ep_launch/emulated_hosts.py.
"""

import functools
import os
import pathlib
import subprocess

import pytest

from ep_launch import emulated_hosts
from ep_testing.graph_flags import GRAPHS
from ep_testing.rank_cases import check_cases
from ep_testing.rank_layers import layer_cases
from ep_testing.rank_problems import problem_cases
from jax_ep._src.groups import rdma

NODES = ["2x1", "2x2", "2x3", "2x4", "3x1", "3x2", "4x1", "4x2", "5x1", "8x1"]
# Which kernels have most calls of a scenario, or which kind of plan.
KINDS = [(), ("low-latency",), ("by-counts",)]
KIND_NAMES = ["high-throughput", "low-latency", "by-counts"]
_LAST = 120
_PROGRAM = pathlib.Path(os.environ.get("JAX_EP_VIRTUAL_NODES", ""))

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(540),
    pytest.mark.skipif(
        not _PROGRAM.is_file(),
        reason="not built: tests/gpu/run.py builds virtual_nodes where NVSHMEM is",
    ),
]


def _nvshmem() -> pathlib.Path:
    return pathlib.Path(rdma.host_library_path() or "").parent


@pytest.fixture
def network(tmp_path):
    """Variables of processes that NVSHMEM's network joins."""
    if not emulated_hosts.has_ucx():
        pytest.skip("no UCX: UCX_HOME, or pip's libucx-cu13")
    if reason := emulated_hosts.refusal():
        pytest.skip(reason)
    with emulated_hosts.removing_heaps():
        yield emulated_hosts.environment(_PROGRAM.parent, _nvshmem(), tmp_path)


def _run_program(mps, environment: dict[str, str], *arguments: str) -> str:
    library = _PROGRAM.parent / "libjax_ep_rdma.so"
    done = subprocess.run(
        [_PROGRAM, library, "1", str(_LAST), "seconds=100", *arguments],
        env=os.environ | mps.environment | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=500,
        check=False,
    )
    if done.returncode != 0:
        mps.restart()
    print(done.stdout[-300:])
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout


@pytest.mark.parametrize("kind", KINDS, ids=KIND_NAMES)
@pytest.mark.parametrize("nodes", NODES)
def test_scenarios_over_a_network_agree_with_the_cpu_backend(nodes, kind, mps, network):
    said = _run_program(mps, network, f"nodes={nodes}", *kind)
    assert f"scenarios 1 to {_LAST} passed" in said


@pytest.mark.parametrize("kind", KINDS, ids=KIND_NAMES)
def test_scenarios_over_nvshmems_mapped_memory_agree_with_the_cpu_backend(kind, mps):
    environment = {
        "LD_LIBRARY_PATH": str(_nvshmem()),
        "NVSHMEM_REMOTE_TRANSPORT": "none",
        "NVSHMEM_SYMMETRIC_SIZE": "128M",
        "NVSHMEM_DISABLE_NVLS": "1",
    }
    said = _run_program(mps, environment, "one-host", *kind)
    assert f"scenarios 1 to {_LAST} passed" in said


def _in_jax(on_ranks, network: dict[str, str], of_node: int, **more: str):
    variables = {
        "JAX_EP_NODE_RANKS": str(of_node),
        "JAX_EP_NODE_TRANSPORT": "rdma",
        "NVSHMEM_SYMMETRIC_SIZE": "512M",
    }
    environment = network | variables | more
    return functools.partial(on_ranks, environment=environment, host_ranks=of_node, deadline=400)


@pytest.mark.parametrize(("num_ranks", "of_node"), [(4, 2), (3, 1)])
def test_ranks_in_jax_get_the_oracles_bits(num_ranks, of_node, on_ranks, network):
    cases = problem_cases(num_ranks, domain_size=of_node)
    check_cases(_in_jax(on_ranks, network, of_node), cases, num_ranks)


def test_layers_in_graphs_have_the_cpus_bits(on_ranks, network):
    run = _in_jax(on_ranks, network, 2, XLA_FLAGS=GRAPHS)
    check_cases(run, layer_cases(4, domain_size=2), 4)
