# SPDX-License-Identifier: Apache-2.0
"""Groups on GPUs over two JAX processes: the compiled module and JAX's coordination service are
real, CUDA is a fake that maps one process's memory into the other.

Every process has GPUs of its own, which the other does not see, unless a test says otherwise.
"""

import pytest

from ep_launch.processes import run_processes
from ep_testing import fake_cudart

pytestmark = pytest.mark.multiprocess

SET_UP = """
import ctypes, itertools, logging, os, threading, time
import numpy as np
import pytest
from jax.sharding import Mesh
from ep_testing import fake_cudart
import jax_ep
from ep_testing.cuda_calls import Sizes, buffers, call
from jax_ep._src import compat
from jax_ep._src.groups.bootstrap import mesh_digest, next_group_id

logging.basicConfig(stream=sys.stdout, format="%(levelname)s %(message)s")
here = jax.local_device_count()
fake = fake_cudart.install(pytest.MonkeyPatch(), devices=here, first=process * here)
mesh = Mesh(np.array(jax.devices()), ("expert",))
config = jax_ep.EpConfig(num_experts=8, num_topk=2, hidden=16, max_tokens_per_rank=4)
barriers = itertools.count()

def wait_for_all():
    compat.coordination_client().wait_at_barrier(f"barrier {next(barriers)}", 60_000)

def make(timeout=60.0):
    return jax_ep.EpGroup(mesh, "expert", config, timeout=timeout)

def refused(words, timeout=60.0):
    with pytest.raises(jax_ep.EpUnavailable, match=words):
        make(timeout)
    fake.check_clean()

def launch(group, device=0):
    # What a plan of a rank here would be launched with.
    sizes = Sizes(num_ranks=mesh.size)
    call(fake, "plan", group.group_id, buffers("plan", sizes), sizes, device=device)
    return fake.launches()[-1]
"""


def _run(code, devices_each=1):
    fake_cudart.load()  # or skips: its absence is found here, and not in the processes
    return run_processes(SET_UP + code, num_processes=2, devices_each=devices_each)


def test_what_one_process_stores_the_other_reads():
    # Each rank stores into the heaps of all; each heap has a place for each source.
    _run(
        """
group = make()
for device in range(here):
    view = launch(group, device)
    for heap in view["heap"]:
        text = f"from rank {view['rank']}".encode()
        ctypes.memmove(heap + 4096 + 16 * view["rank"], text, len(text))
wait_for_all()
for device in range(here):
    view = launch(group, device)
    own = view["heap"][view["rank"]]
    for source in range(mesh.size):
        text = f"from rank {source}".encode()
        assert ctypes.string_at(own + 4096 + 16 * source, len(text)) == text
group.close()
fake.check_clean()
""",
        devices_each=2,
    )


def test_processes_that_share_a_device_share_its_sms():
    _run(
        """
fake.reset(1)
fake.tell("sms 4")
config = jax_ep.EpConfig(num_experts=512, num_topk=2, hidden=16, max_tokens_per_rank=4096)
group = make()
sizes = Sizes(num_experts=512, num_tokens=4096)
call(fake, "plan", group.group_id, buffers("plan", sizes), sizes)
assert fake.launches()[-1]["blocks"] == 2
group.close()
fake.check_clean()
"""
    )


def test_each_failure_of_cuda_in_one_process_ends_the_group_in_both():
    # Call by call; in the last round nothing fails, and there is a group.
    outputs = _run(
        """
rounds = 0
while True:
    rounds += 1
    fake.reset(1, process)
    if process == 1:
        fake.fail("any", rounds)
    try:
        group = make()
    except jax_ep.EpUnavailable as e:
        made = False
        name = fake.lines("calls")[rounds - 1] if process == 1 else ""
        name = {"cudaFuncSetAttribute": "load_kernels"}.get(name, name)
        assert "cudaErrorUnknown" in str(e) and name in str(e), (name, e)
        assert process == 1 or "process 1 could not make it: " in str(e), e
    else:
        made = True
        group.close()
    last = fake.tell("pending_failures") == "1"
    if not last:
        fake.check_clean()
    if process == 1:
        compat.coordination_client().key_value_set(f"round {rounds}", f"{made} {last}")
    other = compat.coordination_client().blocking_key_value_get(f"round {rounds}", 60_000)
    assert other.split()[0] == str(made), "both have it, or none"
    if other.split()[1] == "True":
        break
print("rounds", rounds)
fake.reset(1, process)
"""
    )
    for output in outputs:
        rounds = int(output.rpartition("rounds ")[2].split()[0])
        assert rounds > 20, "so many calls there are at least"


def test_a_process_that_failed_before_blocks_no_later_group():
    # On its own, before it came here; then here, at its first call, and when it maps the other's.
    _run(
        """
if process == 1:
    time.sleep(3)  # what it did instead failed
else:
    refused(r"process\\(es\\) 1 did not come within 1 s", timeout=1.0)
for function in ("cudaMalloc", "cudaIpcOpenMemHandle"):
    if process == 1:
        fake.fail(function)
    refused(function if process else f"process 1 could not make it: .*{function}")
if process == 1:
    next_group_id(mesh_digest(mesh, ("expert",)))  # as if it had made one alone
names = []
for _ in range(2):
    with make() as group:
        names.append(group.group_id)
        assert launch(group)["num_ranks"] == 2
store = compat.coordination_client()
store.key_value_set(f"names {process}", str(names))
assert store.blocking_key_value_get(f"names {1 - process}", 60_000) == str(names)
fake.check_clean()
"""
    )


def test_a_process_ends_while_its_kernels_run_on():
    # Its peers' heaps, into which the kernels store, stay mapped until it has ended.
    outputs = _run(
        """
group = make(timeout=2.0)
wait_for_all()
if process == 1:
    fake.tell("run_kernels 0")
    begin = time.monotonic()
    group._backend_group.close(limit=0.3, kernels_limit=0.3)
    assert time.monotonic() - begin < 5
    assert fake.violations() == []
    assert len(fake.leaks()) == 2, "its heap and the peer's"
    fake.tell("finish_kernels")
else:
    group.close()
    assert fake.violations() == []
    assert len(fake.leaks()) == 1, "the heap that the kernels of process 1 may use"
wait_for_all()
"""
    )
    assert "closed while kernels still run on CUDA device 0" in outputs[1]
    assert "closed without process(es) 1" in outputs[0]


def test_a_process_that_is_late_is_waited_for():
    _run(
        """
if process == 1:
    time.sleep(2)
begin = time.monotonic()
group = make()
assert process == 1 or time.monotonic() - begin > 1.5
assert launch(group)["num_ranks"] == 2
wait_for_all()
group.close()
fake.check_clean()
"""
    )


def test_a_process_that_is_too_late_is_named_and_nothing_is_left():
    _run(
        """
if process == 0:
    refused(r"process\\(es\\) 1 did not come within 1 s", timeout=1.0)
wait_for_all()
"""
    )


@pytest.mark.parametrize("first", [0, 1])
def test_whoever_closes_first_frees_nothing_that_is_mapped(first):
    _run(
        f"""
group = make()
wait_for_all()
if process != {first}:
    time.sleep(1)
    assert fake.lines("abandoned_mappings") == []
group.close()
wait_for_all()
fake.check_clean()
"""
    )


def test_groups_are_closed_in_different_orders():
    _run(
        """
groups = [make() for _ in range(3)]
closing = [threading.Thread(target=group.close) for group in groups]
for thread in closing[::1 if process else -1]:
    thread.start()
    time.sleep(0.1)
for thread in closing:
    thread.join()
wait_for_all()
fake.check_clean()
"""
    )


def test_a_process_that_dies_is_reported_and_its_peer_is_whole():
    # Neither says goodbye to JAX, which would wait for the other, or end it.
    outputs = _run(
        """
group = make(timeout=1.0)
wait_for_all()
if process == 0:
    while not fake.lines("abandoned_mappings"):
        time.sleep(0.01)
    group.close()
    # It might live, for all that this one knows: its heap is left.
    assert len(fake.leaks()) == 1 and fake.leaks()[0].startswith("cudaMalloc"), fake.leaks()
    assert fake.violations() == []
    print("whole")
sys.stdout.flush()
os._exit(0)
"""
    )
    assert "closed without process(es) 1, which did not close it within 1 s" in outputs[0]
    assert "whole" in outputs[0]


def test_close_waits_for_kernels_before_the_peer_may_free():
    _run(
        """
group = make()
wait_for_all()
if process == 1:
    fake.tell("run_kernels 0")
    fake.tell("finish_kernels_after 1500")
begin = time.monotonic()
group.close()
assert time.monotonic() - begin > 1, "either waits for the kernels of process 1"
wait_for_all()
fake.check_clean()
"""
    )


def test_devices_that_do_not_reach_each_other_end_the_group_in_both():
    # Both processes see both devices; each uses one.
    _run(
        """
fake.reset(2)
mesh = Mesh(np.array(jax.devices())[[0, 3]], ("expert",))
if process == 1:
    fake.tell("unreachable 1 0")
refused("CUDA device 1 cannot map the heap of rank 0 in process" if process
        else "process 1 could not make it: .*cannot map the heap of rank 0 in process")
""",
        devices_each=2,
    )


def test_closing_without_a_peer_frees_nothing_that_it_has_mapped():
    # CUDA leaves undefined what the peer's last stores do then.
    outputs = _run(
        """
group = make(timeout=1.0)
own = launch(group)["heap"][process]
wait_for_all()
if process == 0:
    group.close()
    assert fake.violations() == []
    assert len(fake.leaks()) == 1, "its heap"
wait_for_all()
if process == 1:
    view = launch(group)
    ctypes.memmove(view["heap"][0] + 4096, b"late", 4)
    assert fake.lines("abandoned_mappings") == []
    group.close()
    fake.check_clean()
wait_for_all()
if process == 0:
    assert ctypes.string_at(own + 4096, 4) == b"late"
"""
    )
    assert "are left as they are until this process ends" in outputs[0]
