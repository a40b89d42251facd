# SPDX-License-Identifier: Apache-2.0
"""The search for the best launch of one operation and size. Knows no clock and no GPU.

Coordinate descent from the model's choice: at each number of SMs, the senders and the tail one
after the other. Candidates are measured in turns with the best so far, and dropped if a few samples
are much slower. The finalists are measured in turns with the model's choice, often.
"""

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from typing import Protocol

from jax_ep._src.tuning.table import KNEE, Choice, Entry, Key, Point, knee

FEW, MANY = 5, 60
DROP = 1.2  # of the best: slower after `FEW` samples is out
# What a choice of the tuner may take of the model's choice's time, where it saves SMs.
NO_WORSE = 1.01


class WrongBitsError(RuntimeError):
    """A launch changed a result: a bug of the kernels."""


class Measure(Protocol):
    """Runs one operation of one size."""

    def check(self, choice: Choice) -> bool:
        """Whether results are, bit by bit, those of the model's choice."""
        ...

    def seconds(self, choices: Sequence[Choice], num_samples: int) -> list[list[float]]:
        """Samples of each, taken in turns."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grid:
    """What may be chosen.

    Attributes:
        default_sms: SMs that the model's choice takes at most.
        num_sms: candidates, ascending.
        num_senders: candidates; empty where all warps send.
        tail: whether there can be one.
    """

    default_sms: int
    num_sms: tuple[int, ...]
    num_senders: tuple[int, ...] = ()
    tail: bool = False

    @property
    def default(self) -> Choice:
        """The model's choice."""
        return Choice(num_sms=self.default_sms)

    def moves(self, choice: Choice) -> list[list[Choice]]:
        """Other choices with as many SMs, by coordinate."""
        senders = [dataclasses.replace(choice, num_senders=n) for n in (None, *self.num_senders)]
        tails = [dataclasses.replace(choice, tail=t) for t in (True, False)] if self.tail else []
        return [[c for c in moves if c != choice] for moves in (tails, senders)]


class _Search:
    def __init__(self, measure: Measure, report: Callable[[str], None]) -> None:
        self._measure = measure
        self._report = report
        self._checked: set[Choice] = set()
        self.points: dict[Choice, float] = {}  # medians, in microseconds

    def try_out(self, best: Choice, others: Sequence[Choice]) -> Choice:
        """The fastest of them all."""
        choices = [best, *others]
        for choice in choices:
            self._check(choice)
        samples = self._measure.seconds(choices, FEW)
        for choice, found in zip(choices, samples, strict=True):
            us = statistics.median(found) * 1e6
            self.points[choice] = min(us, self.points.get(choice, us))
        return min(choices, key=lambda choice: self.points[choice])

    def _check(self, choice: Choice) -> None:
        if choice in self._checked:
            return
        self._report(str(choice))
        if not self._measure.check(choice):
            raise WrongBitsError(
                f"{choice} gives other bits than the model's choice; please report this as a bug"
            )
        self._checked.add(choice)

    def descend(self, start: Choice, grid: Grid, rounds: int) -> Choice:
        """The best that is found with as many SMs."""
        best = start
        for _ in range(rounds):
            before = best
            for moves in grid.moves(best):
                if moves:
                    best = self.try_out(best, moves)
            if best == before:
                break
        return best


def search(
    key: Key,
    grid: Grid,
    measure: Measure,
    *,
    num_samples: int = MANY,
    report: Callable[[str], None] = lambda _: None,
) -> Entry:
    """The best launch, as an entry of a table.

    Args:
        key: what it is for.
        grid: candidates.
        measure: runs them.
        num_samples: of the finalists.
        report: gets what is tried.

    Raises:
        WrongBitsError: a candidate changes a result.
    """
    run = _Search(measure, report)
    best = run.descend(grid.default, grid, rounds=2)
    # The numbers of SMs, with the best of the rest; those far from the best are not refined.
    by_sms = {n: dataclasses.replace(best, num_sms=n) for n in grid.num_sms}
    fastest = run.try_out(grid.default, list(by_sms.values()))
    limit = run.points[fastest] * DROP
    for n, choice in by_sms.items():
        if run.points[choice] <= limit:
            by_sms[n] = run.descend(choice, grid, rounds=1)
    finalists = _finalists(run.points, list(by_sms.values()), grid.default)
    samples = measure.seconds(finalists, num_samples)
    times = {
        choice: [sample * 1e6 for sample in found]
        for choice, found in zip(finalists, samples, strict=True)
    }
    medians = {choice: statistics.median(found) for choice, found in times.items()}
    default_us = medians[grid.default]
    points = [Point(us=us, choice=choice) for choice, us in medians.items()]
    use = knee(points, most_us=default_us * NO_WORSE)
    return Entry(
        key=key,
        use=Choice() if use == grid.default else use,
        us=round(medians[use], 3),
        default_us=round(default_us, 3),
        samples=num_samples,
        spread=round(_spread(times[use]), 4),
        by_sms=_by_sms(run.points | medians),
    )


def _finalists(points: dict[Choice, float], found: list[Choice], default: Choice) -> list[Choice]:
    """The model's choice, the fastest, and those with the fewest SMs that may be good enough."""
    ordered = sorted(set(found) - {default}, key=lambda choice: points[choice])
    near = [c for c in ordered if points[c] <= points[ordered[0]] * KNEE * 1.02] if ordered else []
    few = sorted(near, key=lambda choice: choice.num_sms or 0)[:2]
    no_worse = [c for c in ordered if points[c] <= points[default] * NO_WORSE][:1]
    return list(dict.fromkeys([default, *ordered[:1], *few, *no_worse]))


def _by_sms(points: dict[Choice, float]) -> tuple[Point, ...]:
    """The fastest of each number of SMs."""
    best: dict[int, Point] = {}
    for choice, us in points.items():
        n = choice.num_sms or 0
        if n not in best or us < best[n].us:
            best[n] = Point(us=round(us, 3), choice=choice)
    return tuple(best[n] for n in sorted(best))


def _spread(samples: list[float]) -> float:
    if len(samples) < 2:
        return 0.0
    first, median, third = statistics.quantiles(samples, n=4)
    return (third - first) / 2 / median
