# SPDX-License-Identifier: Apache-2.0
"""What ranks run in the tests of where they are; their processes import it."""

import logging
import os
import pathlib
import platform
import time
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from ep_testing.rank_programs import place


def where(mesh: Mesh) -> dict[str, Any]:
    """Rank, process and device of each rank, as the rank itself sees them."""
    mine = [d for d in mesh.devices.flat if d.process_index == jax.process_index()]
    ranks = np.arange(mesh.size, dtype=np.int32)
    return {
        "rank": jax.jit(lambda r: r * 10)(*place(mesh, ranks)),
        "process": jax.process_index(),
        "num_processes": jax.process_count(),
        "num_local": jax.local_device_count(),
        "ids": [d.id for d in mesh.devices.flat],
        "mine": [d.id for d in mine],
        "memory": os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"],
    }


def host_name(_: Mesh) -> str:
    """Of the host that the process says it is on."""
    return platform.node()


def stall(mesh: Mesh, folder: pathlib.Path) -> None:
    """Says so to the library's logger, and in a file of the process; then does not end."""
    process = jax.process_index()
    logging.getLogger("jax_ep").warning("process %d of %d stalls", process, mesh.size)
    for _ in range(100):
        print("something else")
    (folder / f"stalled{process}").touch()
    time.sleep(600)


def stall_but_on(mesh: Mesh, rank: int, folder: pathlib.Path) -> None:
    """Ends early in the process of a rank, once all others stall."""
    process = jax.process_index()
    if process != mesh.devices.flat[rank].process_index:
        stall(mesh, folder)
    while len(list(folder.glob("stalled*"))) < jax.process_count() - 1:
        time.sleep(0.05)
    fail_on(mesh, rank)


def fail_on(mesh: Mesh, rank: int, with_signal: int | None = None) -> int:
    """Ends early in the process of a rank."""
    if jax.process_index() == mesh.devices.flat[rank].process_index:
        if with_signal is not None:
            os.kill(os.getpid(), with_signal)
        raise ArithmeticError(f"rank {rank} cannot go on")
    return 0
