# SPDX-License-Identifier: Apache-2.0
"""The least time that the bytes of an operation allow, by what the hardware was seen to move.

Rows alone are counted, as the kernels move them: through SMs, and rows of other ranks through
staging in the heap.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from ep_bench.bytes_moved import FP8_ROW, ROW
from ep_bench.cases import GpuCase


@dataclasses.dataclass(frozen=True, kw_only=True)
class PortBytes:
    """Bytes of a rank in one operation; each is that of the rank with most.

    Attributes:
        into: that its SMs load.
        out: that its SMs store, to its own memory and to peers.
        link: that it sends to peers or gets from them, whichever is more.
    """

    into: int
    out: int
    link: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Rows:
    """Rows by rank, `[R]`, but for `goes`."""

    goes: np.ndarray  # [R, R]: tokens of a source that go to a destination
    leave: np.ndarray  # tokens that go to any other rank
    live: np.ndarray  # tokens that go anywhere
    held: np.ndarray  # rows of the receive buffer, with a token in them

    @property
    def home(self) -> np.ndarray:
        return np.diagonal(self.goes)

    @property
    def sent(self) -> np.ndarray:
        return self.goes.sum(axis=1) - self.home

    @property
    def arriving(self) -> np.ndarray:
        return self.goes.sum(axis=0) - self.home


def _rows(case: GpuCase) -> _Rows:
    ranks = np.arange(case.num_ranks)
    destination = case.topk_idx // (case.num_experts // case.num_ranks)
    goes = (destination[..., None] == ranks).any(axis=2)  # [R, T, destination]
    others = ranks[:, None, None] != ranks
    selected = (destination[..., None] == ranks).sum(axis=(0, 1, 2))
    return _Rows(
        goes=goes.sum(axis=1),
        leave=(goes & others).any(axis=2).sum(axis=1),
        live=goes.any(axis=2).sum(axis=1),
        held=goes.sum(axis=(0, 1)) if case.layout == "rank" else selected,
    )


def port_bytes(operation: str, case: GpuCase) -> PortBytes | None:
    """The bytes of an operation.

    None for the plan, which moves no rows.
    """
    rows = _rows(case)
    link = np.maximum(rows.sent, rows.arriving)
    if operation == "dispatch" and case.wire_dtype:
        staged = rows.goes.sum(axis=1)
        return PortBytes(
            into=int((rows.live * ROW + rows.goes.sum(axis=0) * FP8_ROW).max()),
            out=int((staged * FP8_ROW + rows.held * ROW).max()),
            link=int(link.max()) * FP8_ROW,
        )
    if operation in ("dispatch", "combine_vjp"):
        # A row that stays is not staged: its receiver reads it from x. As the backward pass of
        # combine, a dispatch reads the rows of y, too.
        of_y = rows.held if operation == "combine_vjp" else 0
        return PortBytes(
            into=int((rows.leave + rows.home + rows.arriving + of_y).max()) * ROW,
            out=int((rows.sent + rows.held).max()) * ROW,
            link=int(link.max()) * ROW,
        )
    if operation in ("combine", "dispatch_vjp"):
        # Sums go back where tokens came from.
        return PortBytes(
            into=int((rows.held + rows.sent).max()) * ROW,
            out=int((rows.arriving + rows.live).max()) * ROW,
            link=int(link.max()) * ROW,
        )
    return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bound:
    """Seconds, and what takes them: "link", "out" or "in"."""

    seconds: float
    by: str


Bounds = dict[str, Bound]


def bound(moved: PortBytes, rates: Mapping[str, Mapping[int, float]], num_sms: int) -> Bound:
    """The longest of the times that bytes take at the probe's rates on as many SMs.

    Args:
        moved: of an operation.
        rates: of `link_probe.parse`, with peers.
        num_sms: one that the probe measured.
    """
    # SMs that load each segment once store no less than those that load nothing; so whichever was
    # seen to store most.
    out = max(rates[name][num_sms] for name in ("store", "expand"))
    seconds = {
        "link": moved.link / rates["peer_store_all"][num_sms],
        "out": moved.out / out,
        "in": moved.into / rates["load"][num_sms],
    }
    by = max(seconds, key=seconds.__getitem__)
    return Bound(seconds=seconds[by], by=by)


def bounds_of(case: GpuCase, operations: Iterable[str], probe: Mapping[str, Any] | None) -> Bounds:
    """The bounds of operations, by name; without those that have none, or were not probed for."""
    if probe is None or case.num_sms not in probe["rates"]["load"]:
        return {}
    moved = {name: port_bytes(name, case) for name in operations}
    return {name: bound(size, probe["rates"], case.num_sms) for name, size in moved.items() if size}
