# SPDX-License-Identifier: Apache-2.0
"""EpGroup on GPUs with the compiled module and a fake CUDA runtime, in one process."""

import ctypes
import itertools
import logging
import threading
import time

import pytest

import jax_ep
from ep_testing import fake_cudart
from ep_testing.cuda_calls import Sizes, buffers, call
from ep_testing.programs import make_mesh
from jax_ep._src.groups import cuda as cuda_group

CONFIG = jax_ep.EpConfig(
    num_experts=8, num_topk=2, hidden=16, max_tokens_per_rank=4, dtype="float32"
)


@pytest.fixture
def mesh():
    return make_mesh((2, 2), ("data", "expert"))


@pytest.fixture
def fake(monkeypatch):
    fake = fake_cudart.install(monkeypatch, devices=4)
    yield fake
    fake.check_clean()


class ErrorRecord(ctypes.Structure):
    """As in csrc/core/error_record.h."""

    _fields_ = [
        (name, ctypes.c_uint32)
        for name in (
            *("written", "tag", "op", "rank", "peer", "expected", "seen", "chunk"),
            *("other_op", "detail"),
        )
    ]


ARRIVED = 2  # WaitTag::kArrived


def _give_up(launch) -> None:
    """What a kernel writes before it traps."""
    record = ErrorRecord.from_address(launch["error"])
    record.tag, record.op, record.rank, record.peer = ARRIVED, 1, launch["rank"], 1
    record.written = 1


def _refused(mesh, config=CONFIG) -> str:
    with pytest.raises(jax_ep.EpUnavailable) as caught:
        jax_ep.EpGroup(mesh, "expert", config)
    return str(caught.value)


def test_a_group_holds_a_heap_on_each_device_until_it_is_closed(mesh, fake):
    with jax_ep.EpGroup(mesh, "expert", CONFIG) as group:
        assert group.heap_bytes == fake.module.heap_bytes(
            fake.module.HeapShape(
                num_ranks=2, num_experts=8, num_topk=2, max_tokens=4, hidden=16, dtype=0, wire=0,
                layout=0, low_latency_tokens=0, num_neighbors=0, gathered_domains=0,
            )
        )  # fmt: skip
        heaps = [leak for leak in fake.leaks() if leak.startswith("cudaMalloc")]
        assert [heap.rpartition(" ")[2] for heap in heaps] == ["0", "1", "2", "3"]
        assert fake.module.num_groups() == 1
    assert fake.leaks() == []


def test_the_low_latency_kernels_do_not_sum_over_domains(fake):
    shape = fake.module.HeapShape(
        num_ranks=8, num_experts=8, num_topk=2, max_tokens=4, hidden=16, dtype=0, wire=0, layout=0,
        low_latency_tokens=4,
        num_neighbors=0,
        gathered_domains=0,
    )  # fmt: skip
    for domain_size in (0, 1, 2, 4, 8):
        served = fake.module.combine_is_low_latency(shape, num_tokens=4, domain_size=domain_size)
        assert served == (domain_size not in (2, 4))


def _try_to_make(mesh) -> str | None:
    """Makes a group and closes it; why it could not be made."""
    try:
        jax_ep.EpGroup(mesh, "expert", CONFIG).close()
    except jax_ep.EpUnavailable as e:
        return str(e)
    return None


def test_each_failure_of_cuda_is_an_error_that_names_the_call(mesh, fake):
    failed = []
    for n in itertools.count(1):
        fake.reset(4)
        fake.fail("any", n)
        why_not = _try_to_make(mesh)
        if why_not is not None:
            name = fake.lines("calls")[n - 1]
            failed.append(name)
            assert "backend 'ffi' cannot serve EpGroup" in why_not
            assert "cudaErrorUnknown" in why_not
            assert {"cudaFuncSetAttribute": "load_kernels"}.get(name, name) in why_not
        if fake.tell("pending_failures") == "1":
            break
        fake.check_clean()
    assert {"cudaMalloc", "cudaMemsetAsync", "cudaIpcGetMemHandle"} <= set(failed)
    # Of 4. A group that needs a new page of words makes more calls before, and hides as many.
    assert failed.count("cudaDeviceEnablePeerAccess") >= 1
    fake.reset(4)


def test_a_heap_that_does_not_fit_says_what_to_lower(mesh, fake):
    fake.tell(f"memory {1 << 20}")
    message = _refused(mesh)
    assert "does not fit on CUDA device 0, which has 1.0 MiB free of 1.0 MiB" in message
    assert "lower max_tokens_per_rank (4)" in message
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION" in message


def test_devices_that_do_not_reach_each_other_are_named(mesh, fake):
    fake.tell("unreachable 2 3")
    message = _refused(mesh)
    assert "rank 0 (group_index 1, GPU 2) cannot map its peers' memory" in message
    assert "CUDA device 2 cannot access the memory of device 3" in message


def test_the_default_backend_does_not_hide_the_failure(mesh, fake):
    fake.fail("cudaMalloc")
    assert "cudaMalloc" in _refused(mesh)


def test_what_a_kernel_reports_is_logged_and_refuses_further_calls(mesh, fake, caplog):
    with jax_ep.EpGroup(mesh, "expert", CONFIG, timeout=60.0) as group:
        sizes = Sizes()
        call(fake, "plan", group.group_id, buffers("plan", sizes), sizes)
        assert group.health().aborted is None
        with caplog.at_level(logging.ERROR, logger="jax_ep"):
            _give_up(fake.launches()[0])
            assert group.health().aborted.startswith("rank 0 waited 60 s in dispatch for the rows")
            with pytest.raises(fake_cudart.XlaError, match="DEADLINE_EXCEEDED: rank 0 waited"):
                call(fake, "plan", group.group_id, buffers("plan", sizes), sizes)
            group.close()
    assert [record.message for record in caplog.records] == [
        f"{group.name}, group_index 0: rank 0 waited 60 s in dispatch for the rows of rank 1 "
        "(chunk 0): expected exchange 0, saw 0; is rank 1 alive, and does it run the same "
        "operations in the same order?"
    ]


def test_a_wait_that_a_kernel_reports_is_told_while_it_lasts(mesh, fake):
    with jax_ep.EpGroup(mesh, "expert", CONFIG) as group:
        sizes = Sizes()
        call(fake, "plan", group.group_id, buffers("plan", sizes), sizes)
        assert group.health().ok
        (launch,) = fake.launches()
        word = ctypes.c_uint64.from_address(launch["long_waits"] + 8 * 1)
        wait = 5 | 0 << 32 | ARRIVED << 40 | 1 << 48 | 1 << 63  # exchange 5, plan, first report
        word.value = wait
        health = group.health()
        assert (health.waiting_for, health.operation, health.exchange) == ((1,), "plan", 5)
        assert health.seconds >= launch["report_ns"] / 1e9
        assert health.aborted is None
        word.value = wait | 1 << 56  # it came
        assert group.health().ok


def test_kernels_of_recorded_graphs_are_told_that_the_group_is_closed(mesh, fake):
    group = jax_ep.EpGroup(mesh, "expert", CONFIG)
    sizes = Sizes()
    for device in range(4):
        call(fake, "plan", group.group_id, buffers("plan", sizes), sizes, device=device)
    closed = [ctypes.c_uint32.from_address(launch["control"]) for launch in fake.launches()]
    assert [word.value for word in closed] == [0] * 4
    group.close()
    assert all(word.value for word in closed)
    with jax_ep.EpGroup(mesh, "expert", CONFIG) as other:
        call(fake, "plan", other.group_id, buffers("plan", sizes), sizes)
        assert fake.launches()[-1]["control"] not in [x["control"] for x in fake.launches()[:-1]]
    assert all(word.value for word in closed)


def test_close_frees_all_after_a_trap(mesh, fake):
    group = jax_ep.EpGroup(mesh, "expert", CONFIG)
    fake.tell("trap")
    group.close()
    fake.check_clean()
    assert "cudaErrorLaunchFailure" in _refused(mesh)


def test_python_runs_on_while_a_group_is_closed(mesh, fake):
    """Or a callback of the program whose kernels are waited for could not run either."""
    group = jax_ep.EpGroup(mesh, "expert", CONFIG)
    for device in range(4):
        fake.tell(f"run_kernels {device}")
    fake.tell("finish_kernels_after 2000")
    closing = threading.Thread(target=group.close)
    closing.start()
    seen_waiting = False
    while closing.is_alive():
        seen_waiting = seen_waiting or fake.tell("num_waiting") == "1"
        if seen_waiting:
            fake.tell("finish_kernels")
        time.sleep(0.001)
    closing.join()
    assert seen_waiting


def test_python_runs_on_while_a_groups_memory_is_freed(mesh, fake):
    """CUDA frees when the device has nothing more to do, be it of other libraries."""
    group = jax_ep.EpGroup(mesh, "expert", CONFIG)
    fake.module.disconnect_group(group_id=group.group_id, limit_s=60.0)
    fake.tell("run_kernels 0")
    fake.tell("finish_kernels_after 2000")
    # As close(), which would wait for these kernels before it frees.
    cuda_group._open_groups.pop(group._backend_group)
    closing = threading.Thread(
        target=fake.module.close_group, kwargs={"group_id": group.group_id, "leave_heaps": False}
    )
    closing.start()
    seen_waiting = False
    while closing.is_alive():
        if fake.tell("num_waiting") == "1":
            seen_waiting = True
            fake.tell("finish_kernels")
        time.sleep(0.001)
    closing.join()
    assert seen_waiting
    assert fake.module.num_groups() == 0


def test_a_process_that_ends_does_not_wait_for_kernels_that_run_on(mesh, fake, caplog):
    group = jax_ep.EpGroup(mesh, "expert", CONFIG)
    for device in range(4):
        fake.tell(f"run_kernels {device}")
    begin = time.monotonic()
    group._backend_group.close(limit=0.2, kernels_limit=0.2)
    assert time.monotonic() - begin < 5
    assert len(fake.leaks()) == 4, "its heaps, which the kernels use"
    assert fake.module.num_groups() == 0
    assert "closed while kernels still run on CUDA device 0; its memory is left" in caplog.text
    group._closed = True
    fake.tell("finish_kernels")
    assert fake.violations() == []
    fake.reset(4)


def test_groups_are_closed_in_any_order(mesh, fake):
    for order in itertools.permutations(range(3)):
        groups = [jax_ep.EpGroup(mesh, "expert", CONFIG) for _ in order]
        for i in order:
            groups[i].close()
    fake.check_clean()
