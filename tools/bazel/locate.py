# SPDX-License-Identifier: Apache-2.0
"""Prints, as JSON, where the packages of the interpreter are that runs this."""

import importlib.util
import json
import os
import sys
import sysconfig


def folders(package: str) -> list[str]:
    """Returns the folders of a package; pip may spread a namespace package over several."""
    spec = importlib.util.find_spec(package)
    return list(spec.submodule_search_locations) if spec else []


def holding(candidates: list[str], member: str) -> str:
    """Returns the first folder that has the member; empty if there is none."""
    return next((c for c in candidates if os.path.exists(os.path.join(c, member))), "")


def main() -> None:
    """Prints what is found, and an empty text for what is not."""
    if sys.version_info < (3, 11):  # noqa: UP036
        sys.exit(f"It is Python {sys.version}")
    nvidia = folders("nvidia")
    found = {
        # Not resolved: a virtual environment is known by its path.
        "python": sys.executable,
        "python_headers": holding([sysconfig.get_path("include")], "Python.h"),
        "xla_ffi": holding(
            [os.path.join(f, "include") for f in folders("jaxlib")], "xla/ffi/api/ffi.h"
        ),
        "nanobind": holding(folders("nanobind"), "src/nb_combined.cpp"),
        "cuda": holding([os.path.join(f, "cu13") for f in nvidia], "bin/nvcc"),
        "nvshmem": holding([os.path.join(f, "nvshmem") for f in nvidia], "lib/libnvshmem_device.a"),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
