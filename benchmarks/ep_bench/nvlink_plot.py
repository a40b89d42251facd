# SPDX-License-Identifier: Apache-2.0
"""Ways to dispatch and combine, compared, as a picture."""

import pathlib
from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from ep_bench.gpu_plot import save
from ep_bench.nvlink_cases import COMPARED


def draw(found: Mapping[str, Any], path: pathlib.Path) -> None:
    """Draws the times there and back with uniform routing, by size.

    Args:
        found: the JSON of `benchmarks/nvlink.py`.
        path: what to write, .svg or .png.
    """
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
