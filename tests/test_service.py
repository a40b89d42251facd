# SPDX-License-Identifier: Apache-2.0
"""The coordination service in a supervisor: whoever dies, the others go on."""

import os
import re
import subprocess
import sys

import jaxlib._jax
import pytest

import jax_ep
from jax_ep.serving import join_service, start_service

# Computes whenever it reads a line: a program without an exchange, over the devices of all.
WORKER = """
import sys
import numpy as np
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from jax_ep.serving import join_service

process = int(sys.argv[2])
join_service(sys.argv[1], num_processes=2, process_id=process, heartbeat_timeout=1)
split = NamedSharding(Mesh(np.array(jax.devices()), "rank"), P("rank"))
x = jax.make_array_from_callback((2,), split, lambda index: np.float32([process]))
print(jax.process_count(), len(jax.devices()), flush=True)
for line in sys.stdin:
    # A number that it has not had yet makes another program, which is compiled.
    out = jax.jit(lambda x: x + int(line))(x)
    print(float(out.addressable_data(0)[0]), flush=True)
"""


@pytest.fixture
def joined():
    """A service, and the two processes that have joined it."""
    with start_service(2, heartbeat_timeout=1) as service:
        path = os.pathsep.join(p for p in sys.path if p)
        env = {**os.environ, "PYTHONPATH": path, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
        processes = [
            subprocess.Popen(
                [sys.executable, "-P", "-c", WORKER, service.address, str(i)],
                env=env,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for i in range(2)
        ]
        try:
            assert [process.stdout.readline() for process in processes] == ["2 2\n"] * 2
            yield service, processes
        finally:
            for process in processes:
                process.kill()
                process.communicate()


def ask(process: subprocess.Popen, number: int) -> float:
    process.stdin.write(f"{number}\n")
    process.stdin.flush()
    return float(process.stdout.readline())


@pytest.mark.parametrize("victim", [0, 1])
def test_the_death_of_a_process_leaves_the_other_one_alive(joined, victim):
    _, workers = joined
    assert [ask(process, 5) for process in workers] == [5, 6]
    workers[victim].kill()
    workers[victim].wait()
    survivor = workers[1 - victim]
    with pytest.raises(subprocess.TimeoutExpired):  # four times the heartbeat's timeout
        survivor.wait(timeout=4)
    assert ask(survivor, 7) == 7 + 1 - victim
    # JAX's preemption service is off, which would go on.
    survivor.terminate()
    assert survivor.wait(timeout=10) == -15


def test_processes_end_with_the_service(joined):
    service, workers = joined
    service.close()
    assert all(process.wait(timeout=20) != 0 for process in workers)


def test_the_service_has_an_address_and_may_be_closed_again():
    service = start_service(1, host="localhost")
    assert re.fullmatch(r"localhost:\d+", service.address)
    service.close()
    service.close()


def test_a_jaxlib_without_the_service_is_named(monkeypatch):
    name = "get_distributed_runtime_service"
    monkeypatch.setattr(jaxlib._jax, name, lambda address, num_nodes: None)
    message = rf"jaxlib {re.escape(jaxlib.__version__)} has no {name} as .* unexpected keyword"
    with pytest.raises(jax_ep.EpUnavailable, match=message):
        start_service(2)
    monkeypatch.delattr(jaxlib._jax, name)
    with pytest.raises(jax_ep.EpUnavailable, match=f"no attribute '{name}'"):
        start_service(2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: start_service(0), "num_processes is 0; allowed: an int of at least 1"),
        (lambda: start_service(2, heartbeat_timeout=0.5), "heartbeat_timeout is 0.5; allowed"),
        (
            lambda: join_service("localhost:1", num_processes=2, process_id=2),
            "process_id is 2; allowed: 0 to 1",
        ),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
