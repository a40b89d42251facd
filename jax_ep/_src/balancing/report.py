# SPDX-License-Identifier: Apache-2.0
"""`python -m jax_ep plan`: a placement for a file of loads, and what it is worth."""

import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from jax_ep._src.balancing.load_report import LoadReport
from jax_ep._src.balancing.placement import ExpertPlacement, as_load
from jax_ep._src.balancing.planner import plan_placement

_KEY = "load"
_COUNTS = "counts"  # which a file of `LoadReport.save` has, too


def report(
    path: str | os.PathLike[str], *, out: str | os.PathLike[str] | None = None, **sizes: Any
) -> str:
    """Plans for the loads of a file, and describes the placement.

    Args:
        path: of an `.npz` file with `load`, or with one array only, or of an `.npy` file:
            `[layers, E]` or `[E]`.
        out: where the placement is saved, if anywhere.
        sizes: arguments of `plan_placement`.

    Raises:
        ValueError: the file has no such array, or an argument a value that is not allowed.
        OSError: a file cannot be read or written.
    """
    load = as_load(_read(path))
    plan = plan_placement(load, **sizes)
    lines = [*_table(plan, load), "", *_slots(plan)]
    if out is not None:
        plan.save(out)
        lines += ["", f"saved to {out}"]
    return "\n".join(lines)


def without_copies(load: np.ndarray, num_ranks: int) -> np.ndarray:
    """`[layers]`: hottest rank per mean with each expert once, in blocks of `ceil(E / R)`."""
    per_rank = -(-load.shape[1] // num_ranks)
    padded = np.pad(load, ((0, 0), (0, per_rank * num_ranks - load.shape[1])))
    of_rank = padded.reshape(len(load), num_ranks, per_rank).sum(axis=2)
    mean = of_rank.mean(axis=1)
    return np.where(mean > 0, of_rank.max(axis=1) / np.where(mean > 0, mean, 1), 1.0)


def read_loads(path: str | os.PathLike[str], num_ranks: int | None) -> LoadReport:
    """What a file says of the loads of experts and ranks.

    Args:
        path: of `LoadReport.save`, or a file that `report` takes.
        num_ranks: `R`, for the latter, which says nothing of ranks.

    Raises:
        ValueError: the file has no loads, or `num_ranks` is None where it is needed.
        OSError: the file cannot be read.
    """
    loaded = np.load(path, allow_pickle=False)
    if not isinstance(loaded, np.ndarray):
        with loaded:
            if _COUNTS in loaded.files:
                return LoadReport.read(path)
    if num_ranks is None:
        raise ValueError(f"{path} says nothing of ranks; allowed: with --num-ranks")
    return LoadReport.of_counts(as_load(_read(path))[None], num_ranks)


def _read(path: str | os.PathLike[str]) -> np.ndarray:
    loaded = np.load(path, allow_pickle=False)
    if isinstance(loaded, np.ndarray):
        return loaded
    with loaded:
        names = loaded.files
        if _KEY not in names and len(names) != 1:
            raise ValueError(f"{path} has the arrays {names}; allowed: {_KEY!r}, or one array only")
        return loaded[_KEY if _KEY in names else names[0]]


def _table(plan: ExpertPlacement, load: np.ndarray) -> Iterator[str]:
    before, after = without_copies(load, plan.num_ranks), plan.imbalance(load)
    bound = plan.lower_bound(load)
    most = (plan.copies >= 0).sum(axis=2)
    yield repr(plan)
    yield "load of the hottest rank per mean: without copies, with this placement, lower bound"
    yield f"{'layer':>5} {'without':>9} {'with':>7} {'bound':>7}  most copies"
    for layer in range(plan.num_layers):
        expert = int(most[layer].argmax())
        yield (
            f"{layer:>5} {before[layer]:>9.3f} {after[layer]:>7.3f} {bound[layer]:>7.3f}  "
            f"{most[layer, expert]} of expert {expert}"
        )


def _slots(plan: ExpertPlacement) -> Iterator[str]:
    yield "experts in the slots (-: empty)"
    for layer, experts in enumerate(plan.slot_expert):
        for rank, own in enumerate(experts.reshape(plan.num_ranks, -1).tolist()):
            names = " ".join("-" if expert < 0 else str(expert) for expert in own)
            yield f"layer {layer}, rank {rank}: {names}"
