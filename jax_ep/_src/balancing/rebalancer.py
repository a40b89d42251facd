# SPDX-License-Identifier: Apache-2.0
"""`Rebalancer`: when a placement is to follow the load, and by how much. NumPy only."""

import logging
import math
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from jax_ep._src.balancing.placement import (
    ExpertPlacement,
    as_load,
    only_layers,
    with_layers,
)
from jax_ep._src.balancing.planner import plan_placement
from jax_ep._src.limits import INT32_MAX, is_int
from jax_ep._src.public import set_module

_logger = logging.getLogger("jax_ep")


class _Step(NamedTuple):
    """What a decision leads to."""

    kind: str
    placement: ExpertPlacement
    num_layers: int  # that are changed


@set_module("jax_ep")
class Rebalancer:
    """Decides from the loads of experts when shares change, and when copies move.

    A plain object on the host; give each process the same counts, and all decide the same. The
    loads of `every` steps make a window. At its end, layers whose `imbalance` in it is above
    `reshare_above` get new shares, which moves no weights; those that would still be above
    `move_above` get a plan that starts from the present one and moves at most `max_moved` slots.
    A layer is changed only if that makes it more even. Every decision is logged (logger `jax_ep`,
    level INFO) with the imbalance before and after.

    Not for several threads at once; a call at the end of a window plans, in milliseconds a layer.

    Attributes:
        placement: the present one, changed by `observe`.
        age_steps: steps observed since it was last changed.
    """

    def __init__(
        self,
        placement: ExpertPlacement,
        *,
        every: int = 1000,
        reshare_above: float = 1.03,
        move_above: float = 1.08,
        max_moved: int | None = 16,
        num_nodes: int = 1,
        num_groups: int | None = None,
    ) -> None:
        """Starts with a placement, at the beginning of a window.

        Args:
            placement: what is in use.
            every: steps of a window.
            reshare_above: hottest rank per mean above which shares change, at least 1.
            move_above: the same for moving copies, at least `reshare_above`. `math.inf`: never.
            max_moved: slots of a layer that may get another expert at the end of a window; None:
                any number.
            num_nodes: as in `plan_placement`.
            num_groups: as in `plan_placement`.

        Raises:
            ValueError: an argument has a value that is not allowed.
        """
        if not isinstance(placement, ExpertPlacement):
            raise ValueError(
                f"placement is a {type(placement).__name__}; allowed: an ExpertPlacement"
            )
        if not is_int(every):
            raise ValueError(f"every is {every!r}; allowed: an int from 1 to {INT32_MAX}")
        if max_moved is not None and not is_int(max_moved, 0):
            raise ValueError(f"max_moved is {max_moved!r}; allowed: None or an int of at least 0")
        if not 1 <= reshare_above < math.inf:
            raise ValueError(f"reshare_above is {reshare_above}; allowed: finite, at least 1")
        if not move_above >= reshare_above:
            raise ValueError(
                f"move_above is {move_above}; allowed: at least reshare_above, {reshare_above}"
            )
        self.every: int = int(every)
        self.reshare_above: float = float(reshare_above)
        self.move_above: float = float(move_above)
        self.max_moved = max_moved
        self._nodes = {"num_nodes": num_nodes, "num_groups": num_groups}
        self._num_steps = 0
        self._num_moved = 0
        self._imbalance = math.nan
        self.set_placement(placement)
        # What planning refuses is refused now, and not at the end of a window.
        self._planned(np.ones(placement.copies.shape[:2]), np.arange(placement.num_layers))

    def set_placement(self, placement: ExpertPlacement) -> None:
        """Takes a placement that was planned elsewhere, say after a rank was lost.

        A new window begins: the loads so far are forgotten. While the alive ranks of a node have no
        room for all of its experts, shares change, and no copies move.
        """
        self.placement: ExpertPlacement = placement
        self.age_steps: int = 0
        self._begin_window()

    def observe(
        self, counts: ArrayLike, *, steps: int = 1
    ) -> Literal["reshare"] | ExpertPlacement | None:
        """Adds counts to the window; decides at its end.

        Args:
            counts: `[layers, E]`, or `[E]` for one layer, selections of each logical expert, of all
                ranks, since the call before.
            steps: how many steps they are of.

        Returns:
            None: nothing changes. "reshare": `placement` has new shares and the slots it had. An
            `ExpertPlacement`, which is `placement` now: weights must move before its arrays are
            used.

        Raises:
            ValueError: an argument has a value that is not allowed.
        """
        shape = self._window.shape
        counts = as_load(counts, num_layers=shape[0], num_experts=shape[1])
        if not is_int(steps):
            raise ValueError(f"steps is {steps!r}; allowed: an int from 1 to {INT32_MAX}")
        self._window += counts
        self._window_steps += int(steps)
        self._num_steps += int(steps)
        self.age_steps += int(steps)
        if self._window_steps < self.every:
            return None
        answer = self._decide(self._window)
        self._begin_window()
        return answer

    def metrics(self) -> dict[str, float]:
        """Numbers for a monitoring system, by their names there.

        `jax_ep_placement_age_steps`, `jax_ep_placement_imbalance` (of the worst layer in the last
        whole window, as it was; NaN before there is one), `jax_ep_placement_moved_slots_total`.
        """
        return {
            "jax_ep_placement_age_steps": float(self.age_steps),
            "jax_ep_placement_imbalance": self._imbalance,
            "jax_ep_placement_moved_slots_total": float(self._num_moved),
        }

    def _begin_window(self) -> None:
        self._window = np.zeros(self.placement.copies.shape[:2])
        self._window_steps = 0

    def _decide(self, load: np.ndarray) -> Any:
        before = self.placement.imbalance(load)
        self._imbalance = float(before.max())
        step = self._next(load, before)
        moved = step.placement.moves(self.placement)
        _logger.info(
            "placement %s, step %d: %s of %d of %d layers, %d slots move; imbalance of the worst "
            "layer %.3f -> %.3f, mean %.3f -> %.3f; age %d steps, now %s",
            *(self.placement.digest, self._num_steps, step.kind, step.num_layers, len(before)),
            *(moved, before.max(), step.placement.imbalance(load).max()),
            *(before.mean(), step.placement.imbalance(load).mean()),
            *(self.age_steps, step.placement.digest),
        )
        if step.placement == self.placement:
            return None
        self.placement = step.placement
        self.age_steps = 0
        self._num_moved += moved
        return "reshare" if step.kind == "reshare" else step.placement

    def _next(self, load: np.ndarray, before: np.ndarray) -> _Step:
        """What the window's loads lead to."""
        new, now = self.placement, before.copy()

        def improve(layers: np.ndarray, candidate: ExpertPlacement) -> None:
            nonlocal new
            got = candidate.imbalance(load[layers])
            better = np.flatnonzero(got < now[layers])
            if len(better):
                new = with_layers(new, layers[better], only_layers(candidate, better))
                now[layers[better]] = got[better]

        uneven = np.flatnonzero(before > self.reshare_above)
        if not len(uneven):
            return _Step("no change", new, 0)
        improve(uneven, only_layers(self.placement, uneven).reshare(load[uneven]))
        hot = np.flatnonzero(now > self.move_above)
        if len(hot) and self.max_moved != 0 and self._has_room():
            improve(hot, self._planned(load, hot))
        num_layers = int((now < before).sum())
        if new.moves(self.placement):
            return _Step("move", new, num_layers)
        return _Step("reshare" if num_layers else "no change", new, num_layers)

    def _has_room(self) -> bool:
        """Whether a plan can have all experts: a placement of what ranks left may not."""
        placement, num_nodes = self.placement, self._nodes["num_nodes"]
        num_alive = placement.alive.reshape(num_nodes, -1).sum(axis=1)
        num_slots = num_alive * placement.slots_per_rank
        return bool((num_slots * num_nodes >= placement.num_experts).all())

    def _planned(self, load: np.ndarray, layers: np.ndarray) -> ExpertPlacement:
        return plan_placement(
            load[layers],
            num_ranks=self.placement.num_ranks,
            slots_per_rank=self.placement.slots_per_rank,
            alive=self.placement.alive,
            previous=only_layers(self.placement, layers),
            max_moved=self.max_moved,
            **self._nodes,
        )
