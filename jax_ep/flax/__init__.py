# SPDX-License-Identifier: Apache-2.0
"""Flax layers over `jax_ep.moe`: `jax_ep.flax.nnx.MoE` and `jax_ep.flax.linen.MoE`.

`jax_ep.flax.nnx` and `jax_ep.flax.linen` are loaded when they are first used. Needs Flax
(`pip install jax-ep[flax]`). `load_experts` puts the weights of a checkpoint into either;
`stored_from_logical` makes weights of slots from those of experts.
"""

import importlib
from typing import TYPE_CHECKING

try:
    import flax as _flax  # noqa: F401  here, so that one sentence says that it is missing
except ModuleNotFoundError as _error:
    if _error.name != "flax":
        raise
    raise ModuleNotFoundError(
        "jax_ep.flax needs Flax, which is not installed: pip install 'jax-ep[flax]'", name="flax"
    ) from _error

from jax_ep.flax._load import load_experts
from jax_ep.flax._placed import stored_from_logical

if TYPE_CHECKING:
    from jax_ep.flax import linen as linen
    from jax_ep.flax import nnx as nnx

__all__ = ["linen", "load_experts", "nnx", "stored_from_logical"]
_SUBMODULES = ("linen", "nnx")

if not TYPE_CHECKING:  # for checkers every name would be there, the misspelt ones too

    def __getattr__(name: str) -> object:
        if name in _SUBMODULES:
            return importlib.import_module(f"jax_ep.flax.{name}")
        raise AttributeError(f"module 'jax_ep.flax' has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted(__all__)
