# SPDX-License-Identifier: Apache-2.0
"""Starts processes as SLURM's `srun` does: JAX finds the others by what each has in its variables.

For programs that a launcher starts, on a machine without one. All processes are on this machine.
"""

import os
import pathlib
import random
import socket
import subprocess
import time
from collections.abc import Callable, Sequence

# JAX takes a port from the job's number: the highest so many there are.
_PORTS = 2**12


def free_job() -> int:
    """The number of a job whose port nobody has."""
    for job in random.SystemRandom().sample(range(_PORTS), 100):
        with socket.socket() as s:
            try:
                s.bind(("", 2**16 - _PORTS + job))
            except OSError:
                continue
            return job
    raise OSError(f"none of 100 of the highest {_PORTS} ports is free")


def variables(job: int, process: int, num_processes: int, *, local_id: int) -> dict[str, str]:
    """What SLURM sets for a process of a job.

    Args:
        job: its number.
        process: the number of the process in it.
        num_processes: of the job.
        local_id: the number of the process on its machine, and so of the GPU that JAX gives it.
    """
    return {
        "SLURM_JOB_ID": str(job),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": str(num_processes),
        "SLURM_PROCID": str(process),
        "SLURM_LOCALID": str(local_id),
    }


def run(
    command: Sequence[str],
    num_processes: int,
    environment: Callable[[int], dict[str, str]],
    *,
    folder: pathlib.Path,
    deadline: float,
    local_id: Callable[[int], int] = int,
) -> list[str]:
    """Runs a program as the processes of a job; what each has printed.

    Args:
        command: of the program.
        num_processes: how many there are.
        environment: of a process, beside this one's own.
        folder: for what they print.
        deadline: seconds after which those that still run are killed.
        local_id: of a process, see `variables`.

    Raises:
        AssertionError: one failed, or took too long; the others are killed then.
    """
    job = free_job()
    processes = []
    for i in range(num_processes):
        own = variables(job, i, num_processes, local_id=local_id(i)) | environment(i)
        with open(folder / f"log{i}", "w") as log:
            processes.append(
                subprocess.Popen(
                    command, env=os.environ | own, stdout=log, stderr=subprocess.STDOUT
                )
            )
    end = time.monotonic() + deadline
    try:
        while any(process.poll() is None for process in processes):
            if time.monotonic() > end or any(process.poll() for process in processes):
                break
            time.sleep(0.05)
        statuses = [process.poll() for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    logs = [(folder / f"log{i}").read_text(errors="replace") for i in range(num_processes)]
    texts = [
        f"process {i}: {s}\n{log[-3000:]}"
        for i, (s, log) in enumerate(zip(statuses, logs, strict=True))
        if s != 0
    ]
    assert not texts, "\n".join(texts)
    return logs
