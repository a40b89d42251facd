# SPDX-License-Identifier: Apache-2.0
"""Fits the model's calibration to the measured lines that are for that."""

import dataclasses
import sys
from collections.abc import Sequence

from scipy import optimize

from ep_bench.predictions import Calibration, Line, Measurements, modeled_lines

# What neither the sources, nor a profile, nor the probe says.
FITTED = (
    "load_us",
    "instructions_per_cycle",
    "warp_instructions_per_cycle",
    "quantize_instructions",
    "add_again_instructions",
)
# Simulations of all lines: some ten minutes.
MAX_TRIES = 60


def _squares(known: Measurements, lines: Sequence[Line]) -> float:
    modeled = modeled_lines(dataclasses.replace(known, lines=lines))
    return sum((us / line.us - 1) ** 2 for us, line in zip(modeled, lines, strict=True))


def fit(known: Measurements) -> Calibration:
    """The calibration with the least squares of relative differences, from the given one on."""
    start = known.calibration
    lines = [line for line in known.lines if line.fitted]

    def scaled(factors: Sequence[float]) -> Calibration:
        values = {n: getattr(start, n) * float(f) for n, f in zip(FITTED, factors, strict=True)}
        return dataclasses.replace(start, **values)

    def loss(factors: Sequence[float]) -> float:
        if min(factors) <= 0:
            return float("inf")
        tried = dataclasses.replace(known, calibration=scaled(factors))
        found = _squares(tried, lines)
        print(f"{found:.5f} {[round(float(f), 3) for f in factors]}", file=sys.stderr, flush=True)
        return found

    simplex = [[1.0] * len(FITTED)]
    simplex += [[1.15 if i == j else 1.0 for i in range(len(FITTED))] for j in range(len(FITTED))]
    options = {"maxfev": MAX_TRIES, "initial_simplex": simplex}
    best = optimize.minimize(loss, simplex[0], method="Nelder-Mead", options=options)
    return scaled(best.x)
