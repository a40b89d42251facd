# SPDX-License-Identifier: Apache-2.0
"""Shares: which part of an expert's tokens goes to each of its copies. One layer, NumPy only."""

import collections
from collections.abc import Sequence

import numpy as np

ONE = 65536  # shares are in 2^-16
_MAX_BISECTIONS = 12
_CLOSE = 1.0005  # upper per lower bound at which bisection ends
_ROUNDING = 1e-12
_AUGMENTATIONS_PER_RANK = 20

Flow = dict[int, list[float]]  # expert -> load of each of its copies


def shares_upper(
    load: np.ndarray, copies: np.ndarray, slots_per_rank: int, alive: np.ndarray
) -> np.ndarray:
    """Upper bounds of the shares for which the hottest rank is coolest.

    The least possible load of the hottest rank is found by bisection; whether a bound can be kept
    is a question of flow: what a rank has above it goes along shared experts, by a shortest path,
    to one that has less.

    Args:
        load: `[E]` float64.
        copies: `[E, J]`, slots of each expert ascending, -1 behind.
        slots_per_rank: `S`.
        alive: `[R]` bool, the ranks that share the load.

    Returns:
        `[E, J]` int32 in 2^-16, ascending, the last of each expert 65536, -1 behind.
    """
    num_copies = (copies >= 0).sum(axis=1)
    flow = _balanced(load, copies // slots_per_rank, num_copies, alive)
    upper = np.full(copies.shape, -1, np.int32)
    for expert, count in enumerate(num_copies.tolist()):
        if count == 0:
            continue
        parts = np.cumsum(flow.get(expert, [1.0] * count))
        upper[expert, :count] = np.floor(parts / parts[-1] * ONE + 0.5)
    return upper


def _balanced(
    load: np.ndarray, ranks: np.ndarray, num_copies: np.ndarray, alive: np.ndarray
) -> Flow:
    """The load of each copy of the experts that have some and more than one copy."""
    heat = load / np.maximum(num_copies, 1)
    shared = np.flatnonzero((num_copies > 1) & (load > 0)).tolist()
    alone = np.flatnonzero(num_copies == 1)
    base = np.bincount(ranks[alone, 0], load[alone], minlength=len(alive))
    ranks_of = {expert: ranks[expert, : num_copies[expert]].tolist() for expert in shared}
    best = {expert: [float(heat[expert])] * len(ranks_of[expert]) for expert in shared}
    if not shared:
        return best
    network = _Network(base.tolist(), ranks_of)
    total = float(load[num_copies > 0].cumsum()[-1])
    # No flow is below what the ranks have alone; nor below the mean.
    low = max(total / int(alive.sum()), max(network.base))
    high = max(network.rank_load(best))
    if (flow := network.within(low * (1 + 1e-9), best)) is not None:
        return flow
    for _ in range(_MAX_BISECTIONS):
        if high <= low * _CLOSE:
            break
        middle = (low + high) / 2
        flow = network.within(middle, best)
        if flow is None:
            low = middle
        else:
            best, high = flow, middle
    return best


class _Network:
    """Ranks, and the experts that they share.

    Attributes:
        base: `[R]`, load that no other rank can take.
        ranks_of: expert -> the ranks of its copies.
    """

    def __init__(self, base: list[float], ranks_of: dict[int, list[int]]) -> None:
        self.base = base
        self.ranks_of = ranks_of
        self._copies_of: list[list[tuple[int, int]]] = [[] for _ in base]
        for expert, ranks in ranks_of.items():
            for copy, rank in enumerate(ranks):
                self._copies_of[rank].append((expert, copy))

    def rank_load(self, flow: Flow) -> list[float]:
        """`[R]`."""
        loads = list(self.base)
        for expert, parts in flow.items():
            for rank, part in zip(self.ranks_of[expert], parts, strict=True):
                loads[rank] += part
        return loads

    def within(self, bound: float, start: Flow) -> Flow | None:
        """A flow in which no rank has more than `bound`, if one is found from `start`."""
        flow = {expert: list(parts) for expert, parts in start.items()}
        loads = self.rank_load(flow)
        for _ in range(_AUGMENTATIONS_PER_RANK * len(loads)):
            hot = max(range(len(loads)), key=loads.__getitem__)  # of equal ones, the first
            if loads[hot] <= bound * (1 + _ROUNDING):
                return flow
            path = self._shortest_path(hot, bound * (1 - _ROUNDING), flow, loads)
            if not path:
                return None
            cold = self.ranks_of[path[0][0]][path[0][2]]
            amount = min(loads[hot] - bound, bound - loads[cold])
            amount = min([amount, *(flow[expert][giver] for expert, giver, _ in path)])
            for expert, giver, taker in path:
                flow[expert][giver] -= amount
                flow[expert][taker] += amount
            loads[hot] -= amount
            loads[cold] += amount
        return None

    def _shortest_path(
        self, hot: int, bound: float, flow: Flow, loads: Sequence[float]
    ) -> list[tuple[int, int, int]]:
        """(expert, copy that gives, copy that takes) of each step to a rank below `bound`.

        The last step comes first. Empty: there is none.
        """
        came_by: dict[int, tuple[int, int, int] | None] = {hot: None}
        queue = collections.deque([hot])
        while queue:
            rank = queue.popleft()
            if loads[rank] < bound and rank != hot:
                return self._steps(rank, came_by)
            for expert, copy in self._copies_of[rank]:
                if flow[expert][copy] <= bound * 1e-9:
                    continue
                for other, there in enumerate(self.ranks_of[expert]):
                    if there not in came_by:
                        came_by[there] = (expert, copy, other)
                        queue.append(there)
        return []

    def _steps(
        self, rank: int, came_by: dict[int, tuple[int, int, int] | None]
    ) -> list[tuple[int, int, int]]:
        steps = []
        while (step := came_by[rank]) is not None:
            steps.append(step)
            rank = self.ranks_of[step[0]][step[1]]
        return steps
