# SPDX-License-Identifier: Apache-2.0
"""The numbers of a load, as benchmarks of servers give them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tabulate import tabulate

from moe_serve.loadgen import Record

_SHARES = (50, 90, 99)
_NAMES = {
    "ttft": "time to first byte (TTFT)",
    "tpot": "time per further byte (TPOT)",
    "itl": "between bytes (ITL)",
    "e2e": "whole request (E2E)",
}


def summary(records: Sequence[Record], slo: Mapping[str, float]) -> dict[str, Any]:
    """All numbers, in seconds, bytes and requests.

    Args:
        records: of all requests.
        slo: milliseconds that "ttft", "tpot", "e2e" of a request may take, and the 99th percentile
            of its "itl"; what is not named may take any time.
    """
    good = [record for record in records if not record.error]
    begin = min(record.sent for record in records)
    seconds = max([record.times[-1] for record in good], default=begin) - begin
    samples = _samples(good)
    read = sum(len(record.planned.prompt) for record in good)
    written = sum(record.num_written for record in good)
    kept = sum(_keeps(record, slo) for record in good)
    per_second = {
        "requests_per_s": len(good),
        "goodput_requests_per_s": kept,
        "read_bytes_per_s": read,
        "written_bytes_per_s": written,
        "bytes_per_s": read + written,
    }
    return {
        "requests": len(good),
        "failed": len(records) - len(good),
        "errors": sorted({record.error for record in records if record.error}),
        "seconds": seconds,
        "read_bytes": read,
        "written_bytes": written,
        "slo_ms": dict(slo),
        "slo_share": kept / len(records),
        **{name: value / seconds if seconds else 0.0 for name, value in per_second.items()},
        **{name: _statistics(values) for name, values in samples.items()},
    }


def table(numbers: Mapping[str, Any]) -> str:
    """For people, with milliseconds."""
    totals = [
        ("requests that were served", numbers["requests"]),
        ("requests that failed", numbers["failed"]),
        ("duration (s)", f"{numbers['seconds']:.2f}"),
        ("bytes read", numbers["read_bytes"]),
        ("bytes written", numbers["written_bytes"]),
        ("requests a second", f"{numbers['requests_per_s']:.2f}"),
        ("bytes written a second", f"{numbers['written_bytes_per_s']:.1f}"),
        ("bytes read and written a second", f"{numbers['bytes_per_s']:.1f}"),
    ]
    if numbers["slo_ms"]:
        limits = ", ".join(f"{name} {ms:g} ms" for name, ms in numbers["slo_ms"].items())
        totals.append((f"of these within {limits}", f"{numbers['goodput_requests_per_s']:.2f}"))
    totals += [(name, value) for name, value in numbers.get("server", {}).items()]
    rows = [
        [text, *(f"{1e3 * value:.2f}" for value in numbers[name].values())]
        for name, text in _NAMES.items()
        if numbers[name]
    ]
    heads = ["ms", "mean", *(f"{share} %" for share in _SHARES)]
    right = ("left", *["right"] * 4)
    return (
        tabulate(totals, colalign=("left", "right"), disable_numparse=True)
        + "\n\n"
        + tabulate(rows, heads, colalign=right, disable_numparse=True)
    )


def latencies(records: Sequence[Record]) -> tuple[list[Any], list[Any]]:
    """`(time, seconds)` of the first parts, and of those that follow, of `time.perf_counter`."""
    first, between = [], []
    for record in records:
        if record.times:
            first.append((record.times[0], record.times[0] - record.sent))
            between += zip(record.times[1:], np.diff(record.times), strict=True)
    return first, between


def _samples(good: Sequence[Record]) -> dict[str, np.ndarray]:
    several = [record for record in good if record.num_written > 1]
    return {
        "ttft": np.array([r.times[0] - r.sent for r in good]),
        "tpot": np.array([(r.times[-1] - r.times[0]) / (r.num_written - 1) for r in several]),
        "itl": np.concatenate([np.diff(r.times) for r in good] or [np.zeros(0)]),
        "e2e": np.array([r.times[-1] - r.sent for r in good]),
    }


def _statistics(values: np.ndarray) -> dict[str, float]:
    if not len(values):
        return {}
    shares = {f"p{share}": float(np.percentile(values, share)) for share in _SHARES}
    return {"mean": float(values.mean()), **shares}


def _keeps(record: Record, slo: Mapping[str, float]) -> bool:
    for name, values in _samples([record]).items():
        worst = np.percentile(values, 99) if len(values) else 0.0
        if name in slo and 1e3 * worst > slo[name]:
            return False
    return True
