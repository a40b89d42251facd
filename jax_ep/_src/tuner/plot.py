# SPDX-License-Identifier: Apache-2.0
"""A picture of a table: how much faster than the model's choice, and with how many SMs."""

import importlib
import pathlib
from typing import Any

from jax_ep._src.tuning.table import Entry, Table


def draw(table: Table, path: pathlib.Path) -> None:
    """Writes a picture; .svg or .png.

    Raises:
        ImportError: matplotlib is not there; it is in the extra "bench".
    """
    agg: Any = importlib.import_module("matplotlib.backends.backend_agg")
    figure_module: Any = importlib.import_module("matplotlib.figure")
    figure = figure_module.Figure(figsize=(9, 7), layout="constrained")
    agg.FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True)
    for name, entries in sorted(_lines(table).items()):
        tokens = [entry.key.tokens for entry in entries]
        above.plot(tokens, [e.default_us / e.us for e in entries], marker="o", label=name)
        below.plot(tokens, [e.use.num_sms or _default_sms(e) for e in entries], marker="o")
    above.axhline(1, color="gray", linewidth=0.8)
    above.set_ylabel("time of the model's choice / tuned")
    above.set_title(f"Tuned launches on {table.device}")
    above.legend(fontsize="small")
    below.set_ylabel("SMs")
    below.set_xlabel("tokens of a rank")
    below.set_xscale("log", base=2)
    figure.savefig(path)


def _lines(table: Table) -> dict[str, list[Entry]]:
    lines: dict[str, list[Entry]] = {}
    for entry in sorted(table.entries, key=lambda entry: entry.key.tokens):
        key = entry.key
        sizes = f"R {key.ranks}, H {key.hidden}, K {key.topk}, E {key.experts}, {key.layout}"
        path = key.path.replace("_", " ")
        name = f"{key.op}, {path}, {key.wire or key.dtype} ({sizes})"
        lines.setdefault(name, []).append(entry)
    return lines


def _default_sms(entry: Entry) -> int:
    """Of the model's choice: those whose time it has; it is among what was measured."""
    near = min(entry.by_sms, key=lambda point: abs(point.us - entry.default_us))
    return near.choice.num_sms or 0
