# SPDX-License-Identifier: Apache-2.0
"""Measures dispatch and combine on CPU devices or GPUs, beside what JAX offers without jax_ep.

What is compared is checked first. An option says where the ranks are, as for the tests on GPUs:
`cpu`, on 8 CPU devices; `shared`, all on one GPU, as processes under MPS; `own`, each on a GPU of
its own; `one_process`, likewise, but in one process. docs/measurements/benchmarks.md says what is
measured, and how.

    python benchmarks/run.py --copies --placement own --ranks 2 --tokens 4096,1024 --json OUT

measures experts under Zipf routing instead, with and without copies of popular ones.
"""

import argparse
import json
import os
import pathlib
import sys
from typing import Any

from ep_bench import copies_on_own_gpus, on_host, on_own_gpus, on_shared_gpu, plot, report

PROGRAMS = {
    "cpu": on_host,
    "shared": on_shared_gpu,
    "own": on_own_gpus,
    "one_process": on_own_gpus,
}
# Option -> the placements that it is for; others are for all.
ONLY_FOR = {
    **dict.fromkeys(("cases", "dtypes", "pairs", "backend", "no_memory"), ("cpu",)),
    **dict.fromkeys(("ranks", "tokens", "copies", "ffn"), ("own", "one_process")),
    **dict.fromkeys(("full", "commit", "plot"), ("shared", "own", "one_process")),
    "virtual_ranks": ("shared",),
    "link_probe": ("own", "one_process"),
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--placement", choices=PROGRAMS, help="of the ranks; default: cpu")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--smoke", action="store_true", help="small and quick: does it run at all?")
    size.add_argument("--full", action="store_true", help="GPUs: the whole product of sizes")
    parser.add_argument("--cases", help="cpu: comma-separated TxHxExK; default: those of the docs")
    parser.add_argument("--dtypes", help="cpu: comma-separated; default: all")
    parser.add_argument(
        "--pairs", type=int, help=f"cpu: samples of each; default: {on_host.NUM_PAIRS}"
    )
    parser.add_argument(
        "--backend", choices=("ffi", "xla"), help="cpu: of jax_ep; default: its choice"
    )
    parser.add_argument("--no-memory", action="store_true", help="cpu: measure times only")
    parser.add_argument(
        "--virtual-ranks", type=pathlib.Path, metavar="PROGRAM", help="shared: to time kernels"
    )
    parser.add_argument(
        "--link-probe",
        type=pathlib.Path,
        metavar="PROGRAM",
        help="own GPUs: to measure bounds; tests/gpu/run.py --build-only builds it",
    )
    parser.add_argument(
        "--ranks", type=int, help="own GPUs; default: as many as there are, up to 8"
    )
    parser.add_argument("--tokens", help="own GPUs: of each rank, comma-separated; default: all")
    parser.add_argument(
        "--copies", action="store_true", help="own GPUs: measure copies of popular experts instead"
    )
    parser.add_argument("--ffn", type=int, help="copies: inner size of an expert; default: 2048")
    parser.add_argument("--commit", help="GPUs: of the sources, where git is not there to ask")
    parser.add_argument(
        "--report",
        type=pathlib.Path,
        nargs="+",
        metavar="JSON",
        help="measure nothing: report the numbers of these runs, of own GPUs together",
    )
    parser.add_argument("--json", type=pathlib.Path, metavar="OUT", help="write all numbers")
    parser.add_argument(
        "--markdown", type=pathlib.Path, metavar="OUT", help="write the tables, between markers"
    )
    parser.add_argument("--plot", type=pathlib.Path, metavar="OUT", help="GPUs: draw; .svg or .png")
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.plot and args.plot.suffix not in (".svg", ".png"):
        parser.error(f"--plot is {args.plot}; allowed: a name that ends in .svg or .png")
    for given in (args.virtual_ranks, *(args.report or ())):
        if given and not given.is_file():
            parser.error(f"{given} is not a file")
    if args.report:
        return args
    args.placement = args.placement or "cpu"
    for option, placements in ONLY_FOR.items():
        if getattr(args, option) and args.placement not in placements:
            name = option.replace("_", "-")
            parser.error(f"--{name} is not for placement {args.placement}")
    if args.ffn and not args.copies:
        parser.error("--ffn is for --copies alone")
    args.program = copies_on_own_gpus if args.copies else PROGRAMS[args.placement]
    try:
        args.program.check(args)
    except ValueError as e:
        parser.error(str(e))
    return args


def main() -> None:
    """Measures or reads, prints and writes."""
    args = parse_args()
    found: Any
    if args.report:
        found = report.merged([json.loads(path.read_text()) for path in args.report])
    else:
        found = args.program.measure(args)
    print(report.to_text(found))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + os.linesep)
    if args.markdown:
        report.write_markdown(args.markdown, found)
    if args.plot:
        plot.draw(found, args.plot)


if __name__ == "__main__":
    sys.exit(main())
