# SPDX-License-Identifier: Apache-2.0
"""Several processes that train one model, each with a part of the devices."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

from moe_lm.options import Options

# What a process that `start` has started finds in its environment.
_COORDINATOR, _NUMBER = "MOE_LM_COORDINATOR", "MOE_LM_PROCESS"


def starts_others(options: Options) -> bool:
    """Whether this process is the one that the user has started, and others do the work."""
    return options.processes > 1 and _NUMBER not in os.environ


def start(options: Options, argv: Sequence[str]) -> int:
    """Runs the program as several processes; what the first of them prints is shown.

    Returns:
        The exit status of the first that failed, which ends the others too; 0 if none did.
    """
    address = f"localhost:{_free_port()}"
    command = [sys.executable, sys.argv[0], *argv]
    processes = []
    try:
        for number in range(options.processes):
            variables = {_COORDINATOR: address, _NUMBER: str(number)}
            output = None if number == 0 else subprocess.DEVNULL
            processes.append(
                subprocess.Popen(command, env={**os.environ, **variables}, stdout=output)
            )
        return _wait(processes)
    except KeyboardInterrupt:  # they got it, too
        return _wait(processes)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def join(options: Options) -> None:
    """Joins the other processes, if there are any, before JAX looks for devices."""
    if options.processes == 1 and not options.cluster:
        return
    # Only now, because JAX reads the environment when it is imported.
    import jax  # noqa: PLC0415

    if options.cluster:
        jax.distributed.initialize()
    else:
        number, each = int(os.environ[_NUMBER]), options.num_devices // options.processes
        on_gpus = "cpu" not in os.environ["JAX_PLATFORMS"].split(",")[:1]
        jax.distributed.initialize(
            os.environ[_COORDINATOR],
            options.processes,
            number,
            local_device_ids=range(number * each, (number + 1) * each) if on_gpus else None,
        )
    if jax.process_index() != 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - what the first prints is enough


def _wait(processes: Sequence[subprocess.Popen]) -> int:
    """Until all have ended, or one has failed: its status."""
    while True:
        statuses = [process.poll() for process in processes]
        if failed := [status for status in statuses if status]:
            return failed[0]
        if None not in statuses:
            return 0
        time.sleep(0.1)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]
