# SPDX-License-Identifier: Apache-2.0
"""The process of one rank: `python -m gpu.rank_main FOLDER ADDRESS NUM_RANKS RANK`.

Started by `ranks.run_ranks`.
"""

import faulthandler
import logging
import os
import pathlib
import pickle
import sys
import time
import traceback
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from gpu.ranks import Case, Outcome


def _of_this_rank(value: Any) -> Any:
    if isinstance(value, jax.Array):
        return np.asarray(value.addressable_shards[0].data)[0]
    return value


def _run(case: Case, mesh: Mesh) -> Outcome:
    start, value, error = time.time(), None, None
    try:
        result = case.function(mesh, **case.kwargs)
        value = jax.tree.map(_of_this_rank, result)
    except Exception:  # noqa: BLE001 - whatever it was, the report has it
        error = traceback.format_exc()
    return Outcome(value, error, time.time(), time.time() - start)


def _write(path: pathlib.Path, data: bytes) -> None:
    """So that no reader finds half of it."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(data)
    partial.rename(path)


def main(folder: pathlib.Path, address: str, num_ranks: int, rank: int) -> None:
    """Runs the cases up to the first that fails, and stays until the others are done too."""
    faulthandler.enable()
    logging.basicConfig()  # what the library logs, where the test finds it
    jax.distributed.initialize(address, num_ranks, rank, local_device_ids=[0])
    # Not before: it imports modules of tests, and some of those use JAX.
    cases: list[Case] = pickle.loads((folder / "cases").read_bytes())
    mesh = Mesh(np.array(jax.devices()), ("expert",), axis_types=(AxisType.Auto,))
    failed = ""
    for index, case in enumerate(cases):
        outcome = _run(case, mesh)
        _write(folder / f"outcome{rank}.{index}", pickle.dumps(outcome))
        if outcome.error is not None:
            failed = case.name
            break
    _write(folder / f"done{rank}", failed.encode())
    sys.stdin.read()
    # After a kernel gave up, CUDA and XLA cannot be shut down in order.
    os._exit(1 if failed else 0)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
