# SPDX-License-Identifier: Apache-2.0
"""Checks the include directions of the C++ sources.

csrc knows neither XLA nor Python: it includes csrc and the standard library. xla_ffi adds itself,
XLA's FFI headers and nanobind. So csrc can be built, tested and used alone. Inside csrc, the lower
layers do not know the upper ones, and only what runs on GPUs knows CUDA.
"""

import pathlib
import re
import sys
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).resolve().parents[2]
INCLUDE = re.compile(r'\s*#\s*include\s*([<"])([^>"]+)[>"]')

CUDA = ("cuda/", "cuda_")
POSIX = ("sys/mman.h",)
# Folder -> what its files include, beside the standard library; the innermost folder counts.
ALLOWED = {
    "csrc/core": ("csrc/core/",),
    "csrc/core/tests": ("csrc/core/", "csrc/testing/", "gtest/"),
    "csrc/tuning": ("csrc/core/", "csrc/tuning/"),
    "csrc/tuning/tests": ("csrc/core/", "csrc/tuning/", "gtest/"),
    "csrc/cpu": ("csrc/core/", "csrc/cpu/", *POSIX),
    "csrc/cpu/tests": ("csrc/core/", "csrc/cpu/", "csrc/testing/", "gtest/", "gmock/", *POSIX),
    "csrc/device": ("csrc/core/", "csrc/device/", *CUDA),
    "csrc/device/tests": ("csrc/core/", "csrc/device/", "gtest/"),
    "csrc/launch": ("csrc/core/", "csrc/launch/", "csrc/tuning/", *CUDA),
    "csrc/kernels": (
        "csrc/core/",
        "csrc/device/",
        "csrc/kernels/",
        "csrc/launch/",
        "csrc/tuning/",
        *CUDA,
    ),
    "csrc/kernels/tests": ("csrc/", "gtest/", *CUDA),
    "csrc/probe": ("csrc/device/", "sys/", *CUDA),
    "csrc/rdma": (
        "csrc/device/",
        "csrc/kernels/internode/",
        "csrc/launch/",
        "csrc/rdma/",
        "nvshmem",
        *CUDA,
    ),
    "csrc/rdma/tests": ("csrc/", "sys/", *CUDA),
    "csrc/runtime": ("csrc/core/", "csrc/launch/", "csrc/runtime/", "csrc/tuning/", *CUDA),
    "csrc/runtime/tests": ("csrc/", "gtest/", "sys/", "nvtx3/", *CUDA),
    "csrc/sim": ("csrc/core/", "csrc/device/", "csrc/sim/", "sanitizer/", "sys/"),
    "csrc/sim/tests": ("csrc/", "gtest/"),
    "csrc/testing": ("csrc/",),
    "xla_ffi": ("csrc/", "xla_ffi/", "xla/ffi/api/", "nanobind/", "nvtx3/", *CUDA),
    "xla_ffi/cpu": ("csrc/core/", "csrc/cpu/", "xla_ffi/", "xla/ffi/api/", "nanobind/"),
}


def folder_of(path: pathlib.Path) -> str | None:
    """Returns the innermost folder with a rule that holds the file."""
    parents = (parent.as_posix() for parent in path.relative_to(ROOT).parents)
    return next((parent for parent in parents if parent in ALLOWED), None)


def is_standard(bracket: str, header: str) -> bool:
    """Returns whether a header is the standard library's: those have no folder."""
    return bracket == "<" and "/" not in header and header != "Python.h"


def bad_includes(path: pathlib.Path, allowed: tuple[str, ...]) -> Iterator[tuple[int, str]]:
    """Yields line number and header of each include that is not allowed."""
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not (match := INCLUDE.match(line)):
            continue
        bracket, header = match.groups()
        cuda = header.startswith(CUDA)
        if not header.startswith(allowed) and (cuda or not is_standard(bracket, header)):
            yield number, header


def main() -> int:
    """Prints the findings; the exit status is 1 if there are any."""
    findings = []
    for top in ("csrc", "xla_ffi"):
        for path in sorted((ROOT / top).rglob("*")):
            if path.suffix not in {".cc", ".cu", ".cuh", ".h"}:
                continue
            name = path.relative_to(ROOT)
            folder = folder_of(path)
            if folder is None:
                findings.append(f"{name}: this folder has no rule in {pathlib.Path(__file__).name}")
                continue
            allowed = ALLOWED[folder]
            findings += [
                f"{name}:{number}: {folder} must not include {header}; it may include "
                f"{', '.join(allowed)} and the standard library"
                for number, header in bad_includes(path, allowed)
            ]
    print("\n".join(findings), file=sys.stderr, end="\n" if findings else "")
    return bool(findings)


if __name__ == "__main__":
    sys.exit(main())
