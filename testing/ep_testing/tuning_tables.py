# SPDX-License-Identifier: Apache-2.0
"""Tables of tuning, and a device that they could be of: no clock is asked.

A candidate's time is a formula, with noise from a seed.
"""

import dataclasses
import random
from typing import Any

import jax_ep
from jax_ep._src.tuner.search import Grid
from jax_ep._src.tuning.lookup import key_of
from jax_ep._src.tuning.table import Choice, Entry, Key, Point, Table

CONFIG = jax_ep.EpConfig(num_experts=16, num_topk=2, hidden=64, max_tokens_per_rank=512)
DEVICE = "Some GPU"
GRID = Grid(
    default_sms=24, num_sms=(8, 16, 24, 32, 48, 64), num_senders=(2, 4, 6, 8, 10), tail=True
)


def key(
    op: str = "combine", path: str = "high_throughput", tokens: int = 64, **changed: Any
) -> Key:
    """What an entry is for, in a group of two ranks with `CONFIG`; `changed` are further fields."""
    return dataclasses.replace(key_of(CONFIG, 2, op, path, tokens), **changed)


def entry(us: float = 10.0, num_sms: int = 16, **of_key: Any) -> Entry:
    """One that says how many SMs are best; `of_key` are the arguments of `key`."""
    points = [Point(us=us, choice=Choice(num_sms=num_sms, num_senders=None))]
    return Entry(
        key=key(**of_key), use=points[0].choice, us=us, default_us=20.0, samples=60, spread=0.01,
        by_sms=tuple(points),
    )  # fmt: skip


def table(*entries: Entry, device: str = DEVICE) -> Table:
    """Of a device."""
    return Table(device=device, capability="9.0", jax_ep="1.0", entries=entries)


class FakeMeasure:
    """Microseconds by a formula: the best has some senders and a tail, and as many SMs as pay.

    Attributes:
        calls: how many choices were measured at once, and how often each.
    """

    def __init__(
        self,
        senders: int = 4,
        tail: bool | None = True,
        wrong: Choice | None = None,
        noise: float = 0.01,
    ) -> None:
        """`wrong` gives other bits."""
        self.calls: list[tuple[int, int]] = []
        self._best = (senders, tail)
        self._wrong = wrong
        self._noise = noise
        self._random = random.Random(0)

    def check(self, choice: Choice) -> bool:
        """Whether a choice gives the right bits."""
        return choice != self._wrong

    def exact(self, choice: Choice) -> float:
        """Microseconds, without noise; 48 SMs are within 5 % of 64, and 32 are not."""
        senders = choice.num_senders or 8
        by_sms = {8: 800, 16: 400, 24: 270, 32: 210, 48: 165, 64: 160}[choice.num_sms or 0]
        off = 1 + 0.03 * abs(senders - self._best[0]) + 0.1 * (choice.tail not in (None, True))
        return by_sms * off * (1.2 if choice.tail is None and self._best[1] else 1)

    def seconds(self, choices: list[Choice], num_samples: int) -> list[list[float]]:
        """So many samples of each."""
        self.calls.append((len(choices), num_samples))
        return [
            [
                self.exact(choice) * 1e-6 * (1 + self._noise * self._random.random())
                for _ in range(num_samples)
            ]
            for choice in choices
        ]
