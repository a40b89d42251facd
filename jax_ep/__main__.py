# SPDX-License-Identifier: Apache-2.0
"""Command line: `python -m jax_ep info`."""

import argparse
import sys

from jax_ep._src import info


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m jax_ep", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="devices, backends, versions, and what is missing for what")
    parser.parse_args(argv)

    print(info.report())
    return 0


if __name__ == "__main__":
    sys.exit(main())
