# SPDX-License-Identifier: Apache-2.0
"""What ranks measured on GPUs of their own, put together, and as tables."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ep_bench import cells, goals, shared_gpu_tables
from ep_bench.bounds import bounds_of
from ep_bench.bytes_moved import traffic
from ep_bench.cases import LOW_LATENCY_OPERATIONS, MEASURED, OPERATIONS, GpuCase
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
from ep_bench.variants import COMPARED, GPU_BASELINES, OURS


def result(
    case: GpuCase, values: ByRank, placement: str, probe: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """A case's entry in the JSON, from the seconds that each rank saw, and what was probed."""
    sizes = {name: traffic(name, case) for name in values[0]}
    bounds = bounds_of(case, values[0], probe)
    return {
        **shared_gpu_tables.result(case, values),
        "placement": placement,
        "traffic": {name: dataclasses.asdict(size) for name, size in sizes.items() if size},
        "bounds": {name: dataclasses.asdict(least) for name, least in bounds.items()},
    }


def comparison(
    case: GpuCase, values: Sequence[Mapping[str, Any]], placement: str
) -> dict[str, Any]:
    """Likewise, of ways to dispatch and combine, from what `compare` returned."""
    errors = [of_rank["error_of_allowed"] for of_rank in values]
    return {
        "case": dataclasses.asdict(case),
        "placement": placement,
        "seconds": slowest([of_rank["seconds"] for of_rank in values]),
        "error_of_allowed": {key: max(error[key] for error in errors) for key in errors[0]},
    }


def links(values: ByRank) -> dict[str, float]:
    """Bytes per second of the slowest rank: medians."""
    return {
        name: float(np.median(np.min([of_rank[name] for of_rank in values], axis=0)))
        for name in values[0]
    }


def where(num_ranks: int, placement: str) -> str:
    """The key of `links` and `probes` in the JSON."""
    return f"{num_ranks} ranks, {placement}"


def where_of(entry: Mapping[str, Any]) -> str:
    """The same, for a result."""
    return where(entry["case"]["num_ranks"], entry["placement"])


def merged(parts: Sequence[Found]) -> dict[str, Any]:
    """The numbers of several runs, and where the last was taken."""
    return {
        "environment": parts[-1]["environment"],
        **{
            name: {key: value for part in parts for key, value in part.get(name, {}).items()}
            for name in ("links", "probes")
        },
        **{
            name: [entry for part in parts for entry in part[name]]
            for name in ("results", "comparisons", "failures")
        },
    }


def _link(found: Found, entry: Mapping[str, Any]) -> float:
    """What shares refer to: the fastest copies between ranks of such a run."""
    return max(found["links"][where_of(entry)].values())


def rate(entry: Result, operation: str, of: str) -> float:
    """Bytes per second that a rank gets, logical or on the wire."""
    return entry["traffic"][operation][of] / entry["seconds"][operation]["median"]


def operation_table(found: Found, tablefmt: str) -> str:
    """Microseconds, GB/s and shares of the link, of our operations."""
    rows = []
    for r in found["results"]:
        if r["case"].get("low_latency"):
            continue
        cells = [time_cell(r["seconds"][op]) if op in r["seconds"] else "" for op in MEASURED]
        for op in MEASURED[1:]:
            if op in r["traffic"]:
                gigabytes = "{:.0f}, {:.0f}".format(
                    *(rate(r, op, of) / 1e9 for of in ("logical", "wire"))
                )
                share = rate(r, op, "wire") / _link(found, r)
                cells.append(f"{gigabytes}: {share:.2f}")
            else:
                cells.append("")
        rows.append([*label(r["case"]), r["placement"], *cells])
    names = [OPERATIONS[op] for op in MEASURED]
    headers = [*WHAT, "placement", *names, *(f"{name}, GB/s" for name in names[1:])]
    return table(headers, rows, tablefmt)


def low_latency_table(found: Found, tablefmt: str) -> str:
    """Microseconds of the low-latency kernels' operations beside their goals; may be empty."""

    def cell(entry: Result, operation: str) -> str:
        goal = goals.low_latency_s(entry["case"], operation)
        beside = "" if goal is None else f"; goal {microseconds(goal)}"
        return time_cell(entry["seconds"][operation]) + beside

    rows = [
        [*label(r["case"]), r["placement"], *(cell(r, op) for op in LOW_LATENCY_OPERATIONS)]
        for r in found["results"]
        if r["case"].get("low_latency")
    ]
    headers = [*WHAT, "placement", *LOW_LATENCY_OPERATIONS.values()]
    return table(headers, rows, tablefmt) if rows else ""


def bound_table(found: Found, tablefmt: str) -> str:
    """Bounds of our operations, and shares of them. Empty where the probe did not run."""

    def cell(entry: Result, operation: str) -> str:
        least = entry["bounds"].get(operation)
        if least is None:
            return ""
        share = least["seconds"] / entry["seconds"][operation]["median"]
        return f"{microseconds(least['seconds'])} ({least['by']}): {share:.2f}"

    names = ("dispatch", "combine", "dispatch_vjp")
    rows = [
        [*label(r["case"]), r["placement"], *(cell(r, op) for op in names)]
        for r in found["results"]
        if r.get("bounds")
    ]
    headers = [*WHAT, "placement", *(OPERATIONS[op] for op in names)]
    return table(headers, rows, tablefmt) if rows else ""


_PROBED = {
    "load": "load",
    "store": "store",
    "copy": "copy",
    "expand": "expand 1:4",
    "peer_store": "to a peer",
    "peer_store_all": "to peers, all",
    "peer_load": "from a peer",
    "peer_load_all": "from peers, all",
}


def probe_table(found: Found, tablefmt: str) -> str:
    """GB/s of each GPU that the probe saw, by number of SMs. Empty where it did not run."""
    rows = [
        [key, sms, *(f"{probe['rates'][name][sms] / 1e9:.0f}" for name in _PROBED)]
        for key, probe in found.get("probes", {}).items()
        for sms in probe["rates"]["load"]
    ]
    headers = ["ranks, placement", "SMs", *_PROBED.values()]
    return table(headers, rows, tablefmt) if rows else ""


def ratios(entry: Mapping[str, Any]) -> dict[str, float]:
    """How many times as long as ours, on the same wire, each baseline takes; by key."""
    medians = {key: spread["median"] for key, spread in entry["seconds"].items()}
    return {key: medians[key] / medians["ours"] for key in GPU_BASELINES if key in medians}


def comparison_table(found: Found, tablefmt: str) -> str:
    """Microseconds there and back, and the fastest baseline's by ours."""
    rows = []
    for entry in found["comparisons"]:
        case, seconds = entry["case"], entry["seconds"]
        least = min(ratios(entry).values(), default=None)
        rows.append(
            [
                f"{case['num_tokens']}, {case['num_ranks']}",
                case["routing"],
                entry["placement"],
                *(time_cell(seconds[key]) if key in seconds else "" for key in COMPARED),
                "" if least is None else f"{least:.2f}",
            ]
        )
    headers = ["T, R", "routing", "placement", *COMPARED.values(), "fastest baseline ÷ jax_ep"]
    return table(headers, rows, tablefmt)


def link_table(found: Found, tablefmt: str) -> str:
    """GB/s from one rank to another."""
    names = ("ring", "pair", "device_put")
    rows = [
        [key, *(f"{of[name] / 1e9:.0f}" if name in of else "" for name in names)]
        for key, of in found["links"].items()
    ]
    headers = ["ranks, placement", "ppermute, all at once", "ppermute, one pair", "device_put"]
    return table(headers, rows, tablefmt)


def summary(found: Found) -> str:
    """How the goals were met, and what did not run."""
    lines = []
    of_goals = {"num_tokens": 4096, "num_ranks": 8, "routing": "uniform"}
    for (op, wire), goal in goals.OWN_S.items():
        times = [
            r["seconds"][op]["median"]
            for r in found["results"]
            if r["case"].items() >= {**of_goals, "wire_dtype": wire}.items()
            and r["case"]["num_sms"] <= goals.OWN_SMS
            and op in r["seconds"]
        ]
        if times:
            lines.append(
                f"{'FP8' if wire else 'BF16'} {OPERATIONS[op]}, T 4096, R 8, at most "
                f"{goals.OWN_SMS} SMs: {microseconds(min(times))} µs; the goal, "
                f"{microseconds(goal)}, is {'met' if min(times) <= goal else 'missed'}."
            )
    for entry in found["comparisons"]:
        if entry["case"].items() >= of_goals.items() and (by_key := ratios(entry)):
            key = min(by_key, key=by_key.__getitem__)
            met = "met" if by_key[key] >= goals.OWN_RATIO else "missed"
            lines.append(
                f"There and back, T 4096, R 8, {entry['placement']}: the fastest baseline, "
                f"{GPU_BASELINES[key]}, takes {by_key[key]:.2f} times as long as {OURS['ours']}; "
                f"the goal, {goals.OWN_RATIO:g}, is {met}."
            )
    lines += [f"Did not run: {failure}" for failure in found["failures"]]
    return "\n".join(f"* {line}" for line in lines)


def head(found: Found) -> str:
    """Where the numbers were taken."""
    where = found["environment"]
    return cells.head(found, f"GPU: {where['gpu']}, driver {where['driver']}; {where['machine']}")


def parts(found: Found, tablefmt: str) -> list[tuple[str, str]]:
    """Titles and tables."""
    return [
        (
            "GB/s from one rank to another, of the slowest rank:",
            link_table(found, tablefmt),
        ),
        (
            "GB/s that the SMs of a GPU move and do nothing else: from its memory, into it, both "
            "(counted once), and with each segment stored four times; and between GPUs, the first "
            "alone or all at once, the slowest:",
            probe_table(found, tablefmt),
        ),
        (
            "Microseconds of one operation under jit, the slowest rank, median; and GB/s that "
            "a rank gets, logical and on the wire, with the latter's share of the fastest copies "
            "between ranks:",
            operation_table(found, tablefmt),
        ),
        (
            "The same of few tokens by the low-latency kernels:",
            low_latency_table(found, tablefmt),
        ),
        (
            "The least microseconds that an operation's bytes allow, by the probe of the same run, "
            "what it is that takes them, and the share of the time above that they are (of plan + "
            "dispatch, both kernels' time):",
            bound_table(found, tablefmt),
        ),
        (
            "Microseconds of dispatch, experts that return what they get, and combine, likewise:",
            comparison_table(found, tablefmt),
        ),
    ]
