# SPDX-License-Identifier: Apache-2.0
"""A process with ranks: `python -m ep_launch.rank_main FOLDER ADDRESS NUM_RANKS PLACEMENT PROCESS`.

Started by `ranks.run_ranks`.
"""

import faulthandler
import functools
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

from ep_launch import standing
from ep_launch.placement import Placement
from ep_launch.ranks import Case, Outcome


def _of_rank(value: Any, rank: int) -> Any:
    """A rank's part of an array over all ranks; anything else is every rank's."""
    if not isinstance(value, jax.Array):
        return value
    # Usually a shard has one rank's part; of an array without elements, each may have all.
    for shard in value.addressable_shards:
        ranks = range(value.shape[0])[shard.index[0]]
        if rank in ranks:
            return np.asarray(shard.data)[ranks.index(rank)]
    raise ValueError(f"no part of rank {rank} in this process: {value.sharding}")


def _run(case: Case, mesh: Mesh, ranks: range) -> dict[int, Outcome]:
    """How a case ended, for each of this process's ranks."""
    start, values, error = time.time(), {}, None
    try:
        result = case.function(mesh, **case.kwargs)
        for rank in ranks:
            values[rank] = jax.tree.map(functools.partial(_of_rank, rank=rank), result)
    except Exception:  # noqa: BLE001 - whatever it was, the report has it
        error = traceback.format_exc()
    ended = time.time()
    return {rank: Outcome(values.get(rank), error, ended, ended - start) for rank in ranks}


def _mesh(address: str, num_ranks: int, placement: Placement, process: int) -> Mesh:
    """Rank r is the r-th of its devices."""
    num_processes = placement.num_processes(num_ranks)
    if placement is not Placement.ONE_PROCESS:
        ids = placement.local_device_ids(process)
        jax.distributed.initialize(address, num_processes, process, local_device_ids=ids)
    devices = jax.devices()
    if len(devices) < num_ranks:
        raise RuntimeError(
            f"{num_ranks} ranks, placement {placement}, need as many devices; JAX has "
            f"{len(devices)}"
        )
    return Mesh(np.array(devices[:num_ranks]), ("expert",), axis_types=(AxisType.Auto,))


def _write(path: pathlib.Path, data: bytes) -> None:
    """So that no reader finds half of it."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(data)
    partial.rename(path)


def main(
    folder: pathlib.Path, address: str, num_ranks: int, placement: Placement, process: int
) -> None:
    """Runs the cases up to the first that fails, and stays until the others are done too."""
    ranks = placement.ranks_of(process, num_ranks)
    who = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    standing.announce(who, folder / f"log{process}")
    faulthandler.enable()
    logging.basicConfig()  # what the library logs, where the test finds it
    logging.getLogger("jax_ep").setLevel(logging.INFO)
    mesh = _mesh(address, num_ranks, placement, process)
    # Not before: it imports modules of tests, and some of those use JAX.
    cases: list[Case] = pickle.loads((folder / "cases").read_bytes())
    failed = ""
    for index, case in enumerate(cases):
        standing.doing(case.name)
        outcomes = _run(case, mesh, ranks)
        for rank, outcome in outcomes.items():
            _write(folder / f"outcome{rank}.{index}", pickle.dumps(outcome))
            if outcome.error is not None:
                failed = case.name
        if failed:
            break
    standing.doing("waiting for the other ranks to be done")
    _write(folder / f"done{process}", failed.encode())
    sys.stdin.read()
    # After a kernel gave up, CUDA and XLA cannot be shut down in order.
    os._exit(1 if failed else 0)


if __name__ == "__main__":
    main(
        pathlib.Path(sys.argv[1]),
        sys.argv[2],
        int(sys.argv[3]),
        Placement(sys.argv[4]),
        int(sys.argv[5]),
    )
