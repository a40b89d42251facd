# SPDX-License-Identifier: Apache-2.0
"""What ranks measured on one GPU, put together, and as tables."""

import dataclasses
import statistics
from collections.abc import Mapping
from typing import Any

import numpy as np

from ep_bench import cells, goals
from ep_bench.bytes_moved import floor
from ep_bench.cases import FP8, HIDDEN, NUM_EXPERTS, NUM_TOPK, OPERATIONS, GpuCase
from ep_bench.cells import (
    WHAT,
    ByRank,
    Found,
    Result,
    label,
    microseconds,
    slowest,
    table,
    time_cell,
)


def result(case: GpuCase, values: ByRank) -> dict[str, Any]:
    """A case's entry in the JSON, from the seconds that each rank saw."""
    fp8 = case.wire_dtype == FP8
    floors = {name: floor(name, case.rows, fp8_wire=fp8) for name in case.operations}
    return {
        "case": dataclasses.asdict(case),
        "recv_capacity": case.recv_capacity,
        "rows": dataclasses.asdict(case.rows),
        "bytes": {name: dataclasses.asdict(f) for name, f in floors.items() if f},
        "seconds": slowest(values),
    }


def baseline(case: GpuCase, values: ByRank) -> dict[str, Any]:
    """Likewise, of what XLA does without this library."""
    return {"case": dataclasses.asdict(case), "seconds": slowest(values)}


def copy_bandwidths(values: ByRank) -> dict[str, float]:
    """Bytes per second, read and written, of all ranks together and of one alone: medians."""
    together = np.sum([of_rank["all"] for of_rank in values], axis=0)
    return {"all": float(np.median(together)), "one": float(np.median(values[0]["one"]))}


def copy_bandwidth(found: Found) -> float:
    """What ratios refer to: the largest of all medians."""
    return max(max(of_ranks.values()) for of_ranks in found["copy"].values())


def share(entry: Result, operation: str, of: str, bandwidth: float) -> float:
    """Bytes of a floor ("own" or "through_heap") over time, as a share of the bandwidth."""
    seconds = entry["seconds"][operation]["median"]
    return entry["bytes"][operation][of] / seconds / bandwidth


_KERNELS = ("plan", "dispatch", "combine")


def time_table(found: Found, tablefmt: str) -> str:
    """Microseconds of each operation."""
    rows = [
        [
            *label(r["case"]),
            *(time_cell(r["seconds"][op]) if op in r["seconds"] else "" for op in OPERATIONS),
        ]
        for r in found["results"]
    ]
    return table([*WHAT, *OPERATIONS.values()], rows, tablefmt)


def share_table(found: Found, tablefmt: str) -> str:
    """GB moved, and the shares of the copy bandwidth by both floors."""
    bandwidth = copy_bandwidth(found)

    def cell(r: Result, op: str) -> str:
        if op not in r["bytes"]:
            return ""
        size = r["bytes"][op]
        shares = (share(r, op, of, bandwidth) for of in ("own", "through_heap"))
        sizes = f"{size['own'] / 1e9:.2f}, {size['through_heap'] / 1e9:.2f}"
        return f"{sizes}: " + ", ".join(f"{s:.2f}" for s in shares)

    moving = [op for op in OPERATIONS if op != "plan"]
    # With few tokens launches and waits count, not bytes.
    large = [r for r in found["results"] if r["case"]["num_tokens"] >= 100]
    rows = [[*label(r["case"]), *(cell(r, op) for op in moving)] for r in large]
    return table([*WHAT, *(OPERATIONS[op] for op in moving)], rows, tablefmt)


def overheads(r: Result) -> dict[str, float]:
    """Seconds that operations take under jit beyond their kernels alone, by name."""
    kernels = r["kernels"]
    # Older results are of two kernels, one after the other.
    with_plan = kernels.get("plan_dispatch", kernels["plan"] + kernels["dispatch"])
    alone = {**kernels, "dispatch": with_plan}
    medians = {name: spread["median"] for name, spread in r["seconds"].items()}
    return {name: medians[name] - alone[name] for name in _KERNELS if name in medians}


def kernel_table(found: Found, tablefmt: str) -> str:
    """Kernels alone beside what they take under jit. Empty if they were not measured."""

    def cells(r: Result) -> list[str]:
        more = overheads(r)
        return [
            *(microseconds(r["kernels"][name]) for name in _KERNELS),
            *(f"{1e6 * more[name]:+.1f}" if name in more else "" for name in _KERNELS),
        ]

    rows = [[*label(r["case"]), *cells(r)] for r in found["results"] if r.get("kernels")]
    headers = ["plan", "dispatch", "combine", "jit: plan", "jit: plan + dispatch", "jit: combine"]
    return table([*WHAT, *headers], rows, tablefmt) if rows else ""


def baseline_table(found: Found, tablefmt: str) -> str:
    """What XLA takes to move as many rows within each rank."""
    rows = []
    for r in found["baselines"]:
        ours = next(o["seconds"] for o in found["results"] if o["case"] == r["case"])
        case, seconds = r["case"], r["seconds"]
        rows.append(
            [
                f"{case['num_tokens']}, {case['num_ranks']}",
                time_cell(seconds["gather"]),
                time_cell(ours["dispatch"]),
                time_cell(seconds["segment_sum"]),
                time_cell(seconds["gather_back"]),
                time_cell(ours["combine"]),
            ]
        )
    headers = ["T, R", "gather", "plan + dispatch", "segment sum", "gather + sum", "combine"]
    return table(headers, rows, tablefmt)


def _by_operation(seconds: Mapping[str, float]) -> str:
    return ", ".join(
        f"{OPERATIONS[op]} {microseconds(seconds[op])}" for op in OPERATIONS if op in seconds
    )


def summary(found: Found) -> str:
    """How the goals were met."""
    bandwidth = copy_bandwidth(found)
    first = next(
        (
            r
            for r in found["results"]
            if GpuCase(**r["case"]) == GpuCase(num_tokens=4096, num_ranks=8)
        ),
        None,
    )
    one = next((r for r in found["results"] if r["case"]["num_tokens"] == 1), None)
    lines = [f"Copies reach {bandwidth / 1e12:.2f} TB/s, reads and writes counted."]
    for op in ("dispatch", "combine") if first else ():
        own, heap = (share(first, op, of, bandwidth) for of in ("own", "through_heap"))
        met = "met" if heap >= goals.SHARED_SHARE else "missed"
        lines.append(
            f"{OPERATIONS[op]}, T 4096, R 8, 16 SMs: {heap:.2f} of that by the bytes through the "
            f"heap ({own:.2f} by the operation's own bytes); the goal, {goals.SHARED_SHARE}, "
            f"is {met}."
        )
    if one:
        medians = {op: spread["median"] for op, spread in one["seconds"].items()}
        chain = medians.pop("chain", 0.0)
        worst = max(medians.values()) - chain
        met = "met" if worst <= goals.SHARED_OVERHEAD_S else "missed"
        what = f", {microseconds(chain)} of it that of the chain itself; the goal for the rest"
        lines.append(
            f"T 1, µs: {_by_operation(medians)}. All of it is launching and synchronizing"
            f"{what if chain else '; the goal for that'}, "
            f"{microseconds(goals.SHARED_OVERHEAD_S)} for each operation, is {met}."
        )
    if one and one.get("kernels"):
        lines.append(f"Of that, beyond the kernels alone: {_by_operation(overheads(one))}.")
    return "\n".join(f"* {line}" for line in lines)


def head(found: Found) -> str:
    """Where the numbers were taken, and how fast copies are there."""
    where = found["environment"]
    copies = "; ".join(
        f"{ranks} ranks at once {of['all'] / 1e12:.2f}, one of them {of['one'] / 1e12:.2f}"
        for ranks, of in found["copy"].items()
    )
    samples = statistics.mode(
        len(s["samples"]) for r in found["results"] for s in r["seconds"].values()
    )
    machine = f"GPU: one {where['gpu']}, driver {where['driver']}; {where['machine']}"
    return cells.head(found, machine, f", {samples} samples\n* Copies, TB/s: {copies}")


def parts(found: Found, tablefmt: str) -> list[tuple[str, str]]:
    """Titles and tables."""
    return [
        (
            f"Microseconds of one operation under jit, the slowest rank, median; H {HIDDEN}, "
            f"K {NUM_TOPK}, E {NUM_EXPERTS}, uniform routing unless the line says otherwise:",
            time_table(found, tablefmt),
        ),
        (
            "GB of all ranks, by the operation's own bytes and through the heap, and the share of "
            "the copy bandwidth that each makes in the time above (of plan + dispatch, both "
            "kernels' time):",
            share_table(found, tablefmt),
        ),
        (
            "Microseconds of the kernels alone, from CUDA graphs of one process, and how "
            "much longer (+) or shorter (-) the same takes under jit:",
            kernel_table(found, tablefmt),
        ),
        (
            "Microseconds of XLA's own operations, all ranks at once, each on its own data, "
            "beside ours, which exchange:",
            baseline_table(found, tablefmt),
        ),
    ]
