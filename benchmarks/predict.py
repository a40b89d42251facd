# SPDX-License-Identifier: Apache-2.0
"""Says what the event model makes of the kernels: on two GPUs beside what was measured, and on more.

Measures nothing, and needs no GPU. docs/measurements/performance.md says how far to trust it.
"""

import argparse
import pathlib
import sys

from ep_bench import predictions
from marked_part import replaced

MARK = "benchmarks/predict.py"


def text(known: predictions.Measurements, tablefmt: str) -> str:
    """Both tables."""
    return "\n\n".join(
        [
            f"Measured: {known.source}",
            predictions.check_table(known, tablefmt),
            "**Predicted, not measured**, T 4096:",
            predictions.prediction_table(known, tablefmt),
        ]
    )


def main() -> None:
    """Prints the tables, or writes them into a page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--measured",
        type=pathlib.Path,
        metavar="JSON",
        default=predictions.MEASURED,
        help="lines, rates and calibration; default: benchmarks/results/two_h200.json",
    )
    parser.add_argument(
        "--markdown", type=pathlib.Path, metavar="OUT", help="write into this page, between markers"
    )
    args = parser.parse_args()
    known = predictions.read(args.measured)
    if args.markdown is None:
        print(text(known, "simple"))
        return
    page = args.markdown.read_text()
    args.markdown.write_text(replaced(page, MARK, text(known, "github")))


if __name__ == "__main__":
    sys.exit(main())
