# SPDX-License-Identifier: Apache-2.0
"""Checks that source files are small and named for what they hold."""

import pathlib
import sys
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).resolve().parents[2]
FOLDERS = ("benchmarks", "csrc", "examples", "jax_ep", "testing", "tests", "tools", "xla_ffi")
SUFFIXES = {".bazel", ".bzl", ".cc", ".cu", ".cuh", ".h", ".py", ".pyi"}
MAX_LINES = 450
# A name that fits everything hides everything.
VAGUE = {"common", "helper", "helpers", "misc", "util", "utils"}
# Named as the files of other projects that they stand for.
STAND_INS = ROOT / "tools" / "bazel" / "offline"
SPDX = "SPDX-License-Identifier: Apache-2.0"


def findings(path: pathlib.Path) -> Iterator[str]:
    """Yields what is wrong with one file."""
    lines = path.read_text().splitlines()
    if len(lines) > MAX_LINES:
        yield f"{len(lines)} lines, more than {MAX_LINES}: is it one thing?"
    if not path.is_relative_to(STAND_INS):
        if VAGUE & set(path.stem.lower().split("_")):
            yield "the name does not say what the file holds"
        if VAGUE & set(path.parent.relative_to(ROOT).parts):
            yield "the folder's name does not say what it holds"
    # Generated stubs and empty files have none.
    if path.suffix != ".pyi" and lines and SPDX not in "".join(lines[:2]):
        yield f"no '{SPDX}' in the first two lines"


def main() -> int:
    """Prints the findings; the exit status is 1 if there are any."""
    found = [
        f"{path.relative_to(ROOT)}: {finding}"
        for folder in FOLDERS
        for path in sorted((ROOT / folder).rglob("*"))
        if path.suffix in SUFFIXES and "__pycache__" not in path.parts
        for finding in findings(path)
    ]
    print("\n".join(found), file=sys.stderr, end="\n" if found else "")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
