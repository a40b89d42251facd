# SPDX-License-Identifier: Apache-2.0
"""Prints the wheels of NVIDIA that pyproject.toml builds with, as pip's -r takes them.

python tools/bazel/nvidia_wheels.py >wheels.txt
"""

import pathlib
import tomllib

PYPROJECT = pathlib.Path(__file__).resolve().parents[2] / "pyproject.toml"


def wheels(pyproject: str) -> list[str]:
    """The requirements, in their order, of the compiler and of NVSHMEM."""
    overrides = tomllib.loads(pyproject)["tool"]["scikit-build"]["overrides"]
    required = [w for o in overrides for w in o.get("build", {}).get("requires", ())]
    return [wheel for wheel in required if wheel.startswith("nvidia-")]


if __name__ == "__main__":
    print("\n".join(wheels(PYPROJECT.read_text())))
