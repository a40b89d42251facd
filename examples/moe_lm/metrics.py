# SPDX-License-Identifier: Apache-2.0
"""What is measured: a file with one JSON object per line."""

import dataclasses
import json
import pathlib
from types import TracebackType
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """One training step.

    Attributes:
        step: steps done, this one included.
        loss: nats per byte of the batch.
        tokens_per_s: bytes of text per second.
        drop_rate: share of selections that found no room at their expert's device.
        imbalance: load of the busiest expert, in multiples of the mean; of the worst layer.
        expert_load: selections of each expert, by layer.
    """

    step: int
    loss: float
    tokens_per_s: float
    drop_rate: float
    imbalance: float
    expert_load: list[list[int]]

    @classmethod
    def of(cls, step: int, loss: float, stats: Any, tokens_per_s: float) -> "StepMetrics":
        """From the statistics of all layers, stacked."""
        load = np.asarray(stats.tokens_per_expert)  # [layers, E]
        return cls(
            step=step,
            loss=loss,
            tokens_per_s=tokens_per_s,
            drop_rate=float(np.sum(stats.num_dropped) / load.sum()),
            imbalance=float((load.max(axis=1) / load.mean(axis=1)).max()),
            expert_load=load.tolist(),
        )


class Metrics:
    """The metrics file, and the same in memory.

    Attributes:
        steps: in order.
        held_out: step and held-out loss.
    """

    def __init__(self, path: pathlib.Path, *, keep_steps: int) -> None:
        """Opens the file and keeps what is in it of the first `keep_steps` steps."""
        self.steps: list[StepMetrics] = []
        self.held_out: list[tuple[int, float]] = []
        kept = _read(path, keep_steps) if keep_steps else []
        for entry in kept:
            self._remember(entry)
        # A run that was killed may have left steps after its last checkpoint, or half a line.
        self._file = path.open("w")
        self._file.writelines(json.dumps(entry) + "\n" for entry in kept)
        self._file.flush()

    def add_step(self, entry: StepMetrics) -> None:
        """Writes down one training step."""
        self._add(dataclasses.asdict(entry))

    def add_held_out(self, step: int, loss: float) -> None:
        """Writes down the held-out loss after a step."""
        self._add({"step": step, "held_out_loss": loss})

    @property
    def last_held_out(self) -> float:
        """The newest held-out loss."""
        return self.held_out[-1][1]

    def _add(self, entry: dict[str, Any]) -> None:
        self._remember(entry)
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()

    def _remember(self, entry: dict[str, Any]) -> None:
        if "held_out_loss" in entry:
            self.held_out.append((entry["step"], entry["held_out_loss"]))
        else:
            self.steps.append(StepMetrics(**entry))

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()


def _read(path: pathlib.Path, keep_steps: int) -> list[dict[str, Any]]:
    kept = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            break
        if entry["step"] <= keep_steps:
            kept.append(entry)
    return kept
