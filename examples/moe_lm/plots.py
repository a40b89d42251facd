# SPDX-License-Identifier: Apache-2.0
"""Pictures of a run."""

import pathlib

import matplotlib.pyplot as plt
import numpy as np

from moe_lm.metrics import Metrics

# Columns of the heat map, at most: more than that cannot be told apart.
_MAX_COLUMNS = 120


def plot_losses(path: pathlib.Path, metrics: Metrics, unigram: float) -> None:
    """Training and held-out loss by step, and the unigram entropy of the held-out text."""
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    axes.plot(
        [entry.step for entry in metrics.steps],
        [entry.loss for entry in metrics.steps],
        label="training",
        linewidth=0.8,
    )
    if metrics.held_out:
        axes.plot(*zip(*metrics.held_out, strict=True), "o-", label="held-out")
    axes.axhline(unigram, color="gray", linestyle="--", label="unigram entropy of held-out")
    axes.set(xlabel="step", ylabel="nats per byte", title="Loss")
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_expert_load(path: pathlib.Path, metrics: Metrics) -> None:
    """Load of every expert by step, one panel per layer; 1 is the mean."""
    load = np.array([entry.expert_load for entry in metrics.steps], float)  # [steps, layers, E]
    num_layers, num_experts = load.shape[1:]
    figure, panels = plt.subplots(
        num_layers,
        figsize=(8, 1.2 + 0.5 * num_layers + 0.18 * num_layers * num_experts),
        squeeze=False,
        sharex=True,
        layout="constrained",
    )
    chunks = np.array_split(load, min(_MAX_COLUMNS, len(load)))
    columns = np.stack([chunk.mean(axis=0) for chunk in chunks], axis=-1)  # [layers, E, columns]
    first, last = metrics.steps[0].step, metrics.steps[-1].step
    for layer, (axes,) in enumerate(panels):
        image = axes.imshow(
            columns[layer] / columns[layer].mean(axis=0),
            aspect="auto",
            interpolation="nearest",
            vmin=0,
            vmax=2,
            cmap="RdBu_r",
            extent=(first - 0.5, last + 0.5, num_experts - 0.5, -0.5),
        )
        axes.set(ylabel=f"layer {layer}\nexpert")
    panels[-1][0].set(xlabel="step")
    figure.colorbar(image, ax=panels[:, 0].tolist(), label="load / mean load")
    figure.suptitle("Expert load")
    figure.savefig(path, dpi=120)
    plt.close(figure)
