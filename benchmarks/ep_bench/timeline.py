# SPDX-License-Identifier: Apache-2.0
"""A dispatch in halves with a matrix product between them, as a GPU ran it, as a picture."""

import gzip
import json
import pathlib
from typing import NamedTuple

import matplotlib.pyplot as plt

from ep_bench.plot import save

# JAX writes the kernels of the first GPU as what this process of the profile did.
_GPU_PROCESS = 1
_OURS = "LowLatencyDispatchKernel"
_PRODUCT = ("gemm", "nvjet", "cutlass", "cublas")


class Kernel(NamedTuple):
    """What a GPU ran.

    Attributes:
        name: of the kernel.
        start: microseconds.
        duration: microseconds.
    """

    name: str
    start: float
    duration: float


class Exchange(NamedTuple):
    """A dispatch in halves, and the product between them."""

    first: Kernel
    product: Kernel
    second: Kernel


def exchanges(profile: pathlib.Path) -> list[Exchange]:
    """Those of a profile, `perfetto_trace.json.gz` of `jax.profiler`, in their order.

    Raises:
        ValueError: it holds none.
    """
    with gzip.open(profile) as file:
        trace = json.load(file)
    events = trace["traceEvents"] if isinstance(trace, dict) else trace
    kernels = [
        Kernel(e["name"], float(e["ts"]), float(e["dur"]))
        for e in events
        if e.get("ph") == "X" and e.get("pid") == _GPU_PROCESS
    ]
    shown = sorted((k for k in kernels if _kind(k)), key=lambda k: k.start)
    found = [
        Exchange(*three)
        for three in zip(shown, shown[1:], shown[2:], strict=False)
        if [_kind(k) for k in three] == ["ours", "product", "ours"]
    ]
    if not found:
        raise ValueError(f"{profile}: no product between two kernels of {_OURS}")
    return found


def _kind(kernel: Kernel) -> str:
    if _OURS in kernel.name:
        return "ours"
    return "product" if any(part in kernel.name.lower() for part in _PRODUCT) else ""


def draw(exchange: Exchange, title: str, path: pathlib.Path) -> None:
    """Draws an exchange, .svg or .png."""
    figure, axes = plt.subplots(figsize=(9, 2.2), layout="constrained")
    names = "first half", "matrix product", "second half"
    rows, colors = (1, 0, 1), ("tab:blue", "0.6", "tab:orange")
    begin = exchange.first.start
    for name, kernel, row, color in zip(names, exchange, rows, colors, strict=True):
        start = kernel.start - begin
        axes.broken_barh([(start, kernel.duration)], (row - 0.3, 0.6), color=color)
        label = f"{name}, {kernel.duration:.0f} µs"
        at_end = kernel is exchange.second
        at = start + kernel.duration if at_end else start
        axes.text(at, row + 0.34, label, fontsize=8, va="bottom", ha="right" if at_end else "left")
    axes.set_yticks([0, 1], ["XLA", "jax_ep"])
    axes.set_ylim(-0.4, 1.7)
    axes.set_xlabel("µs since the first half began")
    axes.set_title(title, fontsize=10)
    save(figure, path)
