# SPDX-License-Identifier: Apache-2.0
"""Experts for `moe_with_experts`, `sharded_moe` and the Flax layers.

Functions give experts with weights; classes say what a layer's experts compute, or what format
matrices are in.
"""

from jax_ep._src.experts.bound import ExpertWeights, custom, gated, gpt_oss, ungated
from jax_ep._src.experts.kinds import Custom, Experts, Gated, GptOss, Ungated
from jax_ep._src.experts.matrices import LowRank, Matrices, QuantizedMatrices

__all__ = [
    "Custom",
    "ExpertWeights",
    "Experts",
    "Gated",
    "GptOss",
    "LowRank",
    "Matrices",
    "QuantizedMatrices",
    "Ungated",
    "custom",
    "gated",
    "gpt_oss",
    "ungated",
]
