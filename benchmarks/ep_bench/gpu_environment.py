# SPDX-License-Identifier: Apache-2.0
"""The GPU and the versions that numbers were taken with."""

import os
import subprocess
from typing import Any

from ep_bench import environment


def _gpu(field: str) -> str:
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def describe(commit: str | None) -> dict[str, Any]:
    """What `environment.describe` says, and the GPU, its driver and XLA's flags.

    Args:
        commit: to be shown instead of what git says.
    """
    where = environment.describe()
    return {
        **where,
        "commit": commit or where["commit"],
        "gpu": _gpu("name"),
        "driver": _gpu("driver_version"),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }
