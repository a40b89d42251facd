# SPDX-License-Identifier: Apache-2.0
"""A rank that is killed or comes late, as each rank's process sees it."""

import logging
import os
import signal
import threading
import time
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from ep_testing.problems import EpProblem
from ep_testing.programs import make_group
from ep_testing.rank_programs import place, turns_program
from jax_ep._src import compat

# Programs in a row, and turns of each: enough for a rank to be lost in the middle.
_PROGRAMS, _TURNS = 3000, 100


class _Records(logging.Handler):
    """Keeps what the library logs."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def lost(mesh: Mesh, problem: EpProblem, victim: int, timeout: float, delay: float | None) -> Any:
    """Loses a rank between or in exchanges: kills it, or lets it sleep.

    Args:
        mesh: of one device for each process.
        problem: of the exchanges.
        victim: the rank.
        timeout: of the group, seconds.
        delay: seconds for which the victim sleeps before its next program; None: it kills itself
            while its kernels run.

    Returns:
        `error`: what JAX raised, None if nothing; `seconds` until then; `log`: what the library
        logged; `later`: what the next call with the group raised.
    """
    records = _Records()
    logging.getLogger("jax_ep").addHandler(records)
    group = make_group(problem, "ffi", mesh=mesh, timeout=timeout)
    run = turns_program(group, problem, _TURNS)
    first = place(mesh, np.zeros(problem.num_ranks, np.int32))
    jax.block_until_ready(run(*first))
    compat.coordination_client().wait_at_barrier("ready", 60_000)
    start = time.monotonic()
    error = None
    if jax.process_index() == victim:
        if delay is None:
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGKILL)).start()
        else:
            time.sleep(delay)
    try:
        for _ in range(_PROGRAMS if delay is None else 3):
            result = run(*first)
        jax.block_until_ready(result)
    except jax.errors.JaxRuntimeError as e:
        error = str(e)
    seconds = time.monotonic() - start
    if error is None:
        group.close()
        return {"error": None, "seconds": seconds, "log": [], "later": None}
    time.sleep(1.5)  # for the watch of kernels
    later = None
    try:
        jax.block_until_ready(run(*first))
    except jax.errors.JaxRuntimeError as e:
        later = str(e)
    return {"error": error, "seconds": seconds, "log": records.lines, "later": later}
