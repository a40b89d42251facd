# SPDX-License-Identifier: Apache-2.0
"""Limits and enums that Python shares with C++, where csrc/core defines them. Imports no JAX."""

import numbers
from typing import Any

import ml_dtypes
import numpy as np

INT32_MAX = 2**31 - 1

# What the CUDA kernels can serve, as in csrc/core/limits.h.
MAX_RANKS = 64
MAX_TOPK = 32
MAX_EXPERTS = 4096
MAX_TOKENS_PER_RANK = 2**20
# As in csrc/core/low_latency_protocol.h.
MAX_LOW_LATENCY_TOKENS = 256
MAX_LOW_LATENCY_SELECTIONS = 16384
MAX_LOW_LATENCY_BINS = 1088

# In the order in which the compiled modules number them: csrc/core/dtype.h, csrc/core/ep_shape.h.
DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
LAYOUTS = ("expert", "rank")

WIRE_DTYPES = {"float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn)}


def is_int(value: Any, minimum: int = 1, maximum: int = INT32_MAX) -> bool:
    """Whether a value is an integer, of Python or NumPy, in a range."""
    is_integral = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    return is_integral and minimum <= int(value) <= maximum
