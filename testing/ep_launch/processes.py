# SPDX-License-Identifier: Apache-2.0
"""Starts several processes of one JAX program on this machine."""

import os
import pathlib
import random
import socket
import subprocess
import sys

PREAMBLE = """
import sys
import jax
jax.config.update("jax_num_cpu_devices", {devices})
process = int(sys.argv[1])
jax.distributed.initialize({address!r}, num_processes={processes}, process_id=process)
"""


# Below those that a system gives to whoever asks for any: such a port may be somebody's connection
# by the time that it is used.
PORTS = range(10_000, 32_768)


def free_port() -> int:
    """A port that is free now, and that the system gives to nobody by itself."""
    for port in random.SystemRandom().sample(PORTS, 100):
        with socket.socket() as s:
            try:
                s.bind(("", port))
            except OSError:
                continue
            return port
    raise OSError(f"none of 100 ports from {PORTS} is free")


def run_processes(code: str, *, num_processes: int, devices_each: int) -> list[str]:
    """Runs `code` in every process, after JAX has been initialized; returns what they print.

    In `code`, `process` is the index of the process. Fails the test if one of them fails.
    """
    testing = pathlib.Path(__file__).parents[1]
    preamble = PREAMBLE.format(
        devices=devices_each, processes=num_processes, address=f"127.0.0.1:{free_port()}"
    )
    path = os.pathsep.join(p for p in [str(testing), *sys.path] if p)
    env = {**os.environ, "PYTHONPATH": path, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-P", "-c", preamble + code, str(i)],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(num_processes)
    ]
    try:
        outputs = [p.communicate(timeout=200)[0] for p in processes]
    finally:
        for p in processes:
            p.kill()
    for i, (process, output) in enumerate(zip(processes, outputs, strict=True)):
        assert process.returncode == 0, f"process {i}:\n{output[-4000:]}"
    return outputs
