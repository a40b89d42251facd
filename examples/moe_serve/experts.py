# SPDX-License-Identifier: Apache-2.0
"""Where experts are while the model is served, and which of them routers may choose."""

from typing import TYPE_CHECKING, Any, Literal

import jax
import numpy as np

import jax_ep
from moe_serve.runner import Runner
from moe_serve.telemetry import Load, Telemetry

if TYPE_CHECKING:
    from moe_serve.model import ServingModel


class FixedExperts:
    """Every expert is once, on one rank; who leaves takes its experts along."""

    def __init__(
        self,
        model: Runner,
        telemetry: Telemetry,
        *,
        num_ranks: int,
        num_topk: int,
        every: int,
    ) -> None:
        """Loads are written down every so many steps."""
        self._model = model
        self._telemetry = telemetry
        self._num_topk = num_topk
        self._every = every
        self._steps = 0
        num_layers, num_experts = model.take_counts().shape
        rank = np.arange(num_experts) // (num_experts // num_ranks)
        self._rank = np.broadcast_to(rank, (num_layers, num_experts))
        self._alive = np.ones(num_ranks, bool)

    def set_alive(self, alive: list[bool]) -> None:
        """Routers choose among the experts of these ranks.

        Raises:
            ValueError: these are too few.
        """
        has_expert = np.array(alive)[self._rank]
        _check_enough(alive, has_expert, self._num_topk)
        self._model.set_experts(has_expert)
        self._alive = np.array(alive)
        self._model.set_alive(self._alive)

    def observe(self, steps: int) -> None:
        """Writes the loads down."""
        self._steps += steps
        if self._steps < self._every:
            return
        self._steps = 0
        counts = self._model.take_counts()
        of_ranks = counts.reshape(len(counts), len(self._alive), -1).sum(axis=2)
        self._telemetry.loads.append(Load(self._telemetry.now(), counts, of_ranks, self._alive))


class PlacedExperts:
    """Popular experts have copies on several ranks, which follow the loads.

    Weights move one layer at a time between two steps, together with the table that says where they
    are: both are operands of the step, so nothing is compiled.
    """

    def __init__(
        self,
        model: "ServingModel",
        telemetry: Telemetry,
        placement: jax_ep.ExpertPlacement,
        weights: list[dict[str, np.ndarray]],
        *,
        num_topk: int,
        every: int,
        group: jax_ep.EpGroup,
    ) -> None:
        """Starts with a placement that the model has.

        Args:
            model: whose layers have a placement.
            telemetry: what is told.
            placement: of all layers.
            weights: of each layer's experts `[E, ...]` by name, on the host: from there come those
                whose last copy has left.
            num_topk: experts that a byte chooses.
            every: steps of a window of loads.
            group: for weights that move, see `jax_ep.move_experts`.
        """
        self._model = model
        self._telemetry = telemetry
        self._weights = weights
        self._num_topk = num_topk
        self._every = every
        self._group = group
        self._rebalancer = jax_ep.Rebalancer(placement, every=every)
        self._in_use = [placement] * placement.num_layers  # layer i of the i-th
        self._to_change: list[int] = []
        self._has_expert = np.ones(placement.copies.shape[:2], bool)
        self._alive = np.ones(placement.num_ranks, bool)
        self._steps = 0
        self._of_experts = np.zeros(self._has_expert.shape, np.int64)
        self._of_ranks = np.zeros((placement.num_layers, placement.num_ranks), np.int64)

    def compile(self) -> None:
        """Compiles what moves weights, by moving those of a layer to where they are."""
        arrays = self._in_use[0].layer(0)
        weights: Any = self._model.weights(0)
        weights = jax_ep.move_experts(weights, old=arrays, new=arrays, group=self._group)
        weights = jax_ep.restore_experts(weights, arrays, self._from_host)
        self._model.set_weights(0, jax.block_until_ready(weights))

    def set_alive(self, alive: list[bool]) -> None:
        """Experts go on at once where a copy is left; the others come back a layer at a time.

        Where the ranks that take part have no room for all experts, some do not come back, and
        a rank that comes back gets none before there is room.

        Raises:
            ValueError: the copies that are left are too few.
        """
        placement = self._rebalancer.placement
        has_copy = np.stack([~p.lost(alive)[i] for i, p in enumerate(self._in_use)])
        _check_enough(alive, has_copy, self._num_topk)
        self._take_loads()
        if sum(alive) * placement.slots_per_rank >= placement.num_experts:
            new = jax_ep.plan_placement(
                self._recent_loads(),
                num_ranks=placement.num_ranks,
                slots_per_rank=placement.slots_per_rank,
                alive=alive,
                max_copies=placement.max_copies,
                previous=placement,
            )
        else:
            new = placement.only_alive(alive)
        for layer, old in enumerate(self._in_use):
            self._use(layer, old.only_alive(alive))
        self._alive = np.array(alive)
        self._model.set_alive(self._alive)
        self._has_expert = has_copy
        self._model.set_experts(has_copy)
        self._rebalancer.set_placement(new)
        self._to_change = list(range(new.num_layers))

    def observe(self, steps: int) -> None:
        """Moves a layer's weights if some are to be moved; else it may decide that they are."""
        self._steps += steps
        if self._to_change:
            self._take_loads()
            self._change(self._to_change.pop(0))
        elif self._steps >= self._every:
            self.decide()

    def decide(self) -> Literal["reshare", "move"] | None:
        """Ends the window of loads now; says what follows from it."""
        while self._to_change:
            self._take_loads()
            self._change(self._to_change.pop(0))
        self._take_loads()
        now = self._telemetry.now()
        self._telemetry.loads.append(Load(now, self._of_experts, self._of_ranks, self._alive))
        counts, self._steps = self._of_experts, 0
        self._of_experts = np.zeros_like(counts)
        self._of_ranks = np.zeros_like(self._of_ranks)
        answer = self._rebalancer.observe(counts, steps=self._every)
        if answer is None:
            return None
        self._to_change = list(range(len(counts)))
        if isinstance(answer, jax_ep.ExpertPlacement):
            self._telemetry.mark("copies move")
            return "move"
        self._telemetry.counters["reshares"] += 1
        self._telemetry.mark("new shares")
        return "reshare"

    def _recent_loads(self) -> np.ndarray:
        """`[layers, E]`, at least 1: of the window so far and the one before, if any."""
        before = self._telemetry.loads[-1].of_experts if self._telemetry.loads else 0
        return self._of_experts + before + 1

    def _take_loads(self) -> None:
        """Counts of slots become those of experts, as long as it is known who was where."""
        counts = self._model.take_counts()
        for layer, (of_layer, placement) in enumerate(zip(counts, self._in_use, strict=True)):
            expert = placement.slot_expert[layer]
            np.add.at(self._of_experts[layer], expert[expert >= 0], of_layer[expert >= 0])
        shape = (*self._of_ranks.shape, -1)
        self._of_ranks += counts.reshape(shape).sum(axis=2)

    def _change(self, layer: int) -> None:
        """Weights and tables of one layer become those of the placement that was decided on."""
        old, new = self._in_use[layer], self._rebalancer.placement
        before, after = old.layer(layer), new.layer(layer)
        moved = int((old.slot_expert[layer] != new.slot_expert[layer]).sum())
        if moved:
            weights: Any = self._model.weights(layer)
            weights = jax_ep.move_experts(
                weights, old=before, new=after, group=self._group, keep_lost=True
            )
            weights = jax_ep.restore_experts(
                weights, after, self._from_host, old=before, layer=layer
            )
            self._model.set_weights(layer, jax.block_until_ready(weights))
            self._telemetry.counters["moved_slots"] += moved
        self._use(layer, new)
        has_expert = ~new.lost(new.alive)[layer]
        if not (has_expert == self._has_expert[layer]).all():
            self._has_expert = self._has_expert.copy()
            self._has_expert[layer] = has_expert
            self._model.set_experts(self._has_expert)

    def _use(self, layer: int, placement: jax_ep.ExpertPlacement) -> None:
        self._in_use[layer] = placement
        self._model.set_placement(layer, placement.layer(layer))

    def _from_host(self, layer: int, expert: int) -> dict[str, np.ndarray]:
        return {name: weight[expert] for name, weight in self._weights[layer].items()}


def _check_enough(alive: list[bool], has_expert: np.ndarray, num_topk: int) -> None:
    """Raises ValueError where a layer has fewer experts than a byte chooses."""
    left = has_expert.sum(axis=1).min()
    if left < num_topk:
        raise ValueError(
            f"alive ranks are {[r for r, a in enumerate(alive) if a]}, which have {left} experts; "
            f"allowed: at least {num_topk} experts, which a byte chooses"
        )
