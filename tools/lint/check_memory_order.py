# SPDX-License-Identifier: Apache-2.0
"""Checks that the kernels' memory ordering is written down, and in one place.

- A comment RELEASE(name) or ACQUIRE(name) stands by every release and every wait of the kernels.
  Each name has both, and a row in docs/design/protocol.md or internode.md.
- Only cuda_primitives.h holds asm.
- Kernels and device headers reach the hardware through primitives.h alone: what the simulator does
  not see, it cannot check.
"""

import pathlib
import re
import sys
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGES = ("docs/design/protocol.md", "docs/design/internode.md")
PRIMITIVES = "csrc/device/cuda_primitives.h"
# Made of CUDA by necessity: the primitives, and conversions between number formats.
HARDWARE = {PRIMITIVES, "csrc/device/convert.h"}
KERNELS = ("csrc/device", "csrc/kernels")
# Releases whose acquire is not in a kernel, and the file that has it.
ACQUIRED_BY_HOST = {"error": "csrc/runtime/rank_words.cc"}

TAG = re.compile(r"\b(RELEASE|ACQUIRE)\((\w+)\)")
COMMENT = re.compile(r"//.*$")
# What must have which tag in one of the lines before it, at most this many.
TAGGED = {"st_release<": "RELEASE", "wait_until_reached<": "ACQUIRE"}
NEAR = 9
BANNED = re.compile(
    r"\b__restrict(?:__)?\b|\b__ldg\b|\b__ldcg\b|\bvolatile\b"
    # Not after a dot: the host's cudaLaunchConfig_t has members of these names.
    r"|(?<!\.)\b(?:threadIdx|blockIdx|blockDim|gridDim|warpSize)\b"
    r"|\b__(?:shfl|ballot|match|any|all|reduce|activemask|sync|threadfence|nanosleep|trap)\w*"
    r"|\b__shared__\b|\bclock(?:64)?\(|\batomic\w*|\bcuda::|<cuda/|<cooperative_groups"
)


def sources(folders: tuple[str, ...]) -> Iterator[pathlib.Path]:
    """Yields the C++ and CUDA sources in the folders, but for tests."""
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*")):
            is_test = "tests" in path.relative_to(ROOT).parts
            if path.suffix in {".cc", ".cu", ".cuh", ".h"} and not is_test:
                yield path


def untagged(lines: list[str]) -> Iterator[tuple[int, str]]:
    """Yields line number and tag of each release and wait that lacks its comment."""
    for number, line in enumerate(lines):
        code = COMMENT.sub("", line)
        for call, tag in TAGGED.items():
            before = "\n".join(lines[max(number - NEAR, 0) : number + 1])
            if call in code and f"{tag}(" not in before:
                yield number + 1, tag


def banned(lines: list[str]) -> Iterator[tuple[int, str]]:
    """Yields line number and name of each use of the hardware behind the primitives' back."""
    for number, line in enumerate(lines, 1):
        for match in BANNED.finditer(COMMENT.sub("", line)):
            yield number, match[0]


def tag_findings(tags: dict[str, set[str]], page: str) -> Iterator[str]:
    """Yields what is wrong with the names in `tags["RELEASE"]` and `tags["ACQUIRE"]`."""
    for name in sorted(tags["RELEASE"] - tags["ACQUIRE"]):
        host = ACQUIRED_BY_HOST.get(name)
        if host is None:
            yield f"RELEASE({name}) has no ACQUIRE({name}): who reads it?"
        elif "memory_order_acquire" not in (ROOT / host).read_text():
            yield f"RELEASE({name}) is acquired nowhere in {host}"
    for name in sorted(tags["ACQUIRE"] - tags["RELEASE"]):
        yield f"ACQUIRE({name}) has no RELEASE({name}): who stores it?"
    for name in sorted(tags["RELEASE"] | tags["ACQUIRE"]):
        if f"\n| `{name}` |" not in page:
            yield f"{' and '.join(PAGES)} have no row for the tag {name}"


def file_findings(path: pathlib.Path, lines: list[str]) -> Iterator[str]:
    """Yields what is wrong with one file of the kernels."""
    name = path.relative_to(ROOT).as_posix()
    if name in HARDWARE:
        return
    for number, tag in untagged(lines):
        yield f"{name}:{number}: no {tag}(name) comment in the {NEAR} lines before"
    for number, what in banned(lines):
        yield f"{name}:{number}: {what}: only {PRIMITIVES} may use it"


def asm_findings() -> Iterator[str]:
    """Yields each asm outside of the primitives; the simulator's fibers are not for GPUs."""
    for top in ("csrc", "xla_ffi"):
        for path in sorted((ROOT / top).rglob("*")):
            name = path.relative_to(ROOT).as_posix()
            if path.suffix not in {".cc", ".cu", ".cuh", ".h"} or name == PRIMITIVES:
                continue
            if name.startswith("csrc/sim/"):
                continue
            for number, line in enumerate(path.read_text().splitlines(), 1):
                if re.search(r"\b(?:asm|__asm__)\b", COMMENT.sub("", line)):
                    yield f"{name}:{number}: asm: it belongs into {PRIMITIVES}"


def main() -> int:
    """Prints the findings; the exit status is 1 if there are any."""
    tags: dict[str, set[str]] = {"RELEASE": set(), "ACQUIRE": set()}
    findings = []
    for path in sources(KERNELS):
        text = path.read_text()
        for kind, name in TAG.findall(text):
            tags[kind].add(name)
        findings += file_findings(path, text.splitlines())
    findings += tag_findings(tags, "".join((ROOT / page).read_text() for page in PAGES))
    findings += asm_findings()
    print("\n".join(findings), file=sys.stderr, end="\n" if findings else "")
    return bool(findings)


if __name__ == "__main__":
    sys.exit(main())
