# SPDX-License-Identifier: Apache-2.0
"""Groups between hosts, over processes: the coordination service and the compiled module are real.

CUDA is a fake, and so is the library for RDMA; processes say on which hosts they are.
"""

import os
import pathlib
import re
import subprocess
import sys
import time

import pytest

from ep_launch.processes import run_processes
from ep_testing import fake_cudart
from jax_ep._src.groups import rdma
from jax_ep._src.groups.placements import Placement

pytestmark = pytest.mark.multiprocess

SET_UP = """
import logging, os, pathlib
import numpy as np
import pytest
from jax.sharding import Mesh
from ep_testing import fake_cudart
from ep_testing.cuda_calls import Sizes, buffers, call
import jax_ep
from jax_ep._src.groups import cuda as cuda_group

logging.basicConfig(stream=sys.stdout, format="%(levelname)s %(message)s")
log = pathlib.Path(FOLDER) / f"log{process}"
os.environ["JAX_EP_RDMA_LIBRARY"] = LIBRARY
os.environ["JAX_EP_FAKE_RDMA_LOG"] = str(log)
fake = fake_cudart.install(pytest.MonkeyPatch(), devices=1, first=process)
mesh = Mesh(np.array(jax.devices()), ("expert",))
sizes = dict(num_experts=8, num_topk=2, hidden=16, max_tokens_per_rank=4)
config = jax_ep.EpConfig(**sizes, dtype="float32")

def on_hosts(names):
    # Processes that map each other's memory for real, and say that they are on these hosts.
    cuda_group.host = lambda: names[process]

def make(timeout=60.0, **kwargs):
    return jax_ep.EpGroup(mesh, "expert", config, timeout=timeout, backend="ffi", **kwargs)

def refused(words, timeout=60.0):
    with pytest.raises(jax_ep.EpUnavailable, match=words):
        make(timeout)

def leave_threads():
    # Ends this process with threads of it standing; not before the others are done, because they
    # would be ended with process 0, which has JAX's coordination service.
    jax.distributed.shutdown()
    sys.stdout.flush()
    os._exit(0)

def lines():
    return log.read_text().splitlines() if log.exists() else []
"""


@pytest.fixture(scope="module")
def library():
    """Where the fake library is; or skips, if the module is not built."""
    module, _ = fake_cudart.load()
    if named := os.environ.get("JAX_EP_FAKE_RDMA_LIBRARY"):
        return pathlib.Path(named).absolute()
    folder = pathlib.Path(module.__file__).parent
    found = [*folder.rglob("libjax_ep_fake_rdma.so")]
    assert found, f"{folder} has no libjax_ep_fake_rdma.so; `make fake-cuda` builds it"
    return found[0]


@pytest.fixture
def run(library, tmp_path):
    def run(code, num_processes=2, *, devices_each=1):
        set_up = f"FOLDER, LIBRARY = {str(tmp_path)!r}, {str(library)!r}\n{SET_UP}"
        set_up = set_up.replace(
            "devices=1, first=process", f"devices={devices_each}, first=process"
        )
        return run_processes(set_up + code, num_processes=num_processes, devices_each=devices_each)

    return run


def test_a_life_on_two_hosts_of_two_processes(run):
    run(
        """
on_hosts("aabb")
with make() as group:
    assert (group.backend, group.num_ranks, group.domain_size) == ("ffi", 4, 2)
    of_call = Sizes(num_ranks=4)
    for operation in ("plan", "dispatch", "combine"):
        more = {"domain_size": np.int32(2)} if operation == "combine" else {}
        call(fake, operation, group.group_id, buffers(operation, of_call), of_call, **more)
fake.check_clean()
assert fake.launches() == []  # they are the library's
first, *others = lines()
assert first == f"initialize id=iiii pe={process} num_pes=4"
assert others[0] == "allocate bytes=256"  # what all is measured from
assert others[1] == "load_kernels" and others[2].startswith("allocate bytes=")
domain = process // 2 * 2
parts = f"{domain},{domain + 1}"
assert others[3:] == [
    *(f"launch {operation} rank={process} domains=2 pes=0,1,2,3 parts={parts}"
      for operation in ("plan", "dispatch", "combine")),
    "release",
]
assert os.environ["NVSHMEM_DISABLE_NVLS"] == "1"
assert int(os.environ["NVSHMEM_SYMMETRIC_SIZE"]) >= 1 << 30
""",
        4,
    )


def test_groups_share_a_job(run):
    run(
        """
on_hosts("ab")
with make(), make():
    pass
make().close()
assert [line.split()[0] for line in lines()].count("initialize") == 1
assert [line.split()[0] for line in lines()].count("release") == 3
"""
    )


def test_the_job_is_left_by_all(run, tmp_path):
    run("on_hosts('ab')\nmake().close()\n")
    for process in range(2):
        assert (tmp_path / f"log{process}").read_text().splitlines()[-1] == "finalize"


def test_emulated_hosts_may_be_joined_by_the_library(run):
    run(
        """
os.environ |= {"JAX_EP_NODE_RANKS": "1", "JAX_EP_NODE_TRANSPORT": "rdma"}
make().close()
assert "release" in lines()
"""
    )


def test_a_rank_that_gives_up_is_known_in_other_domains(run):
    outputs = run(
        """
import ctypes, time
os.environ["JAX_EP_NODE_RANKS"] = "1"
DELIVERED, PEER_GAVE_UP = 13, 10  # WaitTags
group = make()
of_call = Sizes(num_ranks=2)
call(fake, "plan", group.group_id, buffers("plan", of_call), of_call)
(launch,) = fake.launches()

def give_up(tag, peer, detail=0):
    # What a kernel leaves for its host before it ends; see csrc/core/error_record.h.
    words = (ctypes.c_uint32 * 10).from_address(launch["error"])
    words[1:10] = [tag, 0, process, peer, 1, 0, 0, 0, detail]
    words[0] = 1

if process == 0:
    give_up(DELIVERED, peer=1)
else:
    # It waits for rank 0, for long; its deadline is far away.
    wait = ctypes.c_uint64.from_address(launch["long_waits"])
    wait.value = 1 | DELIVERED << 40 | 1 << 48 | 1 << 63
    regions = {name: offset for name, _, _, offset, _ in
               fake.module.heap_regions(group._backend_group._heap)}
    heaps = launch["heap"]
    told = ctypes.c_uint32.from_address(heaps[1] + regions["aborted"])
    end = time.monotonic() + 20
    while told.value == 0 and time.monotonic() < end:
        time.sleep(0.01)
    assert told.value == 1 << 31 | 0 | 1 << 7 | DELIVERED << 14, hex(told.value)
    give_up(PEER_GAVE_UP, peer=0, detail=told.value)
cuda_group._CLOSE_S = 5.0
time.sleep(2.5)
group.close()
"""
    )
    assert "rank 0 waited 60 s in plan for a message of rank 1 over the network" in outputs[0]
    assert "rank 1 ended its plan because rank 0 gave up in plan, waiting for a" in outputs[1]
    for output in outputs:
        (line,) = [line for line in output.splitlines() if "gave up waiting" in line]
        assert (
            "1 rank(s) of all processes gave up waiting for rank 1, which is in process 1" in line
        )
        assert line.endswith(": 0")


def test_a_kernel_that_is_stuck_ends_its_process_and_the_other_one_knows(run):
    run(
        """
import time
from jax_ep._src.groups import stuck_kernels
stuck_kernels._TIMEOUTS = 0.01  # of 60 s
os.environ |= {"JAX_EP_NODE_RANKS": "1", "JAX_EP_NODE_TRANSPORT": "rdma"}
# The other process has JAX's coordination service.
if process == 1:
    os.environ |= {"JAX_EP_FAKE_RDMA": "stuck", "JAX_EP_ABORT": "1"}
    ended = []
    stuck_kernels.os.abort = lambda: ended.append(True)
group = make()
of_call = Sizes(num_ranks=2)
call(fake, "plan", group.group_id, buffers("plan", of_call), of_call)
end = time.monotonic() + 30
if process == 1:
    while not ended and time.monotonic() < end:
        time.sleep(0.01)
    assert ended
    print("it has ended")
else:
    far = group._backend_group._watch._groups[group.name].far
    while not far.known() and time.monotonic() < end:
        time.sleep(0.01)
    assert [(g.by, g.blamed) for g in far.known()] == [(1, 1)]
leave_threads()
""",
    )


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ("abi", "RDMA cannot be used: the RDMA library .* does not load: it is of another version"),
        ("init_fails", "initializing NVSHMEM failed with error 7"),
        ("init_lies", "NVSHMEM is not initialized, though it says so"),
        ("no_memory", "a network heap of .* does not fit into NVSHMEM's symmetric memory; raise"),
        ("version=3.3.9", "NVSHMEM 3.3.9 is loaded .* the kernels were built with 3.4.5"),
        ("version=4.0.0", "NVSHMEM 4.0.0 is loaded .* needed is that or a newer 3"),
    ],
)
def test_each_failure_of_the_library_is_told_in_both_processes(told, words, run):
    run(
        f"""
on_hosts("ab")
os.environ["JAX_EP_FAKE_RDMA"] = {told!r}
refused({words!r})
"""
    )


@pytest.mark.parametrize("told", ["no_id", "no_memory", "version=3.5.0"])
def test_a_failure_in_one_process_ends_the_group_in_both(told, run):
    run(
        f"""
on_hosts("ab")
if process == 0:
    os.environ["JAX_EP_FAKE_RDMA"] = {told!r}
refused("" if process == 0 else "process 0 |NVSHMEM 3.4.5")
"""
    )


def test_memory_that_lies_otherwise_is_refused_for_good(run):
    run(
        """
on_hosts("ab")
os.environ["JAX_EP_FAKE_RDMA"] = "asymmetric"
refused("process . has another place for its network heap")
refused("RDMA failed in this process, which cannot try again: process . has another place")
"""
    )


def test_a_gpu_without_memory_in_one_process_keeps_none_waiting(run):
    # What fails in one process does so before all ask NVSHMEM for memory: it may be tried again.
    run(
        """
on_hosts("ab")
if process == 1:
    fake.fail("cudaMalloc", error=2)
refused("does not fit on CUDA device" if process else "process 1 could not make it: .*does not fit")
make().close()
assert [line.split()[0] for line in lines()].count("release") == 1
"""
    )


def test_who_waits_for_one_that_failed_is_told_at_once(run):
    run(
        """
on_hosts("ab")
os.environ["JAX_EP_FAKE_RDMA"] = "init_waits" if process == 0 else "init_fails"
# And not that it took too long. Process 0 may have been late and still be before its own call.
told = "process 1 could not( make it)?: initializing NVSHMEM failed with error 7"
refused(told if process == 0 else "error 7")
leave_threads()
"""
    )


def test_who_closes_late_gives_nothing_back_alone(run):
    run(
        """
import time
on_hosts("ab")
group = make()
if process == 1:
    time.sleep(3)
group._backend_group.close(limit=1.0)
assert "release" not in lines()
refused("RDMA failed in this process, which cannot try again: a group that spanned hosts was not")
"""
    )


def test_groups_that_nobody_closed_are_closed_in_one_order(run, tmp_path):
    run("on_hosts('ab')\nkept = [make() for _ in range(3)]\n")
    for process in range(2):
        calls = [line.split()[0] for line in (tmp_path / f"log{process}").read_text().splitlines()]
        assert calls[-4:] == ["release", "release", "release", "finalize"]


def test_who_ends_late_gives_nothing_back_alone(run, tmp_path):
    run(
        """
import time
from jax_ep._src.groups import rdma
on_hosts("ab")
cuda_group._EXIT_S = rdma._EXIT_S = 1.0
kept = make()
if process == 1:
    time.sleep(4)
"""
    )
    for process in range(2):
        assert "release" not in (tmp_path / f"log{process}").read_text()
        assert "finalize" not in (tmp_path / f"log{process}").read_text()


def test_a_late_process_is_waited_for_once(run):
    run(
        """
import time
on_hosts("ab")
group = make()
if process == 0:
    begin = time.monotonic()
    group._backend_group.close(limit=2.0)
    assert 2.0 <= time.monotonic() - begin < 3.5
else:
    time.sleep(6)
    group._backend_group.close(limit=2.0)
"""
    )


def test_a_process_ends_though_nvshmem_is_not_finalized(run):
    begin = time.monotonic()
    outputs = run(
        """
from jax_ep._src.groups import rdma
on_hosts("ab")
rdma._EXIT_S = 2.0
make().close()
os.environ["JAX_EP_FAKE_RDMA"] = "finalize_hangs"
"""
    )
    assert time.monotonic() - begin < 120
    for output in outputs:
        assert "NVSHMEM was not finalized within 2 s as this process ends" in output


def test_a_group_may_have_no_deadline(run):
    run("import math\non_hosts('ab')\nmake(timeout=math.inf).close()\n")


def test_settings_that_one_process_alone_has_are_told(run):
    run(
        """
from jax_ep._src.groups import rdma
on_hosts("ab")
if process == 0:
    rdma.why_no_gpu_initiated = lambda: None
refused("process . has NVSHMEM_IB_ENABLE_IBGDA=(1|None); here it is (1|None): all processes must")
"""
    )


def test_memory_that_is_not_mapped_is_named(run):
    run(
        """
on_hosts("aabb")
os.environ["JAX_EP_FAKE_RDMA"] = "no_map"
refused("NVSHMEM does not map the memory of rank ., which is on this host: is NVSHMEM_DISABLE_")
""",
        4,
    )


def test_a_job_that_does_not_come_up_is_given_up_for_good(run):
    run(
        """
on_hosts("ab")
os.environ["JAX_EP_FAKE_RDMA"] = "init_hangs"
refused("this process could not initialize NVSHMEM within 2 s: one that", timeout=2.0)
refused("RDMA failed in this process, which cannot try again: this process could not")
leave_threads()
"""
    )


def test_processes_with_other_settings_are_told(run):
    run(
        """
on_hosts("ab")
os.environ["NVSHMEM_MAX_TEAMS"] = str(7 + process)
refused("process . has NVSHMEM_MAX_TEAMS=[78]; here it is [87]: all processes must have the same")
"""
    )


def test_a_process_that_drives_two_gpus_is_told_what_to_do(run):
    run(
        """
on_hosts("ab")
refused("process 0 drives 2 GPUs, and RDMA needs one process for each: start one process per GPU")
""",
        devices_each=2,
    )


def test_an_installation_without_the_library_says_so(run):
    run(
        """
on_hosts("ab")
if process == 1:
    os.environ["JAX_EP_RDMA_LIBRARY"] = "/nowhere/lib.so"
refused("on several hosts, and in process 1, JAX_EP_RDMA_LIBRARY is '/nowhere/lib.so', and")
with jax_ep.EpGroup(mesh, "expert", config) as group:
    assert group.backend == "xla"
"""
    )


def test_processes_outside_of_the_mesh_are_named():
    ranks = [Placement(process, process, 0, 0, process) for process in range(2)]
    assert rdma.why_not_one_gpu_each(ranks, 2) is None
    why_not = rdma.why_not_one_gpu_each(ranks, 4)
    assert why_not.startswith("process(es) 2, 3 have no device of its mesh")


def test_nothing_of_nvshmem_is_loaded_until_it_is_asked_for(library):
    code = """
import pathlib, jax, jax_ep
from jax_ep._src.groups import rdma
import jax_ep._ext
config = jax_ep.EpConfig(num_experts=8, num_topk=2, hidden=16, max_tokens_per_rank=4)
jax_ep.EpGroup(jax.make_mesh((1,), ("expert",)), "expert", config).close()
rdma.why_unavailable()
print(pathlib.Path("/proc/self/maps").read_text())
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert "_ext" in done.stdout
    assert not re.search("nvshmem|rdma", done.stdout)
