# SPDX-License-Identifier: Apache-2.0
"""Compiles all CUDA kernels, and fails if one of them spills registers or has a stack frame.

Prints a table of registers. Needs nvcc, but no GPU.

    python tools/check_ptxas.py BUILD_FOLDER [--jobs N] [CMake arguments]
"""

import argparse
import pathlib
import re
import shutil
import subprocess
import sys
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parent.parent
TARGET = "jax_ep_kernels"
ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
# Of an entry function, or of a function that it calls.
MEMORY = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
REGISTERS = re.compile(r"Used (\d+) registers")
STATIC_SHARED = re.compile(r"(\d+) bytes smem")


class Kernel(NamedTuple):
    """What ptxas says about one kernel on one architecture."""

    name: str
    arch: str
    registers: int
    stack: int
    spills: int
    shared: int  # static only; what a launch adds is not known here


def parse(log: str) -> list[Kernel]:
    """Returns the kernels in the output of `ptxas -v`."""
    kernels = []
    parts = ENTRY.split(log)[1:]
    for name, arch, text in zip(parts[::3], parts[1::3], parts[2::3], strict=True):
        memory = [tuple(map(int, found)) for found in MEMORY.findall(text)]
        registers = REGISTERS.search(text)
        if not memory or registers is None:
            raise SystemExit(f"check_ptxas: cannot read what ptxas says about {name}:\n{text}")
        shared = STATIC_SHARED.search(text)
        kernels.append(
            Kernel(
                name=name,
                arch=arch,
                registers=int(registers.group(1)),
                stack=max(stack for stack, _, _ in memory),
                spills=sum(stores + loads for _, stores, loads in memory),
                shared=int(shared.group(1)) if shared else 0,
            )
        )
    return kernels


def readable(names: list[str]) -> list[str]:
    """Returns the names as in the sources, shortened, where c++filt is there."""
    if not names or not shutil.which("c++filt"):
        return names
    done = subprocess.run(
        ["c++filt"], input="\n".join(names), check=True, capture_output=True, text=True
    )
    # void jax_ep::run_kernel<...>(...) -> run_kernel<...>
    return [
        re.sub(r"\w+::|\(anonymous namespace\)::", "", re.sub(r"^void |\([\w:, ]*\)$", "", line))
        for line in done.stdout.splitlines()
    ]


def build(folder: pathlib.Path, jobs: int, cmake_arguments: list[str]) -> str:
    """Compiles all kernels anew; returns what the compiler said."""
    beside = pathlib.Path(sys.executable).parent / "cmake"
    cmake = str(beside) if beside.exists() else "cmake"
    configure = [cmake, "-S", str(ROOT / "csrc"), "-B", str(folder), "--log-level=WARNING"]
    options = ["-DJAX_EP_CUDA=ON", "-DJAX_EP_PTXAS_VERBOSE=ON", "-DJAX_EP_BUILD_TESTS=OFF"]
    subprocess.run([*configure, *options, *cmake_arguments], check=True, stdout=subprocess.DEVNULL)
    # Objects that are up to date would not be spoken of.
    command = [cmake, "--build", str(folder), "--clean-first", "--target", TARGET]
    done = subprocess.run(
        [*command, "--parallel", str(jobs)],
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        print(done.stdout)
        raise SystemExit(f"check_ptxas: the kernels do not compile ({done.returncode})")
    return done.stdout


def main() -> int:
    """Prints the table and the findings; the exit status is 1 if there are any."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=pathlib.Path, help="for CMake's build")
    parser.add_argument("--jobs", type=int, default=2)
    arguments, cmake_arguments = parser.parse_known_args()
    kernels = parse(build(arguments.folder, arguments.jobs, cmake_arguments))
    if not kernels:
        raise SystemExit("check_ptxas: ptxas spoke of no kernel")
    names = readable([kernel.name for kernel in kernels])
    print(f"{'arch':9} {'registers':>9} {'shared':>7} {'stack':>6} {'spills':>6}  kernel")
    for name, k in sorted(zip(names, kernels, strict=True)):
        print(f"{k.arch:9} {k.registers:9} {k.shared:7} {k.stack:6} {k.spills:6}  {name}")
    bad = [
        f"{name} on {k.arch}: {k.stack} bytes of stack frame, {k.spills} bytes of spills"
        for name, k in zip(names, kernels, strict=True)
        if k.stack or k.spills
    ]
    print("\n".join(bad), file=sys.stderr, end="\n" if bad else "")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
