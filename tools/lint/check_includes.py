# SPDX-License-Identifier: Apache-2.0
"""Checks the include directions of the C++ sources.

csrc knows neither XLA nor Python: it includes csrc and the standard library. xla_ffi adds itself,
XLA's FFI headers and nanobind. So csrc can be built, tested and used alone.
"""

import pathlib
import re
import sys
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).resolve().parents[2]
INCLUDE = re.compile(r'\s*#\s*include\s*([<"])([^>"]+)[>"]')

# Quoted and angle-bracketed includes with a folder in them. Those without one are the standard
# library's, but for Python.h.
ALLOWED = {
    "csrc": ("csrc/", "gtest/", "gmock/"),
    "xla_ffi": ("csrc/", "xla_ffi/", "xla/ffi/api/", "nanobind/"),
}


def bad_includes(path: pathlib.Path, allowed: tuple[str, ...]) -> Iterator[tuple[int, str]]:
    """Yields line number and header of each include that is not allowed."""
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not (match := INCLUDE.match(line)):
            continue
        bracket, header = match.groups()
        standard = bracket == "<" and "/" not in header and header != "Python.h"
        if not standard and not header.startswith(allowed):
            yield number, header


def main() -> int:
    """Prints the findings; the exit status is 1 if there are any."""
    findings = [
        f"{path.relative_to(ROOT)}:{number}: {folder} must not include {header}; "
        f"it may include {', '.join(allowed)} and the standard library"
        for folder, allowed in ALLOWED.items()
        for path in sorted((ROOT / folder).rglob("*"))
        if path.suffix in {".cc", ".cu", ".cuh", ".h"}
        for number, header in bad_includes(path, allowed)
    ]
    print("\n".join(findings), file=sys.stderr, end="\n" if findings else "")
    return bool(findings)


if __name__ == "__main__":
    sys.exit(main())
