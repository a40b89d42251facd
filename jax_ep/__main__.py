# SPDX-License-Identifier: Apache-2.0
"""Command line: `python -m jax_ep info`, `python -m jax_ep plan`."""

import argparse
import sys

from jax_ep._src import info
from jax_ep._src.balancing import report


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m jax_ep", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="devices, backends, versions, and what is missing for what")
    _add_plan(commands)
    arguments = vars(parser.parse_args(argv))

    if arguments.pop("command") == "info":
        print(info.report())
        return 0
    try:
        print(report.report(arguments.pop("file"), **arguments))
    except (OSError, ValueError) as error:
        print(f"python -m jax_ep plan: {error}", file=sys.stderr)
        return 1
    return 0


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


if __name__ == "__main__":
    sys.exit(main())
