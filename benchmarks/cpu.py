# SPDX-License-Identifier: Apache-2.0
"""Measures dispatch + combine on 8 CPU devices against what users write with lax collectives.

Every variant is checked against the oracle first. Times are taken in turns, in random order;
memory in a process for each variant. docs/measurements/benchmarks.md says what is compared, and
how.
"""

import argparse
import json
import os
import pathlib
import sys
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from ep_bench import environment, report
from ep_bench.cases import DEFAULT_CASES, DTYPES, NUM_RANKS, SMOKE_CASES, Case
from ep_bench.measure import Settings, run

NUM_PAIRS = 30
NUM_SMOKE_PAIRS = 3


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", help="comma-separated TxHxExK; default: the three of the docs")
    parser.add_argument("--dtypes", default=",".join(DTYPES), help="comma-separated; default: all")
    parser.add_argument("--pairs", type=int, help=f"samples of each; default: {NUM_PAIRS}")
    parser.add_argument("--backend", choices=("ffi", "xla"), help="of jax_ep; default: its choice")
    parser.add_argument("--no-memory", action="store_true", help="measure times only")
    parser.add_argument("--smoke", action="store_true", help="small and quick: does it run at all?")
    parser.add_argument("--json", type=pathlib.Path, metavar="OUT", help="write all numbers")
    parser.add_argument(
        "--markdown", type=pathlib.Path, metavar="OUT", help="write the tables, between markers"
    )
    args = parser.parse_args(argv)
    try:
        default = SMOKE_CASES if args.smoke else DEFAULT_CASES
        args.cases = [Case.parse(c) for c in args.cases.split(",")] if args.cases else default
    except ValueError as e:
        parser.error(str(e))
    args.dtypes = args.dtypes.split(",")
    if unknown := set(args.dtypes) - set(DTYPES):
        parser.error(f"unknown dtypes {sorted(unknown)}; allowed: {', '.join(DTYPES)}")
    if args.pairs is None:
        args.pairs = NUM_SMOKE_PAIRS if args.smoke else NUM_PAIRS
    if args.pairs < 1:
        parser.error(f"--pairs is {args.pairs}; it must be at least 1")
    return args


def measure(settings: Settings, console: Console) -> list[dict[str, Any]]:
    """`run` with a progress bar."""
    columns = (TextColumn("{task.description:48}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("compiling", total=settings.num_steps)
        return run(settings, lambda what: progress.update(task, advance=1, description=what))


def main() -> None:
    """Measures, prints and writes."""
    args = parse_args()
    environment.use_host_devices()
    where = environment.describe()
    console = Console(stderr=True)
    if where["load_before"] > 0.5:
        console.print(
            f"[yellow]The load average is {where['load_before']}: what else runs here will show "
            "in the spread of the times."
        )
    settings = Settings(
        cases=args.cases,
        dtypes=args.dtypes,
        num_pairs=args.pairs,
        backend=args.backend,
        with_memory=not args.no_memory,
    )
    found = {
        "environment": where,
        "num_ranks": NUM_RANKS,
        "num_pairs": args.pairs,
        "results": measure(settings, console),
    }
    print(f"{where['machine']}\ncommit {where['commit']}, {where['versions']}\n")
    print(report.time_table(found["results"], "simple"), end="\n\n")
    if memory := report.memory_table(found["results"], "simple"):
        print(f"Peak memory, MiB: resident / planned by XLA\n{memory}\n")
    print(report.summary(found["results"]))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + os.linesep)
    if args.markdown:
        report.write_markdown(args.markdown, report.to_markdown(found))


if __name__ == "__main__":
    sys.exit(main())
