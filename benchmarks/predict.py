# SPDX-License-Identifier: Apache-2.0
"""Predicts times of the kernels by the event model: on two GPUs beside the measured, and on more.

Needs no GPU, unless it is to measure the lines again. docs/measurements/performance.md says what
the model is, and how far to trust it.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
from collections.abc import Sequence

from ep_bench import fit, predictions
from marked_part import replaced

MARK = "benchmarks/predict.py"


def text(known: predictions.Measurements, modeled: Sequence[float], tablefmt: str) -> str:
    """Both tables.

    Args:
        known: rates, calibration and lines.
        modeled: of `predictions.modeled_lines`.
        tablefmt: as tabulate calls it.
    """
    return "\n\n".join(
        [
            known.source,
            predictions.check_table(known, modeled, tablefmt),
            f"**Predicted, not measured**, T {predictions.PREDICTED_TOKENS}:",
            predictions.prediction_table(known, tablefmt),
        ]
    )


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--measured",
        type=pathlib.Path,
        metavar="JSON",
        default=predictions.MEASURED,
        help="lines, rates and calibration; default: benchmarks/calibration/two_h200.json",
    )
    parser.add_argument(
        "--markdown", type=pathlib.Path, metavar="OUT", help="write into this page, between markers"
    )
    parser.add_argument(
        "--fit", action="store_true", help="print a new calibration, and nothing else: ten minutes"
    )
    parser.add_argument(
        "--measure",
        type=pathlib.Path,
        metavar="FOLDER",
        help="measure the lines and the rates first; where tests/gpu/run.py --build-only has built",
    )
    parser.add_argument("--ranks", type=int, default=2, help="with --measure: GPUs to measure on")
    parser.add_argument(
        "--json", type=pathlib.Path, metavar="OUT", help="with --measure: write what was measured"
    )
    return parser.parse_args(argv)


def main() -> None:
    """Prints the tables, or writes them into a page."""
    args = parse_args()
    known = predictions.read(args.measured)
    if args.fit:
        print(json.dumps(dataclasses.asdict(fit.fit(known)), indent=1))
        return
    if args.measure:
        known = predictions.measure_again(known, args.measure, args.ranks)
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(predictions.to_json(known), indent=1) + "\n")
    modeled = predictions.modeled_lines(known)
    if args.markdown is None:
        print(text(known, modeled, "simple"))
        return
    page = args.markdown.read_text()
    args.markdown.write_text(replaced(page, MARK, text(known, modeled, "github")))


if __name__ == "__main__":
    sys.exit(main())
