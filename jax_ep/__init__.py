# SPDX-License-Identifier: Apache-2.0
"""Expert-parallel communication for Mixture-of-Experts models in JAX.

`dispatch` sends tokens to the ranks that host their experts, `combine` brings the results back.
Importing this package does no work: names are loaded when they are first used, so that
`jax_ep.reference` needs no JAX and nothing needs Flax or the compiled module but what uses them.
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jax_ep import experts as experts
    from jax_ep import flax as flax
    from jax_ep import plot as plot
    from jax_ep import reference as reference
    from jax_ep import serving as serving
    from jax_ep._src.api import combine as combine
    from jax_ep._src.api import combine_with_status as combine_with_status
    from jax_ep._src.api import dispatch as dispatch
    from jax_ep._src.balancing.arrays import PlacementArrays as PlacementArrays
    from jax_ep._src.balancing.copies import expand_experts as expand_experts
    from jax_ep._src.balancing.copies import move_experts as move_experts
    from jax_ep._src.balancing.load_report import LoadReport as LoadReport
    from jax_ep._src.balancing.load_window import LoadWindow as LoadWindow
    from jax_ep._src.balancing.place import place as place
    from jax_ep._src.balancing.placement import ExpertPlacement as ExpertPlacement
    from jax_ep._src.balancing.planner import plan_placement as plan_placement
    from jax_ep._src.balancing.rebalancer import Rebalancer as Rebalancer
    from jax_ep._src.balancing.restore import restore_experts as restore_experts
    from jax_ep._src.config import EpConfig as EpConfig
    from jax_ep._src.errors import EpGroupClosed as EpGroupClosed
    from jax_ep._src.errors import EpUnavailable as EpUnavailable
    from jax_ep._src.expert_choice import route_expert_choice as route_expert_choice
    from jax_ep._src.groups.group import EpGroup as EpGroup
    from jax_ep._src.groups.health import EpHealth as EpHealth
    from jax_ep._src.halves import combine_done as combine_done
    from jax_ep._src.halves import combine_start as combine_start
    from jax_ep._src.halves import dispatch_done as dispatch_done
    from jax_ep._src.halves import dispatch_start as dispatch_start
    from jax_ep._src.missing import lost_selections as lost_selections
    from jax_ep._src.moe import MoeStats as MoeStats
    from jax_ep._src.moe import moe as moe
    from jax_ep._src.moe import moe_with_experts as moe_with_experts
    from jax_ep._src.quantized import QuantizedRows as QuantizedRows
    from jax_ep._src.quantized import quantize as quantize
    from jax_ep._src.routing import load_balance_loss as load_balance_loss
    from jax_ep._src.routing import route as route
    from jax_ep._src.routing import router_z_loss as router_z_loss
    from jax_ep._src.routing import update_bias as update_bias
    from jax_ep._src.sharded.moe import sharded_moe as sharded_moe
    from jax_ep._src.tuning.launches import TunedLaunch as TunedLaunch
    from jax_ep._src.tuning.launches import Tuning as Tuning
    from jax_ep._src.types import CombineFlight as CombineFlight
    from jax_ep._src.types import Dispatched as Dispatched
    from jax_ep._src.types import DispatchFlight as DispatchFlight
    from jax_ep._src.types import DispatchHandle as DispatchHandle

__version__ = "0.2.0"

# Module -> the public names that it gives. Type checkers need them above, too: a test compares.
_NAMES = {
    "api": ("combine", "combine_with_status", "dispatch"),
    "balancing.arrays": ("PlacementArrays",),
    "balancing.copies": ("expand_experts", "move_experts"),
    "balancing.load_report": ("LoadReport",),
    "balancing.load_window": ("LoadWindow",),
    "balancing.place": ("place",),
    "balancing.placement": ("ExpertPlacement",),
    "balancing.planner": ("plan_placement",),
    "balancing.rebalancer": ("Rebalancer",),
    "balancing.restore": ("restore_experts",),
    "config": ("EpConfig",),
    "errors": ("EpGroupClosed", "EpUnavailable"),
    "expert_choice": ("route_expert_choice",),
    "groups.group": ("EpGroup",),
    "groups.health": ("EpHealth",),
    "halves": ("combine_done", "combine_start", "dispatch_done", "dispatch_start"),
    "missing": ("lost_selections",),
    "moe": ("MoeStats", "moe", "moe_with_experts"),
    "quantized": ("QuantizedRows", "quantize"),
    "routing": ("load_balance_loss", "route", "router_z_loss", "update_bias"),
    "sharded.moe": ("sharded_moe",),
    "tuning.launches": ("TunedLaunch", "Tuning"),
    "types": ("CombineFlight", "DispatchFlight", "DispatchHandle", "Dispatched"),
}
_EXPORTS = {name: f"jax_ep._src.{module}" for module, names in _NAMES.items() for name in names}
# Module -> what it cannot be imported without, of what jax_ep does not itself require.
_SUBMODULES = {
    "experts": None,
    "flax": "flax",
    "plot": "matplotlib",
    "reference": None,
    "serving": None,
}
# A name that is gone -> what takes its place.
_REPLACED = {"moe_with_stats": "jax_ep.moe(..., with_stats=True)"}

__all__ = [*_EXPORTS, "experts", "reference", "serving"]  # noqa: PLE0604  all of them are strings

if not TYPE_CHECKING:  # for checkers every name would be there, the misspelt ones too

    def __getattr__(name: str) -> object:
        if name in _EXPORTS:
            value = getattr(importlib.import_module(_EXPORTS[name]), name)
        elif name in _SUBMODULES:
            value = importlib.import_module(f"jax_ep.{name}")
        else:
            instead = f"; {_REPLACED[name]} takes its place" if name in _REPLACED else ""
            raise AttributeError(f"module 'jax_ep' has no attribute {name!r}{instead}")
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        # Without what would not load: help(jax_ep) asks for each of these names.
        here = {
            name
            for name, needed in _SUBMODULES.items()
            if needed is None or importlib.util.find_spec(needed)
        }
        return sorted({*_EXPORTS, *here, "__version__"})
