#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Compiles a file once: `compile_once.py COMPILER ARGUMENTS...`, as CMake's compiler launcher.

What a compiler made of the same sources with the same arguments is copied. It is for the modules:
those that tests use, `make cuda`, and each wheel are built as a user's are, in an environment and
from a folder of their own, but most of what is compiled is the same. Of two that come at the same
time the second waits. $COMPILE_ONCE is where objects are kept.

C++ is the same if it is the same once preprocessed. That takes nvcc as long as the rest: kernels
are the same if all files of csrc are; headers that lie neither there nor in the compiler's toolkit
are not foreseen.
"""

import fcntl
import hashlib
import os
import pathlib
import shutil
import subprocess
import sys

WRITTEN = ("-o", "-MF", "-MT")  # what follows names what is written
# What is said or refused, and not what is made: what is built first has them.
CHANGE_NOTHING = ("-Xptxas=-v", "-Werror=all-warnings", "-Wall", "-Wextra", "-Werror")
FOR_THE_PREPROCESSOR = ("-D", "-U", "-I")
CPP = (".cc", ".cpp")


def source_of(arguments: list[str]) -> pathlib.Path | None:
    """The file that is compiled, if one is."""
    if "-c" not in arguments or "-o" not in arguments:
        return None
    return next((pathlib.Path(a) for a in arguments if a.endswith((".cu", *CPP))), None)


def _program(command: list[str]) -> bytes:
    return pathlib.Path(shutil.which(command[0]) or command[0]).resolve().read_bytes()


def key_of_kernels(command: list[str], source: pathlib.Path) -> str | None:
    """Stands for the compiler, its arguments and all sources; None for what is not of csrc."""
    root = next((p.parent for p in source.parents if p.name == "csrc"), None)
    if root is None:  # CMake tries the compiler
        return None
    digest = hashlib.sha256(_program(command))
    written = {i + 1 for i, argument in enumerate(command) if argument in WRITTEN}
    same = [
        argument.replace(str(root), "")
        for i, argument in enumerate(command[1:], 1)
        if i not in written and argument not in CHANGE_NOTHING
    ]
    # CMake's versions have them in another order.
    digest.update("\0".join(sorted(same)).encode())
    for path in sorted((root / "csrc").rglob("*")):
        if path.suffix in {".cu", ".cuh", ".h"}:
            digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def key_of_cpp(command: list[str], source: pathlib.Path) -> str | None:
    """Stands for the compiler, what it does, and the preprocessed source; None if that fails."""
    preprocess, does = [command[0], "-E", "-P"], []
    arguments = iter(command[1:])
    for argument in arguments:
        if argument in WRITTEN:
            next(arguments)
        elif argument == "-isystem":
            preprocess += [argument, next(arguments)]
        elif argument not in ("-c", "-MD"):
            preprocess.append(argument)
            if not argument.startswith(FOR_THE_PREPROCESSOR) and argument != str(source):
                does += [] if argument in CHANGE_NOTHING else [argument]
    done = subprocess.run(preprocess, capture_output=True, check=False)
    if done.returncode != 0:
        return None
    parts = [hashlib.sha256(part).digest() for part in (_program(command), done.stdout)]
    return hashlib.sha256(b"".join(parts) + "\0".join(sorted(does)).encode()).hexdigest()


def main() -> int:
    """Returns the compiler's exit status, or 0 if its object was there."""
    command = sys.argv[1:]
    source = source_of(command)
    if source is None:
        key = None
    elif source.suffix in CPP:
        key = key_of_cpp(command, source)
    else:
        key = key_of_kernels(command, source)
    if key is None:  # also C++ that is not preprocessed: the compiler says why
        return subprocess.run(command, check=False).returncode
    kept = pathlib.Path(os.environ["COMPILE_ONCE"]) / f"{key}.o"
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
