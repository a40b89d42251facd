# SPDX-License-Identifier: Apache-2.0
"""What the engine works with: who runs its plans, and who decides where experts are. No JAX."""

from typing import Protocol

import numpy as np

from moe_serve.plans import StepPlan, Written


class Runner(Protocol):
    """Runs plans: `moe_serve.model.ServingModel` here, `moe_serve.remote.RemoteModel` elsewhere."""

    @property
    def num_devices(self) -> int:
        """Devices, each with slots of its own."""

    def run(self, plan: StepPlan) -> list[Written]:
        """For each of `plan.rows` what follows. To run it again changes nothing."""

    def set_experts(self, has_expert: np.ndarray) -> None:
        """Says which experts the routers may choose, `[layers, E]` bool."""

    def set_alive(self, alive: np.ndarray) -> None:
        """Says which ranks take part in exchanges, `[R]` bool: nobody waits for another one."""

    def take_counts(self) -> np.ndarray:
        """`[layers, P]` int64: selections of each expert slot since the last time."""

    def abandon(self) -> None:
        """Ends a `run` that does not end by itself, if it can; from another thread."""


class Experts(Protocol):
    """Where experts are: see `moe_serve.experts`."""

    def set_alive(self, alive: list[bool]) -> None:
        """Takes ranks that take part, or raises ValueError where it cannot be done."""

    def observe(self, steps: int) -> None:
        """May change where experts are; called between steps."""
