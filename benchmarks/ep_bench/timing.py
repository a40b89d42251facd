# SPDX-License-Identifier: Apache-2.0
"""Times of several functions, taken in turn, so that what else the machine does hits them alike."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

# A sample is the mean of as many calls as fill this time, but at most MAX_CALLS.
SAMPLE_SECONDS = 0.02
MAX_CALLS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spread:
    """Quantiles of a sample."""

    median: float
    p10: float
    p90: float

    @classmethod
    def of(cls, values: np.ndarray) -> "Spread":
        """The quantiles."""
        p10, median, p90 = np.quantile(values, (0.1, 0.5, 0.9))
        return cls(median=float(median), p10=float(p10), p90=float(p90))


def time_call(function: Callable[..., Any], args: tuple[Any, ...], num_calls: int = 1) -> float:
    """Seconds of a call, with the results there; the mean of `num_calls`, one after another."""
    start = time.perf_counter()
    for _ in range(num_calls):
        jax.block_until_ready(function(*args))
    return (time.perf_counter() - start) / num_calls


def time_in_turns(
    functions: Mapping[str, Callable[..., Any]],
    args: tuple[Any, ...],
    *,
    num_rounds: int,
    every: Mapping[str, int] | None = None,
    seed: int = 0,
    on_round: Callable[[], None] = lambda: None,
) -> dict[str, np.ndarray]:
    """Samples of every function, taken in rounds: each round has one of each, in random order.

    Args:
        functions: warm: each has been called with `args`.
        args: of all of them.
        num_rounds: samples of each.
        every: name -> n: that function takes part in each nth round only.
        seed: of the orders.
        on_round: called after each round.

    Returns:
        Name -> `[num_rounds]` seconds; NaN in rounds in which the function took no part. Values of
        the same round make pairs.
    """
    rng = np.random.default_rng(seed)
    num_calls = {}
    for name, function in functions.items():
        once = min(time_call(function, args) for _ in range(2))
        num_calls[name] = int(np.clip(SAMPLE_SECONDS / once, 1, MAX_CALLS))
    samples = {name: np.full(num_rounds, np.nan) for name in functions}
    for i in range(num_rounds):
        names = [name for name in functions if i % (every or {}).get(name, 1) == 0]
        for name in rng.permutation(names):
            samples[name][i] = time_call(functions[name], args, num_calls[name])
        on_round()
    return samples


def paired_ratio(a: np.ndarray, b: np.ndarray) -> Spread:
    """`a / b` of the rounds that have both."""
    ratio = a / b
    return Spread.of(ratio[~np.isnan(ratio)])
