# SPDX-License-Identifier: Apache-2.0
"""Pictures of loads; needs matplotlib. `jax_ep.plot` has them."""

from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from jax_ep._src.balancing.load_report import LoadReport
from jax_ep._src.balancing.placement import ExpertPlacement
from jax_ep._src.balancing.report import without_copies
from jax_ep._src.public import set_module

# Steps that a picture shows at most; more are added up.
_MAX_COLUMNS = 400
_MAX_PRINTED = 16  # ranks, with a number in each cell


@set_module("jax_ep.plot")
def heat_map(report: LoadReport, layer: int = 0) -> Figure:
    """The experts of a layer over time, the hottest first, and the ranks' loads below.

    Color is an expert's selections per mean of all experts at that time. In the bar of ranks it is
    the same of each rank.

    Args:
        report: of the window.
        layer: which one; negative ones count from the end.

    Raises:
        ValueError: there is no such layer, or the window is empty.
    """
    _check_layer(report, layer)
    order = np.argsort(-report.load[layer], kind="stable")
    experts = _columns(report.counts[:, layer, order])
    ranks = _columns(report.rows[:, layer])
    figure = Figure(figsize=(9, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    first = report.step - len(report.counts)
    for axes, values, name in ((above, experts, "expert, hottest first"), (below, ranks, "rank")):
        image = axes.imshow(
            _per_mean(values).T,
            aspect="auto",
            interpolation="nearest",
            cmap="viridis" if axes is above else "coolwarm",
            vmin=0,
            vmax=None if axes is above else 2,
            extent=(first, report.step, values.shape[1] - 0.5, -0.5),
        )
        axes.set_ylabel(name)
        figure.colorbar(image, ax=axes, label="load per mean")
    below.set_xlabel("step")
    above.set_title(
        f"layer {layer % len(report.load)}: hottest rank {report.imbalance[layer]:.2f} of the mean"
    )
    return figure


@set_module("jax_ep.plot")
def ranks(report: LoadReport) -> Figure:
    """The ranks' loads per mean in each layer, with the hottest's printed beside them.

    Args:
        report: of the window.
    """
    values = _per_mean(report.rows.sum(axis=0))
    layers, num_ranks = values.shape
    size = (2.5 + 0.6 * min(num_ranks, 24), 1.5 + 0.35 * min(layers, 60))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(values, aspect="auto", cmap="coolwarm", vmin=0, vmax=2)
    if num_ranks <= _MAX_PRINTED:
        for (layer, rank), value in np.ndenumerate(values):
            axes.text(rank, layer, f"{value:.2f}", ha="center", va="center", fontsize=8)
    axes.set_xlabel("rank")
    axes.set_ylabel("layer")
    axes.set_yticks(range(layers), [f"{n}: {v:.2f}" for n, v in enumerate(report.imbalance)])
    figure.colorbar(image, ax=axes, label="load per mean")
    return figure


@set_module("jax_ep.plot")
def before_after(report: LoadReport, plan: ExpertPlacement, layer: int = 0) -> Figure:
    """The ranks' loads of a layer without copies and with a placement: a part for each expert.

    Args:
        report: of the window, of the router's experts.
        plan: a placement of as many layers and experts.
        layer: which one; negative ones count from the end.

    Raises:
        ValueError: there is no such layer, or the placement is for another number of experts.
    """
    _check_layer(report, layer)
    load = report.load.astype(np.float64)
    shape = plan.copies.shape[:2]
    if load.shape != shape:
        raise ValueError(f"plan has {list(shape)} layers and experts; allowed: {list(load.shape)}")
    figure = Figure(figsize=(9, 4), layout="constrained")
    size = -(-shape[1] // plan.num_ranks)
    block = [list(range(r * size, min((r + 1) * size, shape[1]))) for r in range(plan.num_ranks)]
    parts = _shares(plan, layer)
    with_plan = [[(e, parts[e, r]) for e in np.flatnonzero(parts[:, r])] for r in range(len(block))]
    both = {
        "without copies": ([[(e, 1.0) for e in own] for own in block], without_copies),
        "with the placement": (with_plan, lambda load, _: plan.imbalance(load)),
    }
    for axes, (title, (own, imbalance)) in zip(
        figure.subplots(1, 2, sharey=True), both.items(), strict=True
    ):
        _stack(axes, own, load[layer])
        axes.axhline(load[layer].sum() / plan.num_ranks, color="black", linewidth=1, linestyle="--")
        axes.set_title(f"{title}: {imbalance(load, plan.num_ranks)[layer]:.2f} of the mean")
        axes.set_xlabel("rank")
    figure.axes[0].set_ylabel("selections")
    return figure


def _shares(plan: ExpertPlacement, layer: int) -> np.ndarray:
    """`[E, R]`: the part of each expert's selections that goes to each rank."""
    copies, upper = plan.copies[layer], plan.upper[layer]
    parts = np.diff(np.where(copies >= 0, upper, 0), axis=1, prepend=0) / 65536
    out = np.zeros((plan.num_experts, plan.num_ranks))
    for (expert, copy), slot in np.ndenumerate(copies):
        if slot >= 0:
            out[expert, slot // plan.slots_per_rank] += parts[expert, copy]
    return out


def _stack(axes: Any, own: list[list[tuple[Any, Any]]], load: np.ndarray) -> None:
    """A bar for each rank, of a part for each of its experts, the hottest at the bottom."""
    colors = mpl.colormaps["tab20"]
    for rank, experts in enumerate(own):
        bottom = 0.0
        for expert, share in sorted(experts, key=lambda pair: -load[pair[0]] * pair[1]):
            height = load[expert] * share
            axes.bar(rank, height, bottom=bottom, color=colors(expert % 20), width=0.8)
            bottom += height


def _columns(values: np.ndarray) -> np.ndarray:
    """Neighboring steps added up where there are more than a picture has columns."""
    size = -(-len(values) // _MAX_COLUMNS)
    return np.add.reduceat(values, np.arange(0, len(values), size), axis=0)


def _per_mean(values: np.ndarray) -> np.ndarray:
    mean = values.mean(axis=-1, keepdims=True)
    return np.where(mean > 0, values / np.where(mean > 0, mean, 1), 1.0)


def _check_layer(report: LoadReport, layer: int) -> None:
    num_layers = len(report.load)
    if not len(report.counts):
        raise ValueError("report has no step; allowed: at least one")
    if not -num_layers <= layer < num_layers:
        raise ValueError(f"layer is {layer}; allowed: {-num_layers} to {num_layers - 1}")
