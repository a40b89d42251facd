# SPDX-License-Identifier: Apache-2.0
"""Hosts in name alone, for tests on a GPU: their names, and what stands for the control of MPS."""

import os
import pathlib
import subprocess
import sys

import pytest

from ep_launch import emulated_hosts, ranks
from ep_launch.placement import Placement
from ep_launch.ranks import Case, failure_report, run_ranks
from ep_testing.placed_programs import host_name

_SAYS_ITS_NAME = [sys.executable, "-c", "import platform; print(platform.node())"]


@pytest.fixture
def hosts():
    """Skips where a process gets no name of its own."""
    if reason := emulated_hosts.refusal():
        pytest.skip(reason)


@pytest.mark.usefixtures("hosts")
def test_a_command_runs_on_a_host_of_another_name():
    command = [*emulated_hosts.on_host("node7"), *_SAYS_ITS_NAME]
    there = subprocess.run(command, capture_output=True, text=True, check=True)
    assert there.stdout == "node7\n"
    here = subprocess.run(_SAYS_ITS_NAME, capture_output=True, text=True, check=True)
    assert here.stdout != "node7\n"


@pytest.mark.multiprocess
@pytest.mark.usefixtures("hosts")
def test_ranks_are_on_hosts_of_so_many(tmp_path):
    # In one process: several meet by Gloo on CPU devices, which looks the host's name up.
    cases = [Case("host", host_name)]
    runs = run_ranks(
        cases,
        num_ranks=2,
        placement=Placement.ONE_PROCESS,
        folder=tmp_path,
        environment={"JAX_PLATFORMS": "cpu"},
        host_ranks=2,
    )
    assert failure_report(runs, cases) is None, failure_report(runs, cases)
    assert [run.outcomes[0].value for run in runs] == ["node0", "node0"]


def test_so_many_processes_in_a_row_are_on_one_host():
    assert ranks._host(3, host_ranks=2) == emulated_hosts.on_host("node1")
    assert ranks._host(3, host_ranks=None) == []


def test_heaps_that_others_have_left_stay(tmp_path):
    (tmp_path / "nvshmem_symm_heap_1").touch()

    def leave():
        for name in ("nvshmem_symm_heap_2", "other"):
            (tmp_path / name).touch()
        raise KeyError

    with pytest.raises(KeyError), emulated_hosts.removing_heaps(tmp_path):
        leave()
    assert {path.name for path in tmp_path.iterdir()} == {"nvshmem_symm_heap_1", "other"}


def test_the_stand_in_for_mps_answers_what_nvshmem_asks(tmp_path):
    folders = pathlib.Path("/libraries"), pathlib.Path("/nvshmem/lib")
    environment = emulated_hosts.environment(*folders, tmp_path)

    def ask(question: str) -> str:
        done = subprocess.run(
            ["sh", "-c", f"echo {question} | nvidia-cuda-mps-control 2> /dev/null"],
            env=os.environ | {"PATH": environment["PATH"]},
            capture_output=True,
            text=True,
            check=False,
        )
        return done.stdout if done.returncode == 0 else "failed"

    (server,) = ask("get_server_list").splitlines()
    assert int(server) > 0
    assert ask(f"get_active_thread_percentage {server}") == "100.0\n"
    assert ask("quit") == "failed"


def test_processes_find_the_stand_ins_and_a_ucx_that_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("UCX_HOME", "/ucx")
    monkeypatch.setenv("LD_LIBRARY_PATH", "/before")
    folders = pathlib.Path("/libraries"), pathlib.Path("/nvshmem/lib")
    environment = emulated_hosts.environment(*folders, tmp_path)
    assert emulated_hosts.has_ucx()
    assert environment["LD_LIBRARY_PATH"] == "/libraries:/ucx/lib:/nvshmem/lib:/before"
    assert environment["LD_PRELOAD"] == f"/libraries/{emulated_hosts.SHM}"
