# SPDX-License-Identifier: Apache-2.0
"""`LoadReport`: what experts and ranks of a model were asked for, in numbers that people watch.

NumPy only.
"""

import dataclasses
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from jax_ep._src.public import set_module

_VERSION = 1  # of the file
_ARRAYS = ("counts", "rows", "dropped", "total", "ema")
_PREFIX = "jax_ep_moe"
# Of each layer: property -> (name of the metric, its help).
_GAUGES = {
    "imbalance": ("imbalance", "Load of the hottest rank per mean, in the window."),
    "expert_cv": ("expert_cv", "Standard deviation of the experts' loads per mean."),
    "idle_experts": ("idle_experts", "Experts without a selection in the window."),
    "dropped_share": ("dropped_share", "Selections that found no room, of all in the window."),
    "hottest_share": ("hottest_expert_share", "Selections of the hottest expert, of all."),
}


@set_module("jax_ep")
@dataclasses.dataclass(frozen=True, eq=False)
class LoadReport:
    """Loads of the steps of a window; `LoadWindow.read` makes it.

    Attributes:
        counts: `[steps, layers, E]` int64, selections of each expert, the oldest step first.
        rows: `[steps, layers, R]` int64, selections of each rank's experts.
        dropped: `[steps, layers, R]` int64, of those the ones that found no room.
        total: `[layers, E]` uint64, selections since the beginning.
        ema: `[layers, E]` float64, exponential moving average of a step's selections.
        step: steps since the beginning.

    Raises:
        ValueError: the arrays do not fit each other.
    """

    counts: np.ndarray
    rows: np.ndarray
    dropped: np.ndarray
    total: np.ndarray
    ema: np.ndarray
    step: int

    def __post_init__(self) -> None:
        shapes = {name: np.shape(getattr(self, name)) for name in _ARRAYS}
        steps = shapes["counts"][:2]
        fits = all(len(shapes[name]) == 3 for name in ("counts", "rows", "dropped"))
        fits = fits and shapes["rows"] == shapes["dropped"] and shapes["rows"][:2] == steps
        if not fits or not shapes["total"] == shapes["ema"] == shapes["counts"][1:]:
            raise ValueError(
                f"counts, rows, dropped, total and ema have the shapes {list(shapes.values())}; "
                "allowed: [steps, layers, E], twice [steps, layers, R], twice [layers, E]"
            )

    @classmethod
    def of_counts(cls, counts: np.ndarray, num_ranks: int) -> "LoadReport":
        """Of loads alone: experts in equal blocks on ranks, nothing dropped.

        Args:
            counts: `[steps, layers, E]`.
            num_ranks: `R`; a block has `ceil(E / R)` experts.

        Raises:
            ValueError: an argument has a value that is not allowed.
        """
        counts = np.asarray(counts)
        if counts.ndim != 3 or not counts.size or not counts.min() >= 0 or num_ranks < 1:
            raise ValueError(
                f"counts has shape {counts.shape} and num_ranks is {num_ranks}; allowed: "
                "[steps, layers, E] of numbers of at least 0, and at least 1"
            )
        steps, layers, num_experts = counts.shape
        size = -(-num_experts // num_ranks)
        padded = np.pad(counts, ((0, 0), (0, 0), (0, size * num_ranks - num_experts)))
        rows = padded.reshape(steps, layers, num_ranks, size).sum(axis=-1)
        total, mean = counts.sum(axis=0), counts.mean(axis=0)
        return cls(counts, rows, np.zeros_like(rows), total, mean, steps)

    @property
    def load(self) -> np.ndarray:
        """`[layers, E]`: selections in the window, for `plan_placement` or `Rebalancer.observe`."""
        return self.counts.sum(axis=0)

    @property
    def imbalance(self) -> np.ndarray:
        """`[layers]`: selections of the hottest rank per mean; 1 where there are none."""
        of_rank = self.rows.sum(axis=0)
        return _ratio(of_rank.max(axis=1), of_rank.mean(axis=1), 1.0)

    @property
    def expert_cv(self) -> np.ndarray:
        """`[layers]`: standard deviation of the experts' selections per mean."""
        return _ratio(self.load.std(axis=1), self.load.mean(axis=1), 0.0)

    @property
    def idle_experts(self) -> np.ndarray:
        """`[layers]`: experts that nobody selected."""
        return (self.load == 0).sum(axis=1)

    @property
    def dropped_share(self) -> np.ndarray:
        """`[layers]`: selections that found no room, of all."""
        of_layer = self.rows.sum(axis=(0, 2))
        return _ratio(self.dropped.sum(axis=(0, 2)), of_layer, 0.0)

    @property
    def hottest_share(self) -> np.ndarray:
        """`[layers]`: selections of the hottest expert, of all."""
        return _ratio(self.load.max(axis=1), self.load.sum(axis=1), 0.0)

    def top(self, count: int) -> np.ndarray:
        """`[layers, count]`: the experts with the most selections, the hottest first.

        Of equal ones the lower index comes first; all of them where there are fewer.
        """
        return np.argsort(-self.load, axis=1, kind="stable")[:, :count]

    def scalars(self, prefix: str = "moe") -> dict[str, float]:
        """Numbers of all layers by names such as "moe/layer03/imbalance", for a training log."""
        width = max(2, len(str(len(self.load) - 1)))
        return {
            f"{prefix}/layer{layer:0{width}}/{name}": float(value)
            for name in _GAUGES
            for layer, value in enumerate(getattr(self, name))
        }

    def prometheus(self, *, per_expert: bool = False) -> str:
        """The numbers in Prometheus' text format, version 0.0.4, for an endpoint that is scraped.

        Args:
            per_expert: whether there is a series for each expert, too. They are many.
        """
        lines: list[str] = []

        def metric(name: str, kind: str, text: str, values: Iterator[tuple[str, Any]]) -> None:
            name = f"{_PREFIX}_{name}"
            lines.extend((f"# HELP {name} {text}", f"# TYPE {name} {kind}"))
            lines.extend(f"{name}{{{labels}}} {value}" for labels, value in values)

        def by_layer(values: np.ndarray) -> Iterator[tuple[str, Any]]:
            return ((f'layer="{layer}"', value) for layer, value in enumerate(values.tolist()))

        for attribute, (name, text) in _GAUGES.items():
            metric(name, "gauge", text, by_layer(getattr(self, attribute)))
        text = "Selections since the beginning."
        metric("selections_total", "counter", text, by_layer(self.total.sum(axis=1)))
        if per_expert:
            each = (
                (f'layer="{layer}",expert="{expert}"', int(value))
                for (layer, expert), value in np.ndenumerate(self.total)
            )
            metric("expert_selections_total", "counter", "The same of each expert.", each)
        return "\n".join(lines) + "\n"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes an `.npz` file: for `python -m jax_ep load`, and with `load` also for `plan`.

        Args:
            path: of the file, used as it is.
        """
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        with open(path, "wb") as file:
            np.savez(file, version=_VERSION, load=self.load, step=self.step, **arrays)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> "LoadReport":
        """Reads what `save` wrote.

        Raises:
            ValueError: the file is of another version or has no report in it.
        """
        with np.load(path, allow_pickle=False) as file:
            missing = [name for name in ("version", "step", *_ARRAYS) if name not in file]
            if missing:
                raise ValueError(f"{path} has no {missing}; allowed: a file of LoadReport.save")
            if int(file["version"]) != _VERSION:
                raise ValueError(f"{path} is of version {file['version']}; allowed: {_VERSION}")
            arrays: dict[str, Any] = {name: file[name] for name in _ARRAYS}
            return cls(**arrays, step=int(file["step"]))

    def to_text(self) -> str:
        """A table with a line for each layer."""
        lines = [
            f"{len(self.counts)} steps up to step {self.step}, {self.load.shape[1]} experts, "
            f"{self.rows.shape[2]} ranks",
            f"{'layer':>5} {'imbalance':>9} {'expert cv':>9} {'idle':>5} {'dropped':>8}  hottest",
        ]
        columns = (self.imbalance, self.expert_cv, self.idle_experts, self.dropped_share)
        for layer, (load, top, *values) in enumerate(
            zip(self.load, self.top(3), *columns, strict=True)
        ):
            total = max(load.sum(), 1)
            hottest = ", ".join(f"{e} ({load[e] / total:.1%})" for e in top.tolist())
            imbalance, cv, idle, dropped = values
            lines.append(
                f"{layer:>5} {imbalance:>9.3f} {cv:>9.3f} {idle:>5} {dropped:>8.2%}  {hottest}"
            )
        return "\n".join(lines)


def _ratio(value: np.ndarray, of: np.ndarray, otherwise: float) -> np.ndarray:
    return np.where(of > 0, value / np.where(of > 0, of, 1), otherwise)
