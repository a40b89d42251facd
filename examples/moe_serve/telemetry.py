# SPDX-License-Identifier: Apache-2.0
"""What a server tells about itself: counters, histograms, and the loads of experts over time."""

import bisect
import collections
import dataclasses
import time
from collections.abc import Iterator

import numpy as np

# Upper bounds of the histograms, in seconds.
_BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
# How many windows of loads are kept, and how many marks.
_KEPT = 400


@dataclasses.dataclass
class Histogram:
    """How often what took how long, as Prometheus wants it."""

    name: str
    text: str
    counts: list[int] = dataclasses.field(default_factory=lambda: [0] * (len(_BOUNDS) + 1))
    total: float = 0.0

    def add(self, seconds: float) -> None:
        """One more."""
        self.counts[bisect.bisect_left(_BOUNDS, seconds)] += 1
        self.total += seconds

    def lines(self) -> Iterator[str]:
        """In the text format 0.0.4."""
        yield f"# HELP {self.name} {self.text}"
        yield f"# TYPE {self.name} histogram"
        counts = list(np.cumsum(self.counts))
        for bound, count in zip((*_BOUNDS, "+Inf"), counts, strict=True):
            yield f'{self.name}_bucket{{le="{bound}"}} {count}'
        yield f"{self.name}_sum {self.total}"
        yield f"{self.name}_count {counts[-1]}"


@dataclasses.dataclass(frozen=True)
class Load:
    """Loads of a window of steps.

    Not a `jax_ep.LoadReport`: that knows steps, and here it is seconds, and its mean is over all
    ranks, and here some may have left.

    Attributes:
        second: when it ended, of the telemetry's time.
        of_experts: `[layers, E]`, selections.
        of_ranks: `[layers, R]`, selections that ranks had to serve.
        alive: `[R]` bool, ranks that took part at its end.
    """

    second: float
    of_experts: np.ndarray
    of_ranks: np.ndarray
    alive: np.ndarray

    @property
    def imbalance(self) -> np.ndarray:
        """`[layers]`: load of the hottest rank per mean of the alive ones; 1 without any."""
        ranks = self.of_ranks[:, self.alive]
        mean = ranks.mean(axis=1)
        return np.where(mean > 0, ranks.max(axis=1) / np.maximum(mean, 1e-9), 1.0)


class Telemetry:
    """Each number is written by one thread, that of the engine or of asyncio, and read by others.

    Attributes:
        counters: of events since the start, by name.
        gauges: values of now, by name.
        first: seconds from a request to its first byte.
        between: seconds between two bytes of a request.
        loads: of the newest windows.
        marks: second and text of what happened to the server, the newest ones.
        start: of its time, a value of `time.perf_counter`.
    """

    def __init__(self) -> None:
        self.begin()
        self.counters: collections.Counter[str] = collections.Counter(dict.fromkeys(_COUNTERS, 0))
        self.gauges: dict[str, float] = dict.fromkeys(_GAUGES, 0)
        self.first = Histogram("moe_serve_first_byte_seconds", "from a request to its first byte")
        self.between = Histogram("moe_serve_next_byte_seconds", "between two bytes of a request")
        self.loads: collections.deque[Load] = collections.deque(maxlen=_KEPT)
        self.marks: collections.deque[tuple[float, str]] = collections.deque(maxlen=_KEPT)

    def begin(self) -> None:
        """The start is now."""
        self.start = time.perf_counter()

    def now(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.start

    def mark(self, text: str) -> None:
        """Something happened."""
        self.marks.append((self.now(), text))

    def prometheus(self) -> str:
        """In the text format 0.0.4."""
        lines = []
        for name, text in _COUNTERS.items():
            full = f"moe_serve_{name}_total"
            lines += [f"# HELP {full} {text}", f"# TYPE {full} counter"]
            lines.append(f"{full} {self.counters[name]}")
        for name, text in _GAUGES.items():
            full = f"moe_serve_{name}"
            lines += [f"# HELP {full} {text}", f"# TYPE {full} gauge"]
            lines.append(f"{full} {self.gauges[name]}")
        lines += [*self.first.lines(), *self.between.lines(), *self._load_lines()]
        return "\n".join(lines) + "\n"

    def _load_lines(self) -> Iterator[str]:
        if not self.loads:
            return
        name = "moe_serve_rank_imbalance"
        yield f"# HELP {name} load of the hottest rank per mean of those that take part"
        yield f"# TYPE {name} gauge"
        for layer, value in enumerate(self.loads[-1].imbalance):
            yield f'{name}{{layer="{layer}"}} {value:.4f}'


_COUNTERS = {
    "requests": "requests that were taken",
    "rejected": "requests that were not, because the queue was full",
    "cancelled": "requests whose client has gone",
    "prompt_bytes": "bytes of prompts that were read, those that were read again included",
    "written_bytes": "bytes that were written",
    "steps": "steps of the model",
    "thrown_away": "steps whose bytes were thrown away, because a rank left or came meanwhile",
    "moved": "sequences that went to another device, because a rank left",
    "moved_slots": "expert slots that got another expert",
    "reshares": "times that experts' copies got new shares",
}
_GAUGES = {
    "queue": "requests that wait for a slot",
    "running": "requests with a slot",
    "alive_ranks": "ranks that take part",
}
