# SPDX-License-Identifier: Apache-2.0
"""Measures dispatch and combine with a GPU for each rank, beside what XLA's collectives take.

Every way is checked before it is timed. docs/benchmarks.md says what is measured, and how.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from ep_bench import (
    gpu_environment,
    gpu_programs,
    gpu_ranks,
    nvlink_cases,
    nvlink_plot,
    nvlink_programs,
    nvlink_report,
)
from ep_bench.gpu_cases import GpuCase
from ep_launch.placement import Placement, count_gpus
from ep_launch.ranks import Case
from marked_part import replaced

NUM_SAMPLES = 50
LINK_BYTES = 2**28
# On CPU devices: does it run at all?
SMOKE_RANKS, SMOKE_TOKENS, SMOKE_SAMPLES, SMOKE_CALLS, SMOKE_LINK_BYTES = 2, 4, 2, 2, 2**16


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", type=int, help="default: as many as there are GPUs, up to 8")
    parser.add_argument("--tokens", help="of each rank, comma-separated; default: 128 to 8192")
    parser.add_argument(
        "--placement", choices=("own", "one_process"), help="of the ranks; default: own"
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--full", action="store_true", help="all SMs and routings at all sizes")
    size.add_argument(
        "--smoke", action="store_true", help="tiny, on CPU devices of one process: does it run?"
    )
    parser.add_argument("--commit", help="of the sources, where git is not there to ask")
    parser.add_argument(
        "--report",
        type=pathlib.Path,
        nargs="+",
        metavar="JSON",
        help="measure nothing: report the numbers of these runs together",
    )
    parser.add_argument("--json", type=pathlib.Path, metavar="OUT", help="write all numbers")
    parser.add_argument(
        "--markdown", type=pathlib.Path, metavar="OUT", help="write the tables, between markers"
    )
    parser.add_argument("--plot", type=pathlib.Path, metavar="OUT", help="draw; .svg or .png")
    args = parser.parse_args(argv)
    if args.smoke and (args.placement or args.ranks or args.tokens):
        parser.error("--smoke has its own ranks, tokens and placement")
    if args.plot and args.plot.suffix not in (".svg", ".png"):
        parser.error(f"--plot is {args.plot}; allowed: a name that ends in .svg or .png")
    for given in args.report or ():
        if not given.is_file():
            parser.error(f"{given} is not a file")
    if not args.report:
        _check_sizes(parser, args)
    return args


def _check_sizes(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Fills in ranks, tokens and placement."""
    args.placement = Placement(args.placement or ("one_process" if args.smoke else "own"))
    tokens = args.tokens or ",".join(map(str, nvlink_cases.TOKENS))
    try:
        args.tokens = [SMOKE_TOKENS] if args.smoke else [int(t) for t in tokens.split(",")]
    except ValueError:
        parser.error(f"--tokens is {tokens}; allowed: numbers, comma-separated")
    if args.ranks is None:
        args.ranks = SMOKE_RANKS if args.smoke else min(8, count_gpus())
    if args.ranks < 2 or 256 % args.ranks:
        parser.error(f"{args.ranks} ranks; allowed: 2 or more, and a divisor of 256")


def knows_ragged_flags() -> bool:
    """Whether this jaxlib has the flags of `RAGGED_FLAGS`; XLA ends a process that has others."""
    done = subprocess.run(
        [sys.executable, "-c", "import jax; jax.devices()"],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": nvlink_cases.RAGGED_FLAGS},
        capture_output=True,
        check=False,
    )
    return done.returncode == 0


def run_size(
    args: argparse.Namespace,
    cases: list[GpuCase],
    environment: Mapping[str, str],
    found: dict[str, Any],
    save: Callable[[], None],
) -> None:
    """All that is measured with one number of tokens, but for the ragged collective.

    Args:
        args: of the command line.
        cases: of this number of tokens.
        environment: variables of the processes.
        found: gets what each item of the work has measured, as soon as all ranks have it.
        save: called after each.

    Raises:
        RuntimeError: a rank failed; the message has the first one's traceback first.
    """
    samples = SMOKE_SAMPLES if args.smoke else NUM_SAMPLES
    compared = nvlink_cases.routings_of(cases)
    for case in compared:
        nvlink_cases.confirm(case)
    num_bytes = SMOKE_LINK_BYTES if args.smoke else LINK_BYTES
    link = {"num_bytes": num_bytes, "num_samples": samples}
    ours = {"only": nvlink_cases.MEASURED, "num_samples": samples}
    work = [
        Case("links", nvlink_programs.measure_links, link),
        *(Case(case.name, gpu_programs.measure, {"case": case, **ours}) for case in cases),
        *(_comparison(args, case, nvlink_cases.compared_in(case)) for case in compared),
    ]
    where = args.placement.value

    def add(index: int, values: list[Any]) -> None:
        if index == 0:
            key = nvlink_report.where_of({"case": {"num_ranks": args.ranks}, "placement": where})
            found["links"][key] = nvlink_report.links(values)
        elif index <= len(cases):
            found["results"].append(nvlink_report.result(cases[index - 1], values, where))
        else:
            case = compared[index - 1 - len(cases)]
            found["comparisons"].append(nvlink_report.comparison(case, values, where))
        print(f"measured: {work[index].name}", file=sys.stderr, flush=True)
        save()

    gpu_ranks.values_by_rank(work, args.ranks, args.placement, environment, add)


def _comparison(args: argparse.Namespace, case: GpuCase, keys: list[str]) -> Case:
    how_often = {
        "num_samples": SMOKE_SAMPLES if args.smoke else NUM_SAMPLES,
        "num_calls": SMOKE_CALLS if args.smoke else None,
    }
    kwargs = {"case": case, "keys": keys, **how_often}
    return Case(f"{', '.join(keys)}: {case.name}", nvlink_programs.compare, kwargs)


def add_ragged(
    args: argparse.Namespace, cases: list[GpuCase], found: dict[str, Any], environment: Any
) -> None:
    """Adds `lax.ragged_all_to_all` to the comparisons, in processes of its own: it may fail.

    Neither its failure nor that of the flags is ours, but the report names it.
    """
    compared = nvlink_cases.routings_of(cases)
    for key, flags in (
        ("ragged_all_to_all", ""),
        ("ragged_with_flags", nvlink_cases.RAGGED_FLAGS),
    ):
        what = f"{nvlink_cases.BASELINES[key]}, T {compared[0].num_tokens}"
        if flags and not knows_ragged_flags():
            found["failures"].append(f"{what}: this jaxlib does not know the flags {flags}")
            continue
        work = [_comparison(args, case, ["ragged_all_to_all"]) for case in compared]
        xla_flags = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
        try:
            values = gpu_ranks.values_by_rank(
                work, args.ranks, args.placement, {**environment, "XLA_FLAGS": xla_flags}
            )
        except RuntimeError as error:
            print(error, file=sys.stderr)
            found["failures"].append(f"{what}: {_in_short(error)}")
            continue
        for case, of_case, entry in zip(compared, values, found["comparisons"], strict=True):
            more = nvlink_report.comparison(case, of_case, args.placement.value)
            for field in ("seconds", "error_of_allowed"):
                entry[field][key] = more[field]["ragged_all_to_all"]


def _in_short(error: RuntimeError) -> str:
    """Which rank failed first in what, and the line of its traceback that names the exception."""
    lines = str(error).strip().splitlines()
    return f"{lines[0]} {next((line for line in lines if 'Error: ' in line), '')}".strip()


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Runs everything; the numbers, for the JSON, which is written whenever there are more."""
    environment = {"JAX_PLATFORMS": "cpu"} if args.smoke else {}
    parts: list[dict[str, Any]] = []
    for num_tokens in args.tokens:
        start = time.monotonic()
        cases = nvlink_cases.cases(args.ranks, num_tokens, full=args.full)
        found: dict[str, Any] = {
            "environment": gpu_environment.describe(args.commit),
            "links": {},
            **{name: [] for name in ("results", "comparisons", "failures")},
        }
        parts.append(found)
        try:
            run_size(args, cases, environment, found, lambda: _save(args.json, parts))
        except RuntimeError as error:
            found["failures"].append(f"T {num_tokens}: {_in_short(error)}")
            _save(args.json, parts)
            raise
        if args.smoke:
            found["failures"].append("ragged_all_to_all: XLA does not compile it for CPUs")
        else:
            add_ragged(args, cases, found, environment)
        print(f"T {num_tokens}: {time.monotonic() - start:.0f} s", file=sys.stderr)
        _save(args.json, parts)
    return nvlink_report.merged(parts)


def _save(path: pathlib.Path | None, parts: list[dict[str, Any]]) -> None:
    """Writes the numbers, at once: what follows may fail, or the loan of the GPUs may end."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(nvlink_report.merged(parts), indent=1) + os.linesep)
    partial.rename(path)


def main() -> None:
    """Measures or reads, prints and writes."""
    args = parse_args()
    if args.report:
        found = nvlink_report.merged([json.loads(path.read_text()) for path in args.report])
    else:
        found = measure(args)
    print(nvlink_report.to_text(found))
    if args.json and args.report:
        args.json.write_text(json.dumps(found, indent=1) + os.linesep)
    if args.markdown:
        text = nvlink_report.to_markdown(found)
        page = replaced(args.markdown.read_text(), "benchmarks/nvlink.py", text)
        args.markdown.write_text(page)
    if args.plot:
        nvlink_plot.draw(found, args.plot)


if __name__ == "__main__":
    sys.exit(main())
