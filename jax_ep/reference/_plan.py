# SPDX-License-Identifier: Apache-2.0
"""Which row every selection gets."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Where everything goes. `R` ranks, `T` tokens each, `C` rows each, `L` local experts.

    Attributes:
        layout: "expert" or "rank".
        num_experts: `E`, at most `R * L`; expert `e` is local expert `e % L` of rank `e // L`.
        capacity: `C`.
        topk_idx: `[R, T, K]` as given; -1 where `rank_mask` leaves a selection out.
        slot: `[R, T, K]` row of a selection at its destination; -1: none, dropped, or not arrived.
        row_source: `[R, C]` source rank * T + source token; -1: the row holds no token.
        row_topk_idx: `[R, C, K]` local expert or -1; None in layout "expert".
        group_sizes: `[R, L]` rows of each expert, padding included; layout "rank": `[R, R]` rows
            from each source rank. Rows past the capacity are not counted.
        tokens_per_expert: `[R, L]` selections asked for, before any drop.
        num_dropped: `[R]` rows dropped at each destination.
    """

    layout: str
    num_experts: int
    capacity: int
    topk_idx: np.ndarray
    slot: np.ndarray
    row_source: np.ndarray
    row_topk_idx: np.ndarray | None
    group_sizes: np.ndarray
    tokens_per_expert: np.ndarray
    num_dropped: np.ndarray

    @property
    def num_local_experts(self) -> int:
        """`L`."""
        return -(-self.num_experts // self.topk_idx.shape[0])


def plan(
    topk_idx: ArrayLike,
    *,
    num_experts: int,
    layout: str = "expert",
    recv_capacity: int | None = None,
    capacity_factor: float | None = None,
    expert_alignment: int = 1,
    drop: str = "rows",
    pad_experts: bool = False,
    rank_mask: ArrayLike | None = None,
    missing: ArrayLike | None = None,
) -> Plan:
    """Gives every selection its row.

    Args:
        topk_idx: `[R, T, K]` global experts, distinct within a token, or -1.
        num_experts: `E`, a multiple of `R`, but for `pad_experts`.
        layout: "expert" or "rank".
        recv_capacity: `C`; None: it follows `T`.
        capacity_factor: rows per row of even routing, where `recv_capacity` is None. None: the
            worst case.
        expert_alignment: rows; 1 in layout "rank".
        drop: "rows": rows past `C` are dropped; "even": each expert keeps its fair share first.
            Layout "expert" only.
        pad_experts: whether experts that nobody selects may follow, up to a multiple of `R`.
        rank_mask: `[R]` bool, the ranks that take part. Selections of the others, and those of
            their experts, are -1 in all that follows, `Plan.topk_idx` too. None: all take part.
        missing: `[R, R]` bool: whether the rank of the row did not get the data of that of the
            column, whose selections are then -1 for the first, though not in `Plan.topk_idx`.
            None: all got all.

    Raises:
        ValueError: an index is out of range or repeated within a token.
    """
    topk_idx = np.asarray(topk_idx, np.int32)
    num_ranks, num_tokens, num_topk = topk_idx.shape
    if num_experts % num_ranks and not pad_experts:
        raise ValueError(f"num_experts is {num_experts}; it must be a multiple of {num_ranks}")
    _check_indices(topk_idx, num_experts)
    num_local = -(-num_experts // num_ranks)
    if rank_mask is not None:
        topk_idx = _of_ranks_that_take_part(topk_idx, num_local, rank_mask)
    if missing is not None:
        return _of_what_arrives(
            topk_idx,
            missing,
            num_experts=num_experts,
            layout=layout,
            recv_capacity=recv_capacity,
            capacity_factor=capacity_factor,
            expert_alignment=expert_alignment,
            drop=drop,
            pad_experts=pad_experts,
        )
    if recv_capacity is None:
        rows_per_token = min(num_topk, num_local) if layout == "expert" else 1
        rows = num_ranks * num_tokens * rows_per_token
        if capacity_factor is not None:
            rows = math.ceil(capacity_factor * (num_tokens * num_topk))
        # Of at most num_local experts with tokens, each may need all of the padding but a row.
        rows += min(num_local, rows) * (expert_alignment - 1)
        if capacity_factor is not None:
            rows += expert_alignment - 1  # rounded up; no routing needs more than the worst case
        recv_capacity = rows // expert_alignment * expert_alignment
    if drop not in (_KEPT if layout == "expert" else ("rows",)):
        raise ValueError(f"layout {layout!r} with drop {drop!r} is not defined")
    if layout == "expert":
        keep = _KEPT[drop]
        return _plan_expert_rows(topk_idx, num_experts, recv_capacity, expert_alignment, keep)
    if layout == "rank" and expert_alignment == 1:
        return _plan_rank_rows(topk_idx, num_experts, recv_capacity)
    raise ValueError(f"layout {layout!r} with expert_alignment {expert_alignment} is not defined")


def _of_ranks_that_take_part(
    topk_idx: np.ndarray, num_local: int, rank_mask: ArrayLike
) -> np.ndarray:
    rank_mask = np.asarray(rank_mask, bool)
    if rank_mask.shape != topk_idx.shape[:1]:
        raise ValueError(f"rank_mask has shape {rank_mask.shape}; it must be {topk_idx.shape[:1]}")
    kept = topk_idx.copy()
    for rank, token, k in np.argwhere(topk_idx >= 0):
        if not (rank_mask[rank] and rank_mask[topk_idx[rank, token, k] // num_local]):
            kept[rank, token, k] = -1
    return kept


def checked_missing(missing: ArrayLike, num_ranks: int) -> np.ndarray:
    """`missing` as an array.

    Raises:
        ValueError: it is not `[R, R]`, or a rank misses itself.
    """
    missing = np.asarray(missing, bool)
    if missing.shape != (num_ranks, num_ranks):
        raise ValueError(f"missing has shape {missing.shape}; it must be {(num_ranks,) * 2}")
    if missing.diagonal().any():
        raise ValueError("missing has True on its diagonal; no rank misses itself")
    return missing


def _of_what_arrives(topk_idx: np.ndarray, missing: ArrayLike, **kwargs: Any) -> Plan:
    """Each rank's rows as in the plan of what it got."""
    missing = checked_missing(missing, topk_idx.shape[0])
    of_rank = [
        plan(np.where(lost[:, None, None], -1, topk_idx), **kwargs)
        for lost in missing  # by the rank at which rows arrive
    ]
    owner = np.where(topk_idx >= 0, topk_idx // of_rank[0].num_local_experts, 0)
    slots = np.stack([of_one.slot for of_one in of_rank])
    names = ["row_source", "group_sizes", "tokens_per_expert", "num_dropped"]
    if kwargs["layout"] == "rank":
        names.append("row_topk_idx")
    own: dict[str, Any] = {
        name: np.stack([getattr(of_one, name)[rank] for rank, of_one in enumerate(of_rank)])
        for name in names
    }
    slot = np.take_along_axis(slots, owner[None], axis=0)[0]
    return dataclasses.replace(of_rank[0], topk_idx=topk_idx, slot=slot, **own)


def _check_indices(topk_idx: np.ndarray, num_experts: int) -> None:
    for rank, token, k in np.ndindex(topk_idx.shape):
        expert = topk_idx[rank, token, k]
        where = f"topk_idx of rank {rank}, token {token}, k {k} is {expert}"
        if not -1 <= expert < num_experts:
            raise ValueError(f"{where}; allowed: -1 to {num_experts - 1}")
        if expert >= 0 and expert in topk_idx[rank, token, :k]:
            raise ValueError(f"{where}, which the token has selected already")


def _end(rows: Sequence[int], align: int) -> int:
    """One past the last row that holds a token, of groups that start at multiples of `align`."""
    end = 0
    for num_rows in rows:
        if num_rows > 0:
            end = -(-end // align) * align + num_rows
    return end


def _keep_in_row_order(asked: Sequence[int], capacity: int, align: int) -> list[int]:
    """Every expert, ascending, keeps what fits behind the whole groups before it."""
    kept = []
    for local, num_rows in enumerate(asked):
        start = sum(-(-before // align) * align for before in asked[:local])
        kept.append(max(0, min(num_rows, capacity - start)))
    return kept


def _keep_evenly(asked: Sequence[int], capacity: int, align: int) -> list[int]:
    """Every expert keeps its fair share; then, ascending, each as many more as fit."""
    fair = capacity // len(asked) // align * align
    kept = [min(num_rows, fair) for num_rows in asked]
    for local, num_rows in enumerate(asked):
        while kept[local] < num_rows:
            more = [*kept[:local], kept[local] + 1, *kept[local + 1 :]]
            if _end(more, align) > capacity:
                break
            kept = more
    return kept


_KEPT: dict[str, Callable[[Sequence[int], int, int], list[int]]] = {
    "rows": _keep_in_row_order,
    "even": _keep_evenly,
}


def _plan_expert_rows(
    topk_idx: np.ndarray,
    num_experts: int,
    capacity: int,
    align: int,
    keep: Callable[[Sequence[int], int, int], list[int]],
) -> Plan:
    num_ranks, num_tokens, _ = topk_idx.shape
    num_local = -(-num_experts // num_ranks)
    slot = np.full(topk_idx.shape, -1, np.int32)
    row_source = np.full((num_ranks, capacity), -1, np.int32)
    group_sizes = np.zeros((num_ranks, num_local), np.int32)
    tokens_per_expert = np.zeros((num_ranks, num_local), np.int32)
    num_dropped = np.zeros(num_ranks, np.int32)
    for rank in range(num_ranks):
        # argwhere goes by source rank, then token: the order of the rows.
        selections = [np.argwhere(topk_idx == rank * num_local + i) for i in range(num_local)]
        asked = [len(of_expert) for of_expert in selections]
        start = 0
        for local, num_rows in enumerate(keep(asked, capacity, align)):
            for row, (source, token, k) in enumerate(selections[local][:num_rows], start):
                slot[source, token, k] = row
                row_source[rank, row] = source * num_tokens + token
            end = min(start + -(-num_rows // align) * align, capacity)
            group_sizes[rank, local] = end - start
            start = end
        tokens_per_expert[rank] = asked
        num_dropped[rank] = sum(asked) - np.count_nonzero(row_source[rank] >= 0)
    return Plan(
        layout="expert",
        num_experts=num_experts,
        capacity=capacity,
        topk_idx=topk_idx,
        slot=slot,
        row_source=row_source,
        row_topk_idx=None,
        group_sizes=group_sizes,
        tokens_per_expert=tokens_per_expert,
        num_dropped=num_dropped,
    )


def _plan_rank_rows(topk_idx: np.ndarray, num_experts: int, capacity: int) -> Plan:
    num_ranks, num_tokens, num_topk = topk_idx.shape
    num_local = -(-num_experts // num_ranks)
    slot = np.full(topk_idx.shape, -1, np.int32)
    row_source = np.full((num_ranks, capacity), -1, np.int32)
    row_topk_idx = np.full((num_ranks, capacity, num_topk), -1, np.int32)
    group_sizes = np.zeros((num_ranks, num_ranks), np.int32)
    tokens_per_expert = np.zeros((num_ranks, num_local), np.int32)
    num_dropped = np.zeros(num_ranks, np.int32)
    for rank in range(num_ranks):
        row = 0
        for source, token in np.ndindex(num_ranks, num_tokens):
            local = topk_idx[source, token] - rank * num_local
            is_local = (local >= 0) & (local < num_local)
            if not is_local.any():
                continue
            tokens_per_expert[rank, local[is_local]] += 1
            if row < capacity:
                slot[source, token, is_local] = row
                row_source[rank, row] = source * num_tokens + token
                row_topk_idx[rank, row, is_local] = local[is_local]
                group_sizes[rank, source] += 1
            else:
                num_dropped[rank] += 1
            row += 1
    return Plan(
        layout="rank",
        num_experts=num_experts,
        capacity=capacity,
        topk_idx=topk_idx,
        slot=slot,
        row_source=row_source,
        row_topk_idx=row_topk_idx,
        group_sizes=group_sizes,
        tokens_per_expert=tokens_per_expert,
        num_dropped=num_dropped,
    )
