# SPDX-License-Identifier: Apache-2.0
"""What `python -m jax_ep` does."""

import argparse
import json
import shutil
import sys

from jax_ep._src import info, version
from jax_ep._src.balancing import report
from jax_ep._src.errors import EpUnavailable
from jax_ep._src.tuner import command


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = _parser()
    parsed = parser.parse_args(argv)
    if parsed.command is None:
        parser.print_help()
        return 0
    if parsed.command == "tune":
        return _tune(parsed)
    arguments = vars(parsed)

    name = arguments.pop("command")
    if name == "info":
        _info(**arguments)
        return 0
    try:
        if name == "load":
            _load(**arguments)
        else:
            print(report.report(arguments.pop("file"), **arguments))
    except (OSError, ValueError) as error:
        print(f"python -m jax_ep {name}: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jax_ep",
        description="Says what jax_ep has here, plans placements of experts, tunes kernels.",
    )
    shown = f"jax_ep {version.full_version()}"
    parser.add_argument("--version", action="version", version=shown)
    commands = parser.add_subparsers(dest="command")
    add = commands.add_parser("info", help="devices, backends, versions, and what is missing")
    add.add_argument("--json", action="store_true", help="for programs, and for reports of bugs")
    _add_plan(commands)
    _add_load(commands)
    tune = commands.add_parser("tune", help="measures how kernels are best launched on these GPUs")
    command.add_arguments(tune)
    return parser


def _info(**options: bool) -> None:
    if options["json"]:
        print(json.dumps(info.facts(), indent=2))
    else:
        print(info.report(shutil.get_terminal_size().columns))


def _tune(parsed: argparse.Namespace) -> int:
    command.prepare_environment()
    try:
        return command.run(parsed)
    except (OSError, ValueError, EpUnavailable) as error:
        print(f"python -m jax_ep tune: {error}", file=sys.stderr)
        return 1


def _add_plan(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    plan = commands.add_parser("plan", help="a placement of experts, with copies, for their loads")
    plan.add_argument(
        "file",
        metavar="FILE",
        help=".npz with `load` (or one array only), or .npy: [layers, E] or [E], what experts got",
    )
    plan.add_argument("--num-ranks", type=int, required=True, metavar="R")
    plan.add_argument("--slots-per-rank", type=int, required=True, metavar="S")
    plan.add_argument("--num-nodes", type=int, default=1, metavar="N", help="with --num-groups")
    plan.add_argument(
        "--num-groups", type=int, metavar="G", help="of experts that stay on one node"
    )
    plan.add_argument("--max-copies", type=int, metavar="J", help="copies that an expert may have")
    plan.add_argument("--out", metavar="FILE", help="saves the placement, as ExpertPlacement.save")


def _add_load(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    load = commands.add_parser("load", help="what experts and ranks got, as a table and a picture")
    load.add_argument(
        "file",
        metavar="FILE",
        help=".npz of LoadReport.save, or a file of loads as `plan` takes it, with --num-ranks",
    )
    load.add_argument("--num-ranks", type=int, metavar="R", help="that have the experts in blocks")
    load.add_argument("--out", metavar="FILE", help="draws a layer's experts over time, and ranks")
    load.add_argument("--layer", type=int, default=0, metavar="N", help="which one is drawn")


def _load(file: str, num_ranks: int | None, out: str | None, layer: int) -> None:
    found = report.read_loads(file, num_ranks)
    print(found.to_text())
    if out is not None:
        from jax_ep import plot  # noqa: PLC0415  needs matplotlib, an extra

        plot.heat_map(found, layer).savefig(out)
        print(f"saved to {out}")


if __name__ == "__main__":
    sys.exit(main())
