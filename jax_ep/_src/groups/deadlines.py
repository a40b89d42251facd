# SPDX-License-Identifier: Apache-2.0
"""How long the ranks of a group wait for one that does not come, where nobody says."""

import math

# By platform, seconds. On CPU, XLA ends a process that has waited 40 s for a collective of its own:
# our error must come before. On GPUs a rank that gives up costs its process.
_DEFAULT_TIMEOUT_S = {"cpu": 30.0, "cuda": 1800.0}


def default_timeout(platform: str) -> float:
    """Seconds until ranks give up; `math.inf` where XLA's collectives do the waiting."""
    return _DEFAULT_TIMEOUT_S.get(platform, math.inf)
