# SPDX-License-Identifier: Apache-2.0
"""The times of results on GPUs as a picture: medians, and how far samples lie from them."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ep_bench.cases import OPERATIONS, SIZES, GpuCase
from ep_bench.cells import label
from ep_bench.shared_gpu_tables import copy_bandwidth
from ep_bench.variants import COMPARED

_LEAST_US = 5
_COLORS = ("0.6", "tab:blue", "tab:orange", "tab:green", "tab:red")
# What XLA takes: names in the JSON -> in the tables.
_OF_XLA = {"gather": "gather", "segment_sum": "segment sum", "gather_back": "gather + sum"}
_COLORS_OF_XLA = ("tab:purple", "tab:brown", "tab:pink")


def draw_spread(
    axes: Axes,
    entries: Sequence[Mapping[str, Any]],
    names: Mapping[str, str],
    colors: Sequence[str],
) -> None:
    """From the 10th to the 90th percentile of each time, in percent of its median."""
    low_limits, high_limits = [0.0], [0.0]
    step = 0.8 / len(names)
    for i, key in enumerate(names):
        measured = [at for at, entry in enumerate(entries) if key in entry["seconds"]]
        of_key = [entries[at]["seconds"][key] for at in measured]
        low, high = (
            [100 * (of[name] / of["median"] - 1) for of in of_key] for name in ("p10", "p90")
        )
        at = np.array(measured) + (i - (len(names) - 1) / 2) * step
        axes.vlines(at, low, high, colors[i], linewidth=3)
        low_limits += low
        high_limits += high
    axes.axhline(0, color="black", linewidth=0.5)
    several = len({entry.get("placement") for entry in entries}) > 1
    labels = []
    for entry in entries:
        size, wire, layout, num_sms = label(entry["case"])
        where = [entry["placement"]] if several else []
        labels.append(", ".join([f"T {size}", wire, layout, f"{num_sms} SMs", *where]))
    axes.set_xticks(range(len(entries)), labels, rotation=40, ha="right", fontsize=7)
    axes.set_yscale("symlog", linthresh=5, linscale=1)  # or one that strays would hide the others
    ticks = (-50, -20, -5, -2, 0, 2, 5, 20, 50, 100)
    axes.set_yticks(ticks, [f"{tick:+d}" if tick else "median" for tick in ticks])
    axes.set_yticks([], minor=True)
    axes.set_ylim(min(-6, *low_limits) * 1.5, max(6, *high_limits) * 1.5)
    axes.set_ylabel("% (log beyond 5)")
    axes.set_title("Where four of five samples lie, 10th to 90th percentile", fontsize=10)


def _draw_operations(found: Mapping[str, Any], path: pathlib.Path) -> None:
    """Draws each operation's time and its floors, by size: BF16, layout "expert", 16 SMs.

    Below, the spread of all cases.
    """
    sizes = {
        GpuCase(num_tokens=tokens, num_ranks=ranks): (tokens, ranks) for tokens, ranks in SIZES
    }
    by_case = {GpuCase(**r["case"]): r for r in found["results"]}
    shown = [case for case in sizes if case in by_case]
    bandwidth = copy_bandwidth(found)
    figure, (axes, below) = plt.subplots(2, figsize=(9, 7.5), layout="constrained")
    width = 0.8 / len(OPERATIONS)
    for i, (op, name) in enumerate(OPERATIONS.items()):
        at = np.arange(len(shown)) + (i - 2) * width
        times = [1e6 * by_case[case]["seconds"][op]["median"] for case in shown]
        axes.bar(at, times, width * 0.9, color=_COLORS[i], label=name)
        for of, style in (("through_heap", "-"), ("own", ":")):
            floors = [by_case[c]["bytes"].get(op, {}).get(of) for c in shown]
            for x, size in zip(at, floors, strict=True):
                us = 1e6 * (size or 0) / bandwidth
                if us > _LEAST_US:
                    axes.hlines(us, x - width / 2, x + width / 2, "black", style, linewidth=1.2)
    axes.set_yscale("log")
    axes.set_ylim(_LEAST_US, 1e5)
    axes.set_xticks(range(len(shown)), [f"T {t}, R {r}" for t, r in (sizes[c] for c in shown)])
    axes.set_ylabel("µs (log)")
    axes.plot([], [], "k-", label="bytes through the heap ÷ copy bandwidth")
    axes.plot([], [], "k:", label="the operation's own bytes ÷ copy bandwidth")
    axes.legend(fontsize=8, ncols=2)
    axes.set_title(f"{found['environment']['gpu']}, all ranks on one GPU, 16 SMs each", fontsize=10)
    of_xla = {GpuCase(**r["case"]): r["seconds"] for r in found["baselines"]}
    with_xla = [
        {**r, "seconds": {**of_xla.get(GpuCase(**r["case"]), {}), **r["seconds"]}}
        for r in found["results"]
    ]
    draw_spread(below, with_xla, OPERATIONS | _OF_XLA, _COLORS + _COLORS_OF_XLA)
    for name, color in zip(_OF_XLA.values(), _COLORS_OF_XLA, strict=True):
        below.plot([], [], color=color, linewidth=3, label=f"XLA's {name}")
    below.legend(fontsize=8, ncols=3, loc="lower right")
    save(figure, path)


def _draw_comparisons(found: Mapping[str, Any], path: pathlib.Path) -> None:
    """Draws the times there and back with uniform routing, by size; a GPU for each rank.

    Below, their spread.
    """
    shown = [e for e in found["comparisons"] if e["case"]["routing"] == "uniform"]
    figure, (axes, below) = plt.subplots(2, figsize=(9, 7.5), layout="constrained")
    width = 0.8 / len(COMPARED)
    for i, (key, name) in enumerate(COMPARED.items()):
        has_key = [at for at, entry in enumerate(shown) if key in entry["seconds"]]
        times = [1e6 * shown[at]["seconds"][key]["median"] for at in has_key]
        at = np.array(has_key) + (i - len(COMPARED) / 2 + 0.5) * width
        axes.bar(at, times, width * 0.9, label=name)
    axes.set_yscale("log")
    names = [f"T {e['case']['num_tokens']}, R {e['case']['num_ranks']}" for e in shown]
    several = len({e["placement"] for e in shown}) > 1
    axes.set_xticks(
        range(len(shown)),
        [f"{n}\n{e['placement']}" if several else n for n, e in zip(names, shown, strict=True)],
    )
    axes.set_ylabel("µs, there and back (log)")
    axes.legend(fontsize=8, ncols=2)
    axes.set_title(f"{found['environment']['gpu']}, a GPU for each rank", fontsize=10)
    draw_spread(below, shown, COMPARED, plt.rcParams["axes.prop_cycle"].by_key()["color"])
    save(figure, path)


def draw(found: Mapping[str, Any], path: pathlib.Path) -> None:
    """Draws results on GPUs.

    Args:
        found: the JSON of a run.
        path: what to write, .svg or .png.
    """
    (_draw_comparisons if "links" in found else _draw_operations)(found, path)


def save(figure: Figure, path: pathlib.Path) -> None:
    """Writes a picture: the same one has the same bytes, and text is text."""
    mpl.rcParams["svg.hashsalt"] = path.name
    mpl.rcParams["svg.fonttype"] = "none"
    figure.savefig(path, dpi=110, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)
