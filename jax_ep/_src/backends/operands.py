# SPDX-License-Identifier: Apache-2.0
"""Operands and results of the primitives, by name.

An operand or a result that does not take part is None, and nothing else stands for it: it is no
input of a program, no residual, and no tangent. Only the compiled handlers, which take all of their
operands, get an array of size 0 in its place; `ffi/primitives.py` makes it.
"""

from typing import Any, NamedTuple

import jax

from jax_ep._src.backends.plan import Counts, Plan, Value
from jax_ep._src.quantized import QuantizedRows

Rows = jax.Array | QuantizedRows


class PlanOperands(NamedTuple):
    """The routing.

    Attributes:
        program_rank: int32[1], the rank that the program takes its device for. Who meets whom is
            not for a program to say: the device says it, see docs/design/ordering.md.
        topk_idx: as `dispatch` takes it, without what `rank_mask` leaves out.
        rank_mask: `[R]` bool, the ranks that meet. Absent, it is no operand of a target either.
    """

    program_rank: Value
    topk_idx: Value
    rank_mask: Value | None = None


class DispatchOperands(NamedTuple):
    """What goes from tokens to received rows: rows, scalars or both.

    With `row_weights` or `y` it is the backward of a weighted combine, which makes the products
    where the rows arrive.

    Attributes:
        program_rank: as in `PlanOperands`.
        x: `[T, H]`.
        x_scales: `[T, ceil(H / 128)]` float32, of an `x` that is quantized.
        token_scalars: `[T, K]` float32.
        row_weights: `[C]` float32, factors of the received rows.
        y: `[C, H]`, whose rows are multiplied with the received rows as they arrived.
        plan: where the rows go.
    """

    program_rank: Value
    x: Value | None
    x_scales: Value | None
    token_scalars: Value | None
    row_weights: Value | None
    y: Value | None
    plan: Plan

    @property
    def with_products(self) -> bool:
        """Whether rows are multiplied where they arrive."""
        return self.row_weights is not None or self.y is not None


class PlanDispatchOperands(NamedTuple):
    """What both take of `PlanOperands` and `DispatchOperands`, in one operation."""

    program_rank: Value
    x: Value | None
    x_scales: Value | None
    token_scalars: Value | None
    topk_idx: Value
    rank_mask: Value | None = None

    def of_plan(self) -> PlanOperands:
        """Those of the plan alone."""
        return PlanOperands(self.program_rank, self.topk_idx, self.rank_mask)

    def of_dispatch(self, plan: Plan) -> DispatchOperands:
        """Those of the dispatch, once there is the plan."""
        return DispatchOperands(
            program_rank=self.program_rank,
            x=self.x,
            x_scales=self.x_scales,
            token_scalars=self.token_scalars,
            row_weights=None,
            y=None,
            plan=plan._replace(topk_idx=self.topk_idx, rank_mask=self.rank_mask).unweighted(),
        )


class CombineOperands(NamedTuple):
    """What goes from received rows to tokens: rows, scalars or both.

    Attributes:
        program_rank: as in `PlanOperands`.
        y: `[C, H]`.
        weights: float32, factors of the rows.
        row_scalars: float32, like `weights`; not factors, they travel.
        plan: where the rows come from.
    """

    program_rank: Value
    y: Value | None
    weights: Value | None
    row_scalars: Value | None
    plan: Plan


class DispatchDoneOperands(NamedTuple):
    """The second half of a `PlanDispatchOperands`.

    Attributes:
        sent: those of the first half. On CPU nothing reads them but derivatives and
            transformations: the rows are taken from where the first half has put them. On GPUs
            those are read that stay on their rank.
        ticket: what the first half gave.
        after: arrays that are to be there first.
    """

    sent: PlanDispatchOperands
    ticket: Value
    after: tuple[Value, ...]


class CombineDoneOperands(NamedTuple):
    """The second half of a `CombineOperands`. Fields as in `DispatchDoneOperands`."""

    sent: CombineOperands
    ticket: Value
    after: tuple[Value, ...]


class StartResults(NamedTuple):
    """`ticket`: uint32[2], the number of a flight."""

    ticket: Value


class PlanResults(NamedTuple):
    """Of the plan all but `topk_idx` and `rank_mask`, which are operands."""

    plan: Plan
    counts: Counts


class DispatchResults(NamedTuple):
    """What of the operands there is, at its rows.

    Attributes:
        rows: `[C, H]`.
        rows_scales: `[C, ceil(H / 128)]` float32, of rows that are received quantized.
        row_scalars: float32.
        row_dots: `[C]` float32, the inner products with the rows of `y`; 0 where no token is.
        missing_ranks: `[R]` bool, where a dispatch that makes its plan is of a group that goes on
            without ranks that do not come. Absent, it is no result of a target either.
    """

    rows: Value | None = None
    rows_scales: Value | None = None
    row_scalars: Value | None = None
    row_dots: Value | None = None
    missing_ranks: Value | None = None


class PlanDispatchResults(NamedTuple):
    """Those of both."""

    plan: Plan
    counts: Counts
    rows: Value | None
    rows_scales: Value | None
    row_scalars: Value | None
    missing_ranks: Value | None = None

    @classmethod
    def of(cls, planned: PlanResults, dispatched: DispatchResults) -> "PlanDispatchResults":
        """The results of two operations as those of one."""
        rows, rows_scales, row_scalars, _, missing_ranks = dispatched  # no products are made
        return cls(*planned, rows, rows_scales, row_scalars, missing_ranks)

    def of_plan(self) -> PlanResults:
        """Those of the plan alone."""
        return PlanResults(self.plan, self.counts)

    def of_dispatch(self) -> DispatchResults:
        """Those of the dispatch alone."""
        return DispatchResults(
            self.rows, self.rows_scales, self.row_scalars, missing_ranks=self.missing_ranks
        )


class CombineResults(NamedTuple):
    """`out` `[T, H]` where there is a `y`, `token_scalars` where there are `row_scalars`.

    `missing_ranks` as in `DispatchResults`.
    """

    out: Value | None
    token_scalars: Value | None
    missing_ranks: Value | None = None


NO_PLAN = Plan(*[None] * len(Plan._fields))


def by_name(values: Any) -> dict[str, Any]:
    """Operands or results as a dictionary, those of a plan or of a first half among them."""
    flat: dict[str, Any] = {}
    for name, value in values._asdict().items():
        if isinstance(value, (Plan, Counts, PlanDispatchOperands, CombineOperands)):
            flat |= by_name(value)
        elif name == "after":
            flat |= {f"after_{i}": array for i, array in enumerate(value)}
        else:
            flat[name] = value
    return flat
