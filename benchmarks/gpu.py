# SPDX-License-Identifier: Apache-2.0
"""Measures plan, dispatch, combine and their backward passes with all ranks on one GPU.

Ranks are processes under MPS, as in the tests of tests/gpu. So this exercises the GPU's memory, and
no NVLink. docs/benchmarks.md says what is measured, and how.
"""

import argparse
import json
import os
import pathlib
import sys
import time
from typing import Any

from ep_bench import gpu_environment, gpu_kernels, gpu_plot, gpu_programs, gpu_ranks, gpu_report
from ep_bench.gpu_cases import SMOKE_CASES, GpuCase, all_cases, some_cases
from ep_launch.mps import MpsDaemon
from ep_launch.placement import Placement
from ep_launch.ranks import Case
from marked_part import replaced

# Of the GPU, for the XLA of each rank: large enough for 2 GB of rows in each of several arrays.
MEMORY_FRACTION = ".1"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--full", action="store_true", help="the whole product, in about half an hour"
    )
    size.add_argument("--smoke", action="store_true", help="two cases: does it run at all?")
    parser.add_argument(
        "--virtual-ranks", type=pathlib.Path, metavar="PROGRAM", help="to time kernels alone"
    )
    parser.add_argument("--commit", help="of the sources, where git is not there to ask")
    parser.add_argument(
        "--report", type=pathlib.Path, metavar="JSON", help="measure nothing: report these numbers"
    )
    parser.add_argument("--json", type=pathlib.Path, metavar="OUT", help="write all numbers")
    parser.add_argument(
        "--markdown", type=pathlib.Path, metavar="OUT", help="write the tables, between markers"
    )
    parser.add_argument("--plot", type=pathlib.Path, metavar="OUT", help="draw; .svg or .png")
    args = parser.parse_args(argv)
    if args.plot and args.plot.suffix not in (".svg", ".png"):
        parser.error(f"--plot is {args.plot}; allowed: a name that ends in .svg or .png")
    for given in (args.virtual_ranks, args.report):
        if given and not given.is_file():
            parser.error(f"{given} is not a file")
    return args


def run_on_ranks(cases: list[GpuCase], mps: MpsDaemon) -> dict[str, Any]:
    """All that is measured with one number of ranks, in one set of processes.

    Raises:
        RuntimeError: a rank failed; the message has the first one's traceback first.
    """
    # Worked out here once, and sent along.
    for case in cases:
        _ = case.rows
    plain = [case for case in cases if case.has_baseline]
    work = [
        Case("copies", gpu_programs.measure_copies, {"case": cases[0]}),
        *(Case(case.name, gpu_programs.measure, {"case": case}) for case in cases),
        *(Case(f"by XLA: {c.name}", gpu_programs.measure_baselines, {"case": c}) for c in plain),
    ]
    environment = {**mps.environment, "XLA_PYTHON_CLIENT_MEM_FRACTION": MEMORY_FRACTION}
    copies, *measured = gpu_ranks.values_by_rank(
        work, cases[0].num_ranks, Placement.SHARED, environment
    )
    return {
        "copy": gpu_report.copy_bandwidths(copies),
        "results": [gpu_report.result(c, v) for c, v in zip(cases, measured, strict=False)],
        "baselines": [
            gpu_report.baseline(c, v) for c, v in zip(plain, measured[len(cases) :], strict=True)
        ],
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Runs everything; the numbers, for the JSON."""
    cases = SMOKE_CASES if args.smoke else all_cases() if args.full else some_cases()
    found: dict[str, Any] = {
        "environment": gpu_environment.describe(args.commit),
        "copy": {},
        "results": [],
        "baselines": [],
    }
    # Before there are other users of the GPU.
    kernels = gpu_kernels.times(args.virtual_ranks, cases) if args.virtual_ranks else {}
    mps = MpsDaemon()
    try:
        mps.start()
        for num_ranks in dict.fromkeys(case.num_ranks for case in cases):
            start = time.monotonic()
            own = [case for case in cases if case.num_ranks == num_ranks]
            part = run_on_ranks(own, mps)
            print(f"{num_ranks} ranks: {time.monotonic() - start:.0f} s", file=sys.stderr)
            found["copy"][str(num_ranks)] = part["copy"]
            found["results"] += part["results"]
            found["baselines"] += part["baselines"]
            for result in part["results"]:
                result["kernels"] = kernels.get(GpuCase(**result["case"]))
            if args.json:  # at once: later ranks may fail, or the loan of the GPU may end
                args.json.write_text(json.dumps(found, indent=1) + os.linesep)
    finally:
        mps.remove()
    return found


def main() -> None:
    """Measures or reads, prints and writes."""
    args = parse_args()
    found = json.loads(args.report.read_text()) if args.report else measure(args)
    print(gpu_report.to_text(found))
    if args.markdown:
        page = replaced(
            args.markdown.read_text(), "benchmarks/gpu.py", gpu_report.to_markdown(found)
        )
        args.markdown.write_text(page)
    if args.plot:
        gpu_plot.draw(found, args.plot)


if __name__ == "__main__":
    sys.exit(main())
