# SPDX-License-Identifier: Apache-2.0
"""A worker without JAX: `python stub_worker.py SOCKET`, instead of `moe_serve.worker`.

It writes what `FakeModel` writes. `STUB_WORKER` has words, separated by commas, which ask for more:
`refuse`: it refuses the options; `slow`: a step takes 50 ms; `fail`: it fails in the first step of
a request for byte 1; `loading`: it is never ready; `stuck`: no step of it ends.
"""

import hashlib
import os
import signal
import sys
import time
from multiprocessing.connection import Connection

import numpy as np

from moe_serve import wire
from moe_serve.plans import StepPlan
from moe_serve.worker import watch


def main(socket: int, words: list[str]) -> None:
    """Answers for its devices."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    connection = Connection(socket)
    watch(socket)
    begin = connection.recv()
    if "refuse" in words:
        connection.send(wire.Failed("ValueError: argument --x: it is odd", is_refused=True))
        sys.exit(1)
    if "loading" in words:
        time.sleep(600)
    each = begin.options.num_devices // begin.options.processes
    own = range(begin.number * each, (begin.number + 1) * each)
    connection.send(wire.Ready(f"a stub of {begin.options.processes}"))
    counts = np.zeros((begin.options.layers, begin.options.experts), np.int64)
    while not isinstance(message := connection.recv(), wire.End):
        if isinstance(message, wire.TakeCounts):
            connection.send(counts)
        if isinstance(message, wire.Run):
            connection.send(answer := _run(wire.unpacked(message.plan), own, counts, words))
            if isinstance(answer, wire.Failed):
                sys.exit(1)


def _run(
    plan: StepPlan, own: range, counts: np.ndarray, words: list[str]
) -> wire.Ran | wire.Failed:
    time.sleep(0.05 if "slow" in words else 600 if "stuck" in words else 0)
    if "fail" in words and any(1 in row.tokens for row in plan.rows if row.device in own):
        return wire.Failed("RuntimeError: byte 1", is_refused=False)
    written = {}
    for number, row in enumerate(plan.rows):
        if row.device in own:
            position = row.start + len(row.tokens)
            letter = b"abcdefghij"[hashlib.sha256(bytes([position])).digest()[0] % 10]
            written[number] = (letter, -1.0)
            counts[:, row.device] += 1
    return wire.Ran(written)


if __name__ == "__main__":
    main(int(sys.argv[1]), os.environ.get("STUB_WORKER", "").split(","))
