# SPDX-License-Identifier: Apache-2.0
"""Draws a dispatch in halves with a product between them, from a profile of `make gpu`.

    JAX_EP_TRACE=FOLDER make gpu PIECE=halves
    python benchmarks/timeline.py FOLDER/.../perfetto_trace.json.gz docs/images/halves.svg

Needs matplotlib. JAX writes the profile into a folder of its own in FOLDER.
"""

import argparse
import pathlib

from ep_bench import timeline


def main() -> None:
    """Draws the profile's last exchange."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("profile", type=pathlib.Path)
    parser.add_argument("picture", type=pathlib.Path)
    parser.add_argument("--title", default="A dispatch in halves")
    args = parser.parse_args()
    timeline.draw(timeline.exchanges(args.profile)[-1], args.title, args.picture)


if __name__ == "__main__":
    main()
