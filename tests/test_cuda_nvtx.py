# SPDX-License-Identifier: Apache-2.0
"""What profilers see of the handlers for platform CUDA: ranges of NVTX.

NVTX is real, and loads a tool that writes ranges down, as it loads a profiler; so each group of
calls runs in a process of its own.
"""

import ctypes
import json
import os
import pathlib

import pytest

from ep_launch.processes import run_processes
from ep_testing import fake_cudart
from ep_testing.cuda_calls import HALVES, OPERATIONS

pytestmark = pytest.mark.multiprocess

SET_UP = """
import ctypes, json, threading
import numpy as np
import pytest
from ep_testing import fake_cudart
from ep_testing.cuda_calls import Sizes, buffers, call, groups_of_two, refusal

fake = fake_cudart.install(pytest.MonkeyPatch(), devices=2)
log = ctypes.CDLL(LIBRARY).jax_ep_nvtx_log
log.restype = ctypes.c_char_p
SIZES = Sizes(scalars=False)

def run(operation, group, sizes=SIZES, **kwargs):
    call(fake, operation, group.group_id, buffers(operation, sizes), sizes, **kwargs)

def ranges():
    return log().decode().splitlines()
"""


def _library() -> pathlib.Path:
    module, _ = fake_cudart.load()
    if named := os.environ.get("JAX_EP_NVTX_LOG_LIBRARY"):
        return pathlib.Path(named).absolute()
    folder = pathlib.Path(module.__file__).parent
    found = [*folder.rglob("libjax_ep_nvtx_log.so")]
    assert found, f"{folder} has no libjax_ep_nvtx_log.so; `make fake-cuda` builds it"
    return found[0]


@pytest.fixture(scope="module")
def library():
    """Where the tool is; or skips, where there is no NVTX to build with."""
    path = _library()
    log = ctypes.CDLL(str(path)).jax_ep_nvtx_log
    log.restype = ctypes.c_char_p
    if log() is None:
        pytest.skip(
            "built without NVTX: `make fake-cuda test-python` runs it where a CUDA toolkit is"
        )
    return path


@pytest.fixture
def run(library, monkeypatch):
    def run(code, tool=library):
        monkeypatch.setenv("NVTX_INJECTION64_PATH", str(tool))
        set_up = f"LIBRARY = {str(library)!r}\n{SET_UP}"
        (output,) = run_processes(set_up + code, num_processes=1, devices_each=2)
        return json.loads(output.splitlines()[-1])

    return run


def _one(operation, group=None):
    name = f"jax_ep.{operation}" + (f"[{group}]" if group else "")
    return [f"push 0 jax_ep {name}", "pop 0 jax_ep "]


def test_each_handler_has_a_range_with_its_and_the_groups_name(run):
    names, seen = run(
        f"""
seen = {{}}
with groups_of_two(low_latency_tokens=3) as make:
    groups = [make(), make()]
    for i, group in enumerate(groups):
        for operation in {(*OPERATIONS, *HALVES)}:
            run(operation, group, device=1)
            seen[f"{{operation}} {{i}}"] = ranges()
    print(json.dumps([[group.name for group in groups], seen]))
"""
    )
    assert names[0].startswith("EpGroup ")
    assert names[0] != names[1]
    assert seen == {
        f"{operation} {i}": _one(operation, names[i])
        for operation in (*OPERATIONS, *HALVES)
        for i in range(2)
    }


def test_a_range_ends_where_a_handler_refuses(run):
    name, *seen = run(
        f"""
seen = []
bad = dict(ep_layout=np.int32(2))
with groups_of_two(low_latency_tokens=3) as make:
    group = make()
    for operation in {(*OPERATIONS, *HALVES)}:
        arrays = buffers(operation, SIZES)
        words = refusal(fake, operation, group.group_id, arrays, SIZES, **bad)
        assert "layout is 2" in words, words
        # Of a device without a rank, after the group was found; and a kernel that does not start.
        assert "has no rank" in refusal(fake, operation, group.group_id, arrays, SIZES, device=2)
        fake.fail("cudaSetDevice")
        assert "cudaSetDevice" in refusal(fake, operation, group.group_id, arrays, SIZES, device=1)
    seen += ranges()
    group.close()
    arrays = buffers("plan", SIZES)
    refusal(fake, "plan", group.group_id, arrays, SIZES)
    refusal(fake, "dispatch", 987654321, buffers("dispatch", SIZES), SIZES)
    print(json.dumps([group.name, seen, ranges()]))
"""
    )
    in_open, in_none = seen
    assert in_open == [
        line for operation in (*OPERATIONS, *HALVES) for line in 3 * _one(operation, name)
    ]
    assert in_none == _one("plan") + _one("dispatch")


def test_ranges_of_threads_are_their_own(run):
    name, seen = run(
        """
with groups_of_two() as make:
    group = make()
    both = threading.Barrier(2)
    def work(operation, device):
        both.wait()
        for _ in range(200):
            run(operation, group, device=device)
    threads = [threading.Thread(target=work, args=of) for of in (("plan", 0), ("combine", 1))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(json.dumps([group.name, ranges()]))
"""
    )
    assert sorted(seen) == sorted(200 * (_one("plan", name) + _one("combine", name)))


def test_without_a_tool_calls_work_and_nothing_is_written(run):
    launched, seen = run(
        """
with groups_of_two() as make:
    run("plan", make())
    print(json.dumps([len(fake.launches()), ranges()]))
""",
        tool="",
    )
    assert (launched, seen) == (1, [])
