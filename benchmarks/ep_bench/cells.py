# SPDX-License-Identifier: Apache-2.0
"""What the tables of all placements are made of."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tabulate import tabulate

from ep_bench.timing import Spread

ByRank = Sequence[Mapping[str, np.ndarray]]
Result = Mapping[str, Any]
Found = Mapping[str, Any]

# Headers of `label`.
WHAT = ["T, R", "wire", "layout", "SMs"]


def slowest(values: ByRank) -> dict[str, Any]:
    """Spread and samples of the slowest rank in each sample, by name."""
    found = {}
    for name in values[0]:
        samples = np.max([of_rank[name] for of_rank in values], axis=0)
        found[name] = {
            **dataclasses.asdict(Spread.of(samples)),
            "samples": [float(f"{s:.5g}") for s in samples],
        }
    return found


def microseconds(seconds: float) -> str:
    """For a cell of a table."""
    value = 1e6 * seconds
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


def time_cell(spread: Mapping[str, float]) -> str:
    """The median, in microseconds; `plot` shows the spread."""
    return microseconds(spread["median"])


def label(case: Mapping[str, Any]) -> list[str]:
    """The cells that say what was measured; what is not the default is said."""
    wire = "FP8" if case["wire_dtype"] else "BF16"
    words = [case["layout"]]
    words += [case["routing"]] if case["routing"] != "uniform" else []
    words += ["zeros filled"] if case["zero_fill"] else []
    words += [] if case.get("tail", True) else ["no tail"]
    return [f"{case['num_tokens']}, {case['num_ranks']}", wire, ", ".join(words), case["num_sms"]]


def table(headers: list[str], rows: list[list[Any]], tablefmt: str) -> str:
    """In the format that tabulate calls so."""
    return tabulate(rows, headers, tablefmt=tablefmt, disable_numparse=True)


def head(found: Found, machine: str, run: str = "") -> str:
    """Where numbers were taken.

    Args:
        found: the JSON.
        machine: the line that says on what.
        run: what follows the command and the date.
    """
    where = found["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    if "xla_flags" in where:
        versions += f"; XLA_FLAGS: `{where['xla_flags'] or '(none)'}`"
    return (
        f"* {machine}\n* Versions: {versions}\n* Commit: {where['commit']}\n"
        f"* Command: `{where['command']}`, {where['date']}{run}"
    )
