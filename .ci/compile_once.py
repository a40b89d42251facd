#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Compiles a file once: `compile_once.py COMPILER ARGUMENTS...`, as CMake's compiler launcher.

What a compiler made of the same sources with the same arguments is copied. It is for the kernels
of `make cuda` and of the wheels: each wheel is built as a user's is, in an environment and from a
folder of its own, but the kernels are the same. Of two that come at the same time the second waits.
$COMPILE_ONCE is where objects are kept. Headers that lie neither in csrc nor in the compiler's
toolkit are not foreseen.
"""

import fcntl
import hashlib
import os
import pathlib
import shutil
import subprocess
import sys

WRITTEN = ("-o", "-MF", "-MT")  # what follows names what is written
# What is said or refused, and not what is made: `make cuda`, which has them, comes first.
CHANGE_NOTHING = ("-Xptxas=-v", "-Werror=all-warnings")


def source_root(arguments: list[str]) -> pathlib.Path | None:
    """The folder that holds csrc, if it is a file of csrc that is compiled."""
    if "-c" not in arguments or "-o" not in arguments:
        return None
    sources = (pathlib.Path(a) for a in arguments if a.endswith(".cu"))
    return next((p.parent for source in sources for p in source.parents if p.name == "csrc"), None)


def key_of(command: list[str], root: pathlib.Path) -> str:
    """Stands for the compiler, its arguments and the sources, wherever they lie."""
    digest = hashlib.sha256(pathlib.Path(shutil.which(command[0]) or command[0]).read_bytes())
    written = {i + 1 for i, argument in enumerate(command) if argument in WRITTEN}
    for i, argument in enumerate(command[1:], 1):
        if argument in CHANGE_NOTHING:
            continue
        digest.update(b"\0" + (b"" if i in written else argument.replace(str(root), "").encode()))
    for path in sorted((root / "csrc").rglob("*")):
        if path.suffix in {".cu", ".cuh", ".h"}:
            digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def main() -> int:
    """Returns the compiler's exit status, or 0 if its object was there."""
    command = sys.argv[1:]
    root = source_root(command)
    if root is None:
        return subprocess.run(command, check=False).returncode
    kept = pathlib.Path(os.environ["COMPILE_ONCE"]) / f"{key_of(command, root)}.o"
    kept.parent.mkdir(parents=True, exist_ok=True)
    output = command[command.index("-o") + 1]
    with kept.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if kept.exists():
            shutil.copyfile(kept, output)
            if "-MF" in command:  # Ninja wants one; nothing is built a second time here
                depfile = pathlib.Path(command[command.index("-MF") + 1])
                depfile.write_text(f"{output}:\n")
            return 0
        status = subprocess.run(command, check=False).returncode
        if status == 0:
            shutil.copyfile(output, kept)
        return status


if __name__ == "__main__":
    sys.exit(main())
