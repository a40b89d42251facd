# SPDX-License-Identifier: Apache-2.0
"""What people see while launches are measured: a bar of rich, or lines where that is not there."""

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

from jax_ep._src.tuning.table import Choice, Entry, Key


class Progress:
    """Prints a line for each entry."""

    def begins(self, key: Key) -> None:
        """A cell is measured from now on."""

    def tries(self, choice: str) -> None:
        """One of its candidates is."""

    def finished(self, entry: Entry) -> None:
        """Its entry is there."""
        self.say(line_of(entry))

    def say(self, text: str) -> None:
        """Prints a line."""
        print(text, flush=True)


class _Bar(Progress):
    def __init__(self, bar: Any, task: Any) -> None:
        self._bar = bar
        self._task = task

    def begins(self, key: Key) -> None:
        self._bar.update(self._task, description=name_of(key))

    def finished(self, entry: Entry) -> None:
        super().finished(entry)
        self._bar.advance(self._task)

    def say(self, text: str) -> None:
        self._bar.console.print(text, highlight=False, markup=False)


@contextlib.contextmanager
def shown(title: str, total: int) -> Iterator[Progress]:
    """A progress of so many cells."""
    try:
        rich = importlib.import_module("rich.progress")
    except ImportError:  # it is in the extra "bench"
        print(title)
        yield Progress()
        return
    columns = (
        rich.TextColumn(title),
        rich.BarColumn(),
        rich.MofNCompleteColumn(),
        rich.TextColumn("{task.description}"),
        rich.TimeRemainingColumn(),
    )
    with rich.Progress(*columns) as bar:
        yield _Bar(bar, bar.add_task("", total=total))


def name_of(key: Key) -> str:
    """In few words."""
    path = "LL" if key.path == "low_latency" else "HT"
    return f"{key.op} {path} {key.wire or key.dtype} T={key.tokens}"


def line_of(entry: Entry) -> str:
    """What was found."""
    gain = entry.default_us / entry.us
    times = f"{entry.us:.1f} us (default {entry.default_us:.1f}, x{gain:.2f})"
    return f"{name_of(entry.key)}: {times}, {text_of(entry.use)}"


def text_of(choice: Choice) -> str:
    """Of a choice, what is not the model's."""
    parts = [] if choice.num_sms is None else [f"{choice.num_sms} SMs"]
    parts += [] if choice.num_senders is None else [f"{choice.num_senders} senders"]
    parts += [] if choice.tail is None else [f"tail {'on' if choice.tail else 'off'}"]
    return ", ".join(parts) or "the model's choice"
