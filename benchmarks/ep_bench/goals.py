# SPDX-License-Identifier: Apache-2.0
"""What the measured times are to reach; reports say whether they do."""

from collections.abc import Mapping
from typing import Any

from ep_bench.cases import FP8

# On CPU devices: of the time of the faster baseline, at most.
HOST_RATIO = 0.8

# On one GPU that all ranks share: of the copy bandwidth, at the first size with 16 SMs a rank; and
# of one token, in seconds.
SHARED_SHARE = 0.6
SHARED_OVERHEAD_S = 15e-6

# On GPUs of their own, at R 8, T 4096, uniform, with at most this many SMs: seconds of one
# operation, and how many times as long each baseline takes, there and back.
OWN_SMS = 24
OWN_S = {("dispatch", FP8): 420e-6, ("combine", None): 830e-6}
OWN_RATIO = 2.0
# Of the low-latency kernels, R 2, uniform, layout "expert": operation, wire -> T -> seconds.
_LOW_LATENCY_S = {
    ("dispatch", FP8): {1: 9e-6, 16: 10e-6, 128: 15e-6},
    ("dispatch", None): {1: 9e-6, 16: 10e-6, 128: 17e-6},
    ("combine", None): {1: 9e-6, 16: 11e-6, 128: 18e-6},
    ("there_and_back", None): {1: 17e-6, 16: 20e-6, 128: 34e-6},
}


def low_latency_s(case: Mapping[str, Any], operation: str) -> float | None:
    """Seconds that an operation of a low-latency case is to take; None: there is no goal for it."""
    if case["num_ranks"] != 2 or case["layout"] != "expert":
        return None
    return _LOW_LATENCY_S.get((operation, case["wire_dtype"]), {}).get(case["num_tokens"])
