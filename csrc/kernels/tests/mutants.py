# SPDX-License-Identifier: Apache-2.0
"""Mutation tests: the simulator must notice every weakening of the kernels.

Each mutant is one edit of one header. It is compiled, and random scenarios are run on it until one
fails. A mutant that survives all its seeds is either dead code or a hole in the simulator's model.

    python csrc/kernels/tests/mutants.py --build build/csrc/plain [--only TEXT] [--jobs 2]

The seed that caught a mutant last time is tried first: mutant_seeds.json has those that come late,
and `--update` writes it anew.
"""

import argparse
import concurrent.futures
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys
import tempfile
import time

from high_throughput_mutants import HIGH_THROUGHPUT_MUTANTS, high_throughput_operations
from internode_low_latency_mutants import INTERNODE_LOW_LATENCY_MUTANTS
from internode_mutants import INTERNODE_MUTANTS, internode_operation
from low_latency_mutants import LOW_LATENCY_MUTANTS
from missing_rank_mutants import MISSING_RANK_MUTANTS
from mutant import Mutant
from rank_mask_mutants import RANK_MASK_MUTANTS

ROOT = pathlib.Path(__file__).resolve().parents[3]
MUTANTS = (
    HIGH_THROUGHPUT_MUTANTS
    + LOW_LATENCY_MUTANTS
    + INTERNODE_MUTANTS
    + INTERNODE_LOW_LATENCY_MUTANTS
    + RANK_MASK_MUTANTS
    + MISSING_RANK_MUTANTS
)
SOURCES = "csrc/testing/simulated_{}.cc"
SEEDS = pathlib.Path(__file__).with_name("mutant_seeds.json")
LATE = 5  # scenarios that are run in less than it takes to compile a mutant


def operations(mutant: Mutant) -> list[str]:
    """The `simulated_*.cc` that are compiled with a mutant."""
    if mutant.absences:
        return ["masking"]
    if mutant.low_latency:
        return ["internode_low_latency" if mutant.internode else "low_latency"]
    if mutant.internode:
        return [f"internode_{internode_operation(mutant)}"]
    return high_throughput_operations(mutant)


def mutate(mutant: Mutant) -> str:
    """The header's text with the edit.

    Raises:
        SystemExit: the text to be replaced is not there any more.
    """
    text = (ROOT / mutant.path).read_text()
    start = text.find(mutant.after)
    at = text.find(mutant.old, start + len(mutant.after)) if start >= 0 else -1
    if at < 0:
        sys.exit(f"mutants: '{mutant.name}' does not fit {mutant.path} any more")
    return text[:at] + mutant.new + text[at + len(mutant.old) :]


def _compiler(build: pathlib.Path, source: str) -> list[str]:
    """How the build compiles a file, without its output."""
    entries = json.loads((build / "compile_commands.json").read_text())
    entry = next(e for e in entries if e["file"].endswith(source))
    compiler = shlex.split(entry["command"])
    return compiler[: compiler.index("-o")]


# Read once for all mutants: that is a third of what a compilation takes.
_STANDARD = ("bit", "cstddef", "cstdint", "functional", "limits", "source_location", "utility")
_OPTIONS = ("-Og", "-g0", "-w")


def _precompile(build: pathlib.Path, folder: pathlib.Path) -> None:
    """Makes a header of the standard library's, precompiled with the options of mutants."""
    header = folder / "standard.h"
    header.write_text("".join(f"#include <{name}>\n" for name in _STANDARD))
    command = [*_compiler(build, SOURCES.format("plan")), *_OPTIONS, "-x", "c++-header"]
    subprocess.run([*command, "-o", f"{header}.gch", header], cwd=build, check=True)


def _compile(mutant: Mutant, build: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """`simulate` with the mutant in it."""
    header = folder / mutant.path
    header.parent.mkdir(parents=True)
    header.write_text(mutate(mutant))
    num_items = []
    for operation in operations(mutant):
        source = SOURCES.format(operation)
        compiler = _compiler(build, source)
        num_items.append(str(folder / f"{operation}.o"))
        command = [compiler[0], f"-I{folder}", *compiler[1:], *_OPTIONS]
        command += ["-include", folder.parent / "standard.h"]
        command += ["-DJAX_EP_SIMULATED_ROW_TYPE=BFloat16Rows"] * mutant.in_bfloat16
        subprocess.run([*command, "-o", num_items[-1], "-c", ROOT / source], cwd=build, check=True)
    program = folder / "simulate"
    main = build / "kernels/tests/CMakeFiles/simulate.dir/simulate.cc.o"
    sanitizers = [flag for flag in compiler if flag.startswith("-fsanitize")]
    libraries = [
        build / path
        for path in (
            "testing/libjax_ep_scenarios.a", "sim/libjax_ep_sim.a",
            "testing/libjax_ep_cpu_testing.a", "libjax_ep_cpu.a", "libjax_ep_core.a",
        )
    ]  # fmt: skip
    link = [compiler[0], "-o", program, main, *num_items, *libraries, "-lpthread", *sanitizers]
    subprocess.run(link, check=True)
    return program


def _simulate(
    mutant: Mutant, program: pathlib.Path, likely: int | None
) -> subprocess.CompletedProcess[str]:
    """Runs scenarios until one fails: the likely one, then all from the first on."""
    scenarios = ["--low-latency"] * mutant.low_latency + ["--internode"] * mutant.internode
    scenarios += ["--masks"] * mutant.masks + ["--by-counts"] * mutant.by_counts
    scenarios += ["--bfloat16"] * mutant.in_bfloat16
    if mutant.mishaps:
        scenarios = ["--mishaps"]
    if mutant.absences:
        scenarios = ["--absences"]
    ranges = [f"1:{mutant.seeds}"]
    if likely is not None and likely <= mutant.seeds:
        ranges.insert(0, f"{likely}:{likely}")
    for seeds in ranges:
        command = [program, *scenarios, "--seeds", seeds]
        result = subprocess.run(command, capture_output=True, text=True, timeout=600)
        if result.returncode != 0:
            break
    return result


def run(
    mutant: Mutant, build: pathlib.Path, work: pathlib.Path, seeds: dict[str, int]
) -> str | None:
    """What is wrong with the verdict on a mutant; None if it is as it must be.

    Args:
        mutant: the edit.
        build: folder of csrc.
        work: a folder for what is compiled.
        seeds: by name, that which is tried first; becomes the one that caught it.
    """
    program = _compile(mutant, build, work / re.sub(r"\W+", "_", mutant.name))
    result = _simulate(mutant, program, seeds.get(mutant.name))
    # Killed by a signal: it read outside of its parameters, which are not simulated memory.
    if result.returncode > 1:
        return f"it ended with status {result.returncode}:\n{result.stdout}{result.stderr}"
    caught = result.returncode != 0
    if caught == mutant.harmless:
        return result.stdout if caught else f"not caught within {mutant.seeds} seeds"
    first = re.search(r"^seed (\d+) failed", result.stdout, re.M)
    scenario = re.search(r"^(?!seed)(\w[\w ]*: .*)", result.stdout, re.M)
    if first:
        seeds[mutant.name] = int(first[1])
    verdict = (
        f"seed {first[1]}, {scenario[1] if scenario else '?'}" if first else "passes, as it must"
    )
    if result.returncode < 0:
        verdict = f"ended by signal {-result.returncode}"
    print(f"  {mutant.name}: {verdict}", flush=True)
    return None


def main() -> int:
    """Runs all mutants, or those whose names hold `--only`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build", type=pathlib.Path, required=True, help="build folder of csrc")
    parser.add_argument("--only", default="", help="run those whose names hold this")
    parser.add_argument(
        "--part", default="0/1", help="I/N: every N-th, from the I-th; N such parts are all"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--update", action="store_true", help=f"write {SEEDS.name}")
    arguments = parser.parse_args()
    chosen = [mutant for mutant in MUTANTS if arguments.only in mutant.name]
    for mutant in chosen:
        mutate(mutant)  # all of them still fit
    part, parts = map(int, arguments.part.split("/"))
    chosen = chosen[part % parts :: parts]
    start = time.monotonic()
    build = arguments.build.resolve()
    seeds = json.loads(SEEDS.read_text())
    with (
        tempfile.TemporaryDirectory() as work,
        concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool,
    ):
        _precompile(build, pathlib.Path(work))
        verdicts = list(pool.map(lambda m: run(m, build, pathlib.Path(work), seeds), chosen))
    wrong = [(m, v) for m, v in zip(chosen, verdicts, strict=True) if v is not None]
    for mutant, verdict in wrong:
        print(f"WRONG {mutant.name}: {verdict}")
    if arguments.update:
        late = {m.name: seeds[m.name] for m in MUTANTS if seeds.get(m.name, 0) > LATE}
        SEEDS.write_text(json.dumps(late, indent=1) + "\n")
    harmful = sum(not mutant.harmless for mutant in chosen)
    print(
        f"{len(chosen) - len(wrong)} of {len(chosen)} verdicts are right ({harmful} mutants, "
        f"{len(chosen) - harmful} harmless edits) in {time.monotonic() - start:.0f} s"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
