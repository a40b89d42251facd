# SPDX-License-Identifier: Apache-2.0
"""Pictures of the loads of experts and ranks, as matplotlib's figures: `figure.savefig(path)`.

Needs matplotlib: `pip install 'jax-ep[plots]'`.
"""

from jax_ep._src.balancing.load_plots import before_after, heat_map, ranks

__all__ = ["before_after", "heat_map", "ranks"]
