# SPDX-License-Identifier: Apache-2.0
"""The times of results on GPUs as a picture."""

import pathlib
from collections.abc import Mapping
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from ep_bench.cases import OPERATIONS, SIZES, GpuCase
from ep_bench.shared_gpu_tables import copy_bandwidth
from ep_bench.variants import COMPARED

_LEAST_US = 5
_COLORS = ("0.6", "tab:blue", "tab:orange", "tab:green", "tab:red")


def _draw_operations(found: Mapping[str, Any], path: pathlib.Path) -> None:
    """Draws each operation's time and its floors, by size: BF16, layout "expert", 16 SMs."""
    sizes = {
        GpuCase(num_tokens=tokens, num_ranks=ranks): (tokens, ranks) for tokens, ranks in SIZES
    }
    by_case = {GpuCase(**r["case"]): r for r in found["results"]}
    shown = [case for case in sizes if case in by_case]
    bandwidth = copy_bandwidth(found)
    figure, axes = plt.subplots(figsize=(9, 4), layout="constrained")
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
    save(figure, path)


def _draw_comparisons(found: Mapping[str, Any], path: pathlib.Path) -> None:
    """Draws the times there and back with uniform routing, by size; a GPU for each rank."""
    shown = [e for e in found["comparisons"] if e["case"]["routing"] == "uniform"]
    figure, axes = plt.subplots(figsize=(9, 4), layout="constrained")
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
