# SPDX-License-Identifier: Apache-2.0
"""A progress bar on a terminal, plain lines elsewhere."""

import math
import statistics
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from moe_lm.metrics import StepMetrics
from moe_lm.options import Options

# Lines of a whole run where there is no terminal.
_NUM_LINES = 30


class Progress:
    """Shows how far a run is, and its numbers."""

    def __init__(self, options: Options, first: int, title: str) -> None:
        """Shows the title; `first` steps are done already."""
        self._console = Console(highlight=False)
        self._console.print(title)
        self._every = max(1, math.ceil(options.steps / _NUM_LINES))
        self._steps = options.steps
        self._tokens_per_s: list[float] = []
        self._held_out = math.nan
        self._bar: RichProgress | None = None
        if self._console.is_terminal:
            self._bar = RichProgress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=20),
                TextColumn("{task.fields[numbers]}"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._bar.add_task(
                "train", total=options.steps, completed=first, numbers="compiling"
            )

    def step(self, entry: StepMetrics) -> None:
        """Shows one training step."""
        # The first step compiles, and says nothing about the others.
        speeds = self._tokens_per_s
        speeds.append(entry.tokens_per_s)
        speed = statistics.median(speeds[1:][-10:] or speeds)
        numbers = (
            f"loss {entry.loss:.3f} | {speed:,.0f} tok/s | "
            f"dropped {entry.drop_rate:.1%} | busiest expert {entry.imbalance:.2f}x"
        )
        if self._bar is not None:
            if not math.isnan(self._held_out):
                numbers += f" | held-out {self._held_out:.3f}"
            self._bar.update(self._task, advance=1, numbers=numbers)
        elif entry.step % self._every == 0 or entry.step in (1, self._steps):
            print(f"step {entry.step}/{self._steps} | {numbers}", flush=True)

    def held_out(self, step: int, loss: float) -> None:
        """Shows a held-out loss."""
        self._held_out = loss
        if self._bar is None:
            print(f"step {step}/{self._steps} | held-out loss {loss:.4f}", flush=True)

    def __enter__(self) -> "Progress":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
