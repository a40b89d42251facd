# SPDX-License-Identifier: Apache-2.0
"""Measures plan, dispatch, combine and their backward passes with all ranks on one GPU.

Ranks are processes under MPS, as in the tests of tests/gpu. So this exercises the GPU's memory, and
no NVLink.
"""

import argparse
import json
import os
import sys
import time
from typing import Any

from ep_bench import environment, kernel_times, on_ranks, operation_programs, shared_gpu_tables
from ep_bench.cases import SHARED_SMOKE_CASES, GpuCase, all_shared_cases, some_shared_cases
from ep_launch.mps import MpsDaemon
from ep_launch.placement import Placement
from ep_launch.ranks import Case

# Of the GPU, for the XLA of each rank: large enough for 2 GB of rows in each of several arrays.
MEMORY_FRACTION = ".1"


def _measure_on_ranks(cases: list[GpuCase], mps: MpsDaemon) -> dict[str, Any]:
    """All that is measured with one number of ranks, in one set of processes.

    Raises:
        RuntimeError: a rank failed; the message has the first one's traceback first.
    """
    # Worked out here once, and sent along.
    for case in cases:
        _ = case.rows
    plain = [case for case in cases if case.has_baseline]
    work = [
        Case("copies", operation_programs.measure_copies, {"case": cases[0]}),
        *(Case(case.name, operation_programs.measure, {"case": case}) for case in cases),
        *(
            Case(f"by XLA: {c.name}", operation_programs.measure_baselines, {"case": c})
            for c in plain
        ),
    ]
    variables = {**mps.environment, "XLA_PYTHON_CLIENT_MEM_FRACTION": MEMORY_FRACTION}
    copies, *measured = on_ranks.run_on_ranks(work, cases[0].num_ranks, Placement.SHARED, variables)
    return {
        "copy": shared_gpu_tables.copy_bandwidths(copies),
        "results": [shared_gpu_tables.result(c, v) for c, v in zip(cases, measured, strict=False)],
        "baselines": [
            shared_gpu_tables.baseline(c, v)
            for c, v in zip(plain, measured[len(cases) :], strict=True)
        ],
    }


def check(args: argparse.Namespace) -> None:
    """Of what the command line says, nothing is wrong here."""
    del args


def _cases(args: argparse.Namespace) -> list[GpuCase]:
    if args.smoke:
        return SHARED_SMOKE_CASES
    return all_shared_cases() if args.full else some_shared_cases()


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Runs everything; the numbers, for the JSON."""
    cases = _cases(args)
    found: dict[str, Any] = {
        "environment": environment.describe_gpu(args.commit),
        "copy": {},
        "results": [],
        "baselines": [],
    }
    # Before there are other users of the GPU.
    kernels = kernel_times.times(args.virtual_ranks, cases) if args.virtual_ranks else {}
    mps = MpsDaemon()
    try:
        mps.start()
        for num_ranks in dict.fromkeys(case.num_ranks for case in cases):
            start = time.monotonic()
            own = [case for case in cases if case.num_ranks == num_ranks]
            part = _measure_on_ranks(own, mps)
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
