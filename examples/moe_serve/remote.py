# SPDX-License-Identifier: Apache-2.0
"""A model that other processes step, one for each GPU: a `moe_serve.runner.Runner`. No JAX."""

import numpy as np

from moe_serve import wire
from moe_serve.plans import StepPlan, Written
from moe_serve.workers import Workers


class RemoteModel:
    """Has workers run the same plans, and takes from each what is of its devices."""

    def __init__(self, workers: Workers, num_devices: int) -> None:
        """Workers that are ready, and how many devices they have together."""
        self.num_devices = num_devices
        self._workers = workers

    def run(self, plan: StepPlan) -> list[Written]:
        """See `Runner`, as the following.

        Raises:
            WorkerEnded: a worker has ended.
        """
        written: dict[int, tuple[int, float]] = {}
        for answer in self._workers.ask(wire.Run(wire.packed(plan))):
            written.update(answer.written)
        return [Written(*written[i]) for i in range(len(plan.rows))]

    def set_experts(self, has_expert: np.ndarray) -> None:
        """Before the next plan."""
        self._workers.tell(wire.SetExperts(has_expert))

    def set_alive(self, alive: np.ndarray) -> None:
        """Before the next plan."""
        self._workers.tell(wire.SetAlive(alive))

    def take_counts(self) -> np.ndarray:
        """Of all workers."""
        return np.sum(self._workers.ask(wire.TakeCounts()), axis=0)

    def abandon(self) -> None:
        """Ends the workers: `run` raises `WorkerEnded`."""
        self._workers.kill(self._workers.problem() or "a step does not end")
