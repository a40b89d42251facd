# SPDX-License-Identifier: Apache-2.0
"""What variants took on CPU devices, as tables."""

from collections.abc import Mapping, Sequence

from ep_bench import cells, goals
from ep_bench.cases import CAPACITY_FACTOR
from ep_bench.cells import Found, Result, table
from ep_bench.variants import BASELINES, VARIANTS


def _labels(results: Sequence[Result]) -> dict[str, str]:
    """Variants that were measured, in the order of the tables, with their names."""
    measured = results[0]["variants"]
    return {key: measured[key]["label"] for key in VARIANTS if key in measured}


def _milliseconds(seconds: float) -> str:
    value = 1e3 * seconds
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _time(spread: Mapping[str, float]) -> str:
    low, high = _milliseconds(spread["p10"]), _milliseconds(spread["p90"])
    return f"{_milliseconds(spread['median'])} ({low}-{high})"


def _ratio(spread: Mapping[str, float]) -> str:
    return f"{spread['median']:.2f} ({spread['p10']:.2f}-{spread['p90']:.2f})"


def _mebibytes(num_bytes: int | None) -> str:
    if num_bytes is None:
        return "?"
    value = num_bytes / 2**20
    return f"{value:.1f}" if value < 10 else f"{value:.0f}"


def _what(result: Result) -> list[str]:
    sizes = (result[f] for f in ("num_tokens", "hidden", "num_experts", "num_topk"))
    return [", ".join(map(str, sizes)), result["dtype"], result["direction"]]


def time_table(results: Sequence[Result], tablefmt: str) -> str:
    """Milliseconds of each variant, and the ratios that count."""
    labels = _labels(results)
    rows = [
        [
            *_what(result),
            *(_time(result["variants"][key]["seconds"]) for key in labels),
            *(_ratio(result["ratios"][key]) for key in BASELINES),
        ]
        for result in results
    ]
    ratios = [f"÷ {VARIANTS[key]}" for key in BASELINES]
    headers = ["T, H, E, K", "dtype", "measured", *labels.values(), *ratios]
    return table(headers, rows, tablefmt)


def memory_table(results: Sequence[Result], tablefmt: str) -> str:
    """MiB of each variant: seen by the kernel / planned by XLA. Empty if it was not measured."""
    labels = _labels(results)
    if "planned_bytes" not in results[0]["variants"]["ours"]:
        return ""
    rows = []
    for result in results:
        measured = [result["variants"][key] for key in labels]
        rows.append(
            [
                *_what(result),
                *(
                    f"{_mebibytes(m['peak_rss_bytes'])} / {_mebibytes(m['planned_bytes'])}"
                    for m in measured
                ),
            ]
        )
    headers = ["T, H, E, K", "dtype", "measured", *labels.values()]
    return table(headers, rows, tablefmt)


def summary(found: Found) -> str:
    """How many lines meet the goal, and the largest and smallest ratio."""
    results = found["results"]
    ratios = [result["ratio"]["median"] for result in results]
    met = sum(ratio <= goals.HOST_RATIO for ratio in ratios)
    return (
        f"{_labels(results)['ours']} takes at most {goals.HOST_RATIO} times as long as the faster "
        f"baseline in {met} of {len(ratios)} lines; the ratios are {min(ratios):.2f} to "
        f"{max(ratios):.2f}."
    )


def sizes_table(results: Sequence[Result], tablefmt: str) -> str:
    """Rows and bytes of each case."""
    of_case: dict[str, list[Result]] = {}
    for result in results:
        of_case.setdefault(result["case"], []).append(result)
    rows = []
    for lines in of_case.values():
        first = lines[0]
        logical = {line["dtype"]: _mebibytes(line["logical_bytes"]) for line in lines}
        in_buckets = first["bucket_capacity"] * first["num_experts"]
        rows.append(
            [
                _what(first)[0],
                ", ".join(f"{mebibytes} ({dtype})" for dtype, mebibytes in logical.items()),
                first["max_received"],
                first["recv_capacity"],
                first["bucket_capacity"],
                in_buckets,
            ]
        )
    headers = [
        "T, H, E, K",
        "logical MiB of a dispatch",
        "rows of the busiest rank",
        f"C (factor {CAPACITY_FACTOR})",
        "rows of a bucket",
        "rows of a rank's buckets",
    ]
    return table(headers, rows, tablefmt)


def head(found: Found) -> str:
    """Where the numbers were taken."""
    where = found["environment"]
    machine = f"Machine: {where['machine']}; load average before the run {where['load_before']}"
    return cells.head(found, machine, f", {found['num_pairs']} pairs")


def parts(found: Found, tablefmt: str) -> list[tuple[str, str]]:
    """Titles and tables; a table that is empty was not measured."""
    results = found["results"]
    return [
        (
            "Milliseconds of one call, median (10th-90th percentile), and our time divided by each "
            "baseline's in the same round, likewise:",
            time_table(results, tablefmt),
        ),
        (
            "Peak memory in MiB, of all 8 devices together: rise of the process's resident memory "
            "/ temporaries and outputs that XLA planned:",
            memory_table(results, tablefmt),
        ),
        ("Sizes:", sizes_table(results, tablefmt)),
    ]
