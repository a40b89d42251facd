# SPDX-License-Identifier: Apache-2.0
"""Pictures of a server: loads of experts and ranks, and how long bytes took."""

import io
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure

from moe_serve.telemetry import Load

Marks = Sequence[tuple[float, str]]


def load_picture(loads: Sequence[Load], marks: Marks) -> bytes:
    """A PNG: for each layer experts by time, and under it its ranks; 1 is the mean.

    `jax_ep.plot.heat_map` shows one layer by steps; here are all by seconds, with what happened.
    """
    num_layers, num_experts = loads[0].of_experts.shape
    num_ranks = loads[0].of_ranks.shape[1]
    heights = [h for _ in range(num_layers) for h in (num_experts, num_ranks)]
    figure = Figure(
        figsize=(9, 1.5 + 0.16 * sum(heights) + 0.25 * len(heights)), layout="constrained"
    )
    panels = figure.subplots(len(heights), sharex=True, height_ratios=heights, squeeze=False)[:, 0]
    seconds = np.array([load.second for load in loads])
    edges = np.concatenate([[2 * seconds[0] - seconds[1] if len(seconds) > 1 else 0], seconds])
    for layer in range(num_layers):
        for axes, kind in zip(panels[2 * layer :], ("expert", "rank"), strict=False):
            of = [getattr(load, f"of_{kind}s")[layer] for load in loads]
            image = _heat(axes, edges, np.stack(of, axis=1))
            axes.set_ylabel(f"layer {layer}\n{kind}" if kind == "expert" else kind)
            _draw_marks(axes, marks, edges, with_text=axes is panels[0])
    panels[-1].set_xlabel("seconds since the start")
    figure.colorbar(image, ax=panels.tolist(), label="load / mean load")
    return _as_png(figure)


def _heat(axes: Axes, edges: np.ndarray, load: np.ndarray) -> QuadMesh:
    relative = load / np.maximum(load.mean(axis=0), 1e-9)
    rows = np.arange(len(load) + 1) - 0.5
    image = axes.pcolormesh(edges, rows, relative, vmin=0, vmax=2, cmap="RdBu_r")
    axes.invert_yaxis()
    axes.yaxis.get_major_locator().set_params(integer=True)
    return image


def latency_picture(
    first: Sequence[tuple[float, float]], between: Sequence[tuple[float, float]], marks: Marks
) -> bytes:
    """A PNG of how long bytes took, by when they came.

    Args:
        first: second, and seconds from a request to its first byte.
        between: second, and seconds since the byte before.
        marks: what happened when.
    """
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    for kind, label, style in (
        (between, "between bytes", {"s": 3, "alpha": 0.3}),
        (first, "to the first byte", {"s": 14, "marker": "^"}),
    ):
        if kind:
            seconds, took = np.array(kind).T
            axes.scatter(seconds, 1e3 * took, label=label, linewidths=0, **style)
    axes.set(xlabel="seconds since the start", ylabel="ms", yscale="log")
    if between:
        # Bytes that came together took no time worth showing.
        axes.set_ylim(bottom=20 * float(np.median([took for _, took in between])))
    _draw_marks(axes, marks, axes.get_xlim(), with_text=True)
    figure.legend(loc="outside lower right", ncols=2)
    return _as_png(figure)


def _draw_marks(axes: Axes, marks: Marks, seconds: Sequence[float], *, with_text: bool) -> None:
    shown = [(second, text) for second, text in marks if seconds[0] <= second <= seconds[-1]]
    for number, (second, text) in enumerate(shown):
        axes.axvline(second, color="black", linestyle=":", linewidth=1)
        if with_text:
            # Above each other, so that they can be read where they are close.
            offset = (0, 3 + 10 * (number % 3))
            at = {"xy": (second, 1), "xycoords": ("data", "axes fraction")}
            axes.annotate(text, **at, xytext=offset, textcoords="offset points", fontsize=8)


def _as_png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, dpi=110, format="png")
    return file.getvalue()
