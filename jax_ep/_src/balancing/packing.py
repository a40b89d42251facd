# SPDX-License-Identifier: Apache-2.0
"""How many copies each expert has, and on which ranks: one layer. NumPy only.

All ties go to the lower index, and sums are in a fixed order: the same loads give the same result
on every machine.
"""

import heapq

import numpy as np

# Swapping ends when the hottest rank is this close to the mean, or after so many exchanges.
CLOSE_ENOUGH = 1.001
_MAX_SWAPS = 400
# A swap that gains less than this gains nothing but rounding.
_LEAST_GAIN = 1e-9


def replicate(load: np.ndarray, num_slots: int, most: int) -> np.ndarray:
    """Copies of each expert: one more for that with the hottest copies, until the slots are full.

    No other numbers of copies have a cooler hottest copy.

    Args:
        load: `[E]` float64.
        num_slots: at least `E`.
        most: copies that one expert may have.

    Returns:
        `[E]` int64, at least 1 each; `min(num_slots, E * most)` in all.
    """
    copies = np.ones(len(load), np.int64)
    heap = [(-float(heat), expert) for expert, heat in enumerate(load)] if most > 1 else []
    heapq.heapify(heap)
    for _ in range(min(num_slots, len(load) * most) - len(load)):
        _, expert = heapq.heappop(heap)
        copies[expert] += 1
        if copies[expert] < most:
            heapq.heappush(heap, (-float(load[expert]) / copies[expert], expert))
    return copies


class Packing:
    """Copies in the slots of ranks, all of them alive.

    Attributes:
        slots: `[A, S]` int64, the expert in each slot of `A` ranks, or -1.
        heat: `[E + 1]`, load of one copy of each expert; the last, an empty slot's, is 0.
        has: `[A, E + 1]` bool, which experts a rank has; nobody has the last.
        rank_load: `[A]`.
    """

    def __init__(self, slots: np.ndarray, load: np.ndarray, copies: np.ndarray) -> None:
        self.slots = slots
        self.has = np.zeros((len(slots), len(load) + 1), bool)
        self.has[np.arange(len(slots))[:, None], slots] = True
        self.has[:, -1] = False
        self.set_copies(load, copies)

    def set_copies(self, load: np.ndarray, copies: np.ndarray) -> None:
        """Counts the loads again, for other numbers of copies."""
        self.heat = np.append(load / np.maximum(copies, 1), 0.0)
        num_ranks, per_rank = self.slots.shape
        ranks = np.repeat(np.arange(num_ranks), per_rank)
        # bincount adds one after the other, where sum() adds as the machine likes.
        self.rank_load = np.bincount(ranks, self.heat[self.slots.ravel()], minlength=num_ranks)

    def put(self, rank: int, slot: int, expert: int) -> None:
        """Puts an expert into a slot, in place of what is there."""
        before = self.slots[rank, slot]
        self.slots[rank, slot] = expert
        self.has[rank, before] = False
        self.has[rank, expert] = expert >= 0
        self.rank_load[rank] += self.heat[expert] - self.heat[before]

    def add(self, expert: int) -> None:
        """Adds a copy to the lightest rank with a free slot and without a copy of that expert."""
        is_full = self.slots.min(axis=1) >= 0
        excluded = is_full | self.has[:, expert]
        if excluded.all():
            self._make_room(expert, is_full)
            return
        rank = int(np.where(excluded, np.inf, self.rank_load).argmin())
        self.put(rank, self._free(rank), expert)

    def _free(self, rank: int) -> int:
        return int((self.slots[rank] < 0).argmax())

    def _make_room(self, expert: int, is_full: np.ndarray) -> None:
        """Adds a copy where all ranks with a free slot have one: another one moves there.

        A full rank without the expert has more other experts than the one with a free slot, so
        there always is one that may move.
        """
        rank = int(np.where(is_full, np.inf, self.rank_load).argmin())
        heat = self.heat[self.slots]
        larger = np.maximum(
            self.rank_load[:, None] - heat + self.heat[expert], self.rank_load[rank] + heat
        )
        excluded = ~is_full[:, None] | self.has[:, expert, None] | self.has[rank][self.slots]
        giver, slot = divmod(int(np.where(excluded, np.inf, larger).argmin()), self.slots.shape[1])
        moved = int(self.slots[giver, slot])
        self.put(rank, self._free(rank), moved)
        self.put(giver, slot, expert)

    def swap(self, *, close_enough: float = CLOSE_ENOUGH, max_moved: int | None = None) -> int:
        """Exchanges copies of the hottest rank with others' while that helps.

        Each time the exchange that lowers the larger of the two loads the most. An empty slot
        counts as a copy without load.

        Args:
            close_enough: hottest rank per mean at which it ends.
            max_moved: slots that may get another expert; None: any number.

        Returns:
            How many slots did.
        """
        moved = 0
        mean = float(self.rank_load.cumsum()[-1]) / len(self.rank_load)
        for _ in range(_MAX_SWAPS):
            hot = int(self.rank_load.argmax())
            if self.rank_load[hot] <= close_enough * mean:
                break
            left = 2 if max_moved is None else max_moved - moved
            mine, rank, slot = self._best_swap(hot, left)
            if rank < 0:
                break
            given, taken = int(self.slots[hot, mine]), int(self.slots[rank, slot])
            self.put(hot, mine, taken)
            self.put(rank, slot, given)
            moved += 1 + (taken >= 0)
        return moved

    def _best_swap(self, hot: int, left: int) -> tuple[int, int, int]:
        """Slot of the hottest rank, the other rank, its slot; rank -1: no exchange helps."""
        heat = self.heat[self.slots]
        gain = heat[hot][:, None, None] - heat[None]  # [S, A, S], what the hottest rank loses
        larger = np.maximum(self.rank_load[hot] - gain, self.rank_load[None, :, None] + gain)
        excluded = gain <= 0
        excluded |= self.has[:, self.slots[hot]].T[:, :, None]
        excluded |= self.has[hot][self.slots][None]
        excluded[:, hot] = True
        if left < 2:
            excluded |= (self.slots >= 0)[None] | (left < 1)
        larger[excluded] = np.inf
        best = int(larger.argmin())
        if not larger.flat[best] < self.rank_load[hot] * (1 - _LEAST_GAIN):
            return -1, -1, -1
        mine, rank, slot = np.unravel_index(best, larger.shape)
        return int(mine), int(rank), int(slot)


def pack(
    load: np.ndarray,
    copies: np.ndarray,
    num_ranks: int,
    slots_per_rank: int,
    *,
    swap: bool = True,
    close_enough: float = CLOSE_ENOUGH,
) -> np.ndarray:
    """Puts copies onto ranks, no two of an expert onto the same: the hottest first, then swaps.

    Args:
        load: `[E]` float64.
        copies: `[E]`, at most `num_ranks` each and all together no more than there are slots.
        num_ranks: `A`.
        slots_per_rank: `S`.
        swap: whether swaps follow.
        close_enough: see `Packing.swap`.

    Returns:
        `[A, S]` int64, in each rank ascending, -1 behind.
    """
    packing = Packing(np.full((num_ranks, slots_per_rank), -1), load, copies)
    order = np.argsort(-packing.heat[:-1], kind="stable")
    for expert in np.repeat(order, copies[order]):
        packing.add(int(expert))
    if swap:
        packing.swap(close_enough=close_enough)
    last = len(load)
    slots = np.sort(np.where(packing.slots < 0, last, packing.slots), axis=1)
    return np.where(slots == last, -1, slots)


def adapt(
    load: np.ndarray, slots: np.ndarray, most: int, max_moved: int | None
) -> tuple[np.ndarray, int]:
    """Changes few slots, so that they fit other loads.

    Spare slots, which are empty or have an expert with more copies than wanted, go to the expert
    that wants some and has the hottest copies, in the slot whose rank ends lightest; then swaps.
    An expert without a copy gets one whatever `max_moved` is.

    Args:
        load: `[E]` float64.
        slots: `[A, S]`, the expert of each slot, or -1; not changed.
        most: copies that one expert may have.
        max_moved: slots that may get another expert; None: any number.

    Returns:
        `[A, S]`, and how many slots got another expert.
    """
    num_experts = len(load)
    want = np.append(replicate(load, slots.size, most), -1)  # of an empty slot, there is one more
    have = np.append(np.bincount(slots[slots >= 0], minlength=num_experts), 0)
    packing = Packing(slots.copy(), load, have[:-1])
    is_needy = have[:-1] < want[:-1]
    moved = 0
    while is_needy.any():
        heat = np.where(have[:-1] == 0, np.inf, packing.heat[:-1])
        expert = int(np.where(is_needy, heat, -1.0).argmax())
        if max_moved is not None and moved >= max_moved and have[expert]:
            break
        is_free = (have > want)[packing.slots] & ~packing.has[:, expert, None]
        if not is_free.any():
            is_needy[expert] = False
            continue
        ends = packing.rank_load[:, None] - packing.heat[packing.slots]
        place = int(np.where(is_free, ends, np.inf).argmin())
        rank, slot = divmod(place, slots.shape[1])
        before = int(packing.slots[rank, slot])
        packing.put(rank, slot, expert)
        have[expert] += 1
        have[before] -= before >= 0
        packing.set_copies(load, have[:-1])
        is_needy[expert] = have[expert] < want[expert]
        moved += 1
    left = None if max_moved is None else max(max_moved - moved, 0)
    return packing.slots, moved + packing.swap(max_moved=left)
