# SPDX-License-Identifier: Apache-2.0
"""Compares the order of memory that nvcc makes of the kernels with a table of it.

The table counts, in the PTX of each kernel, the instructions that release, acquire, fence, wait or
copy in bulk. The protocol (docs/design/protocol.md) rests on them, and a simulator of the sources
does not see that a compiler, a library or a changed wrapper makes others of them. Needs nvcc, but
no GPU.

    python tools/check_ptx.py [--update] [--jobs N]
"""

import argparse
import collections
import concurrent.futures
import difflib
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping

ROOT = pathlib.Path(__file__).resolve().parent.parent
TABLE = ROOT / "csrc" / "kernels" / "ptx_table.txt"
SOURCES = (
    *(
        f"high_throughput/{name}"
        for name in (
            *("plan", "dispatch", "dispatch_products", "plan_dispatch"),
            *("combine", "combine_domains"),
        )
    ),
    *("low_latency/dispatch", "low_latency/combine"),
    *("low_latency/masking_dispatch", "low_latency/masking_combine"),
    *(
        f"internode/loopback_{name}"
        for name in ("plan", "dispatch", "combine", "low_latency_dispatch", "low_latency_combine")
    ),
)
# What of csrc/kernels/CMakeLists.txt makes another program; and the PTX that wheels have.
FLAGS = ("-std=c++20", "--expt-relaxed-constexpr", "-fmad=false", "-O3", "-arch=compute_90")
HEAD = """\
# Instructions that order memory, wait or copy in bulk, in the PTX of each kernel; see
# tools/check_ptx.py. A change of this file is a change of the protocol: say why in its commit.
# Made by `python tools/check_ptx.py --update` with nvcc {release}.
"""

FUNCTION = re.compile(r"^\s*(?:\.\w+\s+)*\.(?:entry|func)\s+(?:\([^)]*\)\s*)?([\w$]+)")
INSTRUCTION = re.compile(
    r"^\s*(?:@!?%p\d+\s+)?("
    r"(?:ld\.(?:acquire|relaxed|volatile|mmio|global\.nc)|st\.(?:release|relaxed|volatile|async)"
    r"|atom|red|fence|membar|mbarrier|cp|griddepcontrol|bar|barrier|multimem|trap)\b[\w.:]*)"
)
Counts = collections.Counter[str]


def identifiers(mangled: str) -> list[str]:
    """Names in a mangled name, in their order."""
    names = []
    at = 0
    while found := re.compile(r"\d+").search(mangled, at):
        end = found.end() + int(found[0])
        name = mangled[found.end() : end]
        at = end if name.isidentifier() and len(name) == int(found[0]) else found.end()
        if at == end:
            names.append(name)
    return names


def function_name(mangled: str) -> str:
    """Of a kernel its class, of another function its own name."""
    names = [name for name in identifiers(mangled) if name not in ("jax_ep", "dev")]
    if "run_kernel" in names:
        return names[names.index("run_kernel") + 1]
    nested = re.match(r"_ZN(?:\d+[A-Za-z_]\w*?)*?E", mangled)
    inside = identifiers(nested[0]) if nested else names[:1]
    return inside[-1] if inside else mangled


def parse(ptx: str) -> list[tuple[str, Counts]]:
    """Each function of a PTX file that has such instructions, and how many of each."""
    functions: dict[str, Counts] = {}
    current = ""
    for line in ptx.splitlines():
        if function := FUNCTION.match(line):
            current = function[1]
        elif instruction := INSTRUCTION.match(line):
            functions.setdefault(current, collections.Counter())[instruction[1]] += 1
    return [(function_name(name), counts) for name, counts in functions.items()]


def render(files: Mapping[str, str], release: str) -> str:
    """The table of the PTX of each source file. Kernels of one class that are alike are one."""
    lines = [HEAD.format(release=release)]
    for source, ptx in files.items():
        alike = collections.Counter(
            (name, tuple(sorted(counts.items()))) for name, counts in parse(ptx)
        )
        for (name, counts), number in sorted(alike.items()):
            kernels = f", each of {number} kernels" if number > 1 else ""
            lines.append(f"{source}.cu: {name}{kernels}\n")
            lines += [f"{count:6} {instruction}\n" for instruction, count in counts]
            lines.append("\n")
    return "".join(lines).rstrip("\n") + "\n"


def release_of(table: str) -> str:
    """Which nvcc a table was made with."""
    found = re.search(r"with nvcc ([\d.]+)\.$", table, re.MULTILINE)
    return found[1] if found else "unknown"


def difference(table: str, made: str) -> str:
    """What is not as in the table, as a diff; empty if nothing is.

    Another release of nvcc may unroll other loops: then only what there is counts, not how often.
    """
    if release_of(table) != release_of(made):
        table, made = (re.sub(r"(?m)^ +\d+|^#.*$", "", text) for text in (table, made))
    lines = difflib.unified_diff(
        table.splitlines(), made.splitlines(), "table", "compiled", lineterm="", n=20
    )
    return "\n".join(lines)


def find_nvcc() -> str | None:
    """Where CMake finds it; None if there is none."""
    folders = [os.environ.get("PATH", "")]
    folders += [
        f"{os.environ[name]}/bin" for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ
    ]
    path = os.pathsep.join([*folders, "/usr/local/cuda/bin"])
    return shutil.which(os.environ.get("CUDACXX", "nvcc"), path=path)


def release(nvcc: str) -> str:
    """The release of an nvcc: "13.0"."""
    done = subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True)
    found = re.search(r"release ([\d.]+)", done.stdout)
    return found[1] if found else "unknown"


def compile_ptx(nvcc: str, jobs: int) -> dict[str, str]:
    """The PTX of each of the kernels' source files."""
    with tempfile.TemporaryDirectory() as folder:

        def compile_one(source: str) -> str:
            out = pathlib.Path(folder, f"{source.replace('/', '_')}.ptx")
            path = ROOT / "csrc" / "kernels" / f"{source}.cu"
            command = [nvcc, "-ptx", *FLAGS, f"-I{ROOT}", str(path), "-o", str(out)]
            done = subprocess.run(command, check=False, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"check_ptx: {source}.cu does not compile:\n{done.stderr}")
            return out.read_text()

        with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
            return dict(zip(SOURCES, pool.map(compile_one, SOURCES), strict=True))


def main() -> int:
    """Prints what differs; the exit status is 1 if anything does."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--update", action="store_true", help="write the table anew")
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    nvcc = find_nvcc()
    if nvcc is None:
        raise SystemExit("check_ptx: there is no nvcc")
    made = render(compile_ptx(nvcc, arguments.jobs), release(nvcc))
    if arguments.update:
        TABLE.write_text(made)
        return 0
    found = difference(TABLE.read_text(), made)
    if found:
        print(
            f"{found}\n\ncheck_ptx: the kernels' PTX is not as {TABLE.relative_to(ROOT)} says. If "
            "that is meant, write the table\nanew (python tools/check_ptx.py --update), and say in "
            "the commit why the protocol holds.",
            file=sys.stderr,
        )
        return 1
    print(f"The PTX of {len(SOURCES)} files has the instructions that {TABLE.name} says.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
