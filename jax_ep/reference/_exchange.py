# SPDX-License-Identifier: Apache-2.0
"""What arrives in the rows of a plan, what combine makes of them, and both gradients."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from jax_ep.reference._plan import Plan, checked_missing
from jax_ep.reference._plan import plan as make_plan
from jax_ep.reference._rounding import (
    QuantizedRows,
    dequantize_fp8,
    dot32,
    fma32,
    quantize_fp8,
    round_to,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dispatched:
    """What every rank receives.

    Attributes:
        x: `[R, C, H]` rows; zeros where a row holds no token. With `recv_dtype` float8_e4m3fn, a
            `QuantizedRows` of them, scales zeros there too.
        weights: layout "expert": `[R, C]` float32, layout "rank": `[R, C, K]`; 0 where there is
            no selection. None if dispatch got none.
        topk_idx: layout "rank": `[R, C, K]` local expert or -1; else None.
        group_sizes, tokens_per_expert, num_dropped: as in `Plan`.
        plan: the plan.
    """

    x: np.ndarray | QuantizedRows
    weights: np.ndarray | None
    topk_idx: np.ndarray | None
    group_sizes: np.ndarray
    tokens_per_expert: np.ndarray
    num_dropped: np.ndarray
    plan: Plan


def dispatch(
    x: ArrayLike | QuantizedRows,
    topk_idx: ArrayLike,
    topk_weights: ArrayLike | None = None,
    *,
    num_experts: int,
    dtype: DTypeLike,
    wire_dtype: DTypeLike | None = None,
    recv_dtype: DTypeLike | None = None,
    layout: str = "expert",
    recv_capacity: int | None = None,
    capacity_factor: float | None = None,
    expert_alignment: int = 1,
    drop: str = "rows",
    pad_experts: bool = False,
    rank_mask: ArrayLike | None = None,
    missing: ArrayLike | None = None,
) -> Dispatched:
    """Sends every token to the ranks that host its experts.

    Args:
        x: `[R, T, H]`; values of `dtype`. Or a `QuantizedRows`, which travels as it is.
        topk_idx: `[R, T, K]`.
        topk_weights: `[R, T, K]` float32, or None.
        num_experts: see `reference.plan`.
        dtype: of the received rows; may be float64.
        wire_dtype: None, or float8_e4m3fn for scaled blocks of 128 elements on the way.
        recv_dtype: None, or float8_e4m3fn with the same `wire_dtype`: rows stay as they travel.
        layout: see `reference.plan`.
        recv_capacity: see `reference.plan`.
        capacity_factor: see `reference.plan`.
        expert_alignment: see `reference.plan`.
        drop: see `reference.plan`.
        pad_experts: see `reference.plan`.
        rank_mask: see `reference.plan`. What a rank that takes no part receives is empty.
        missing: see `reference.plan`.
    """
    plan = make_plan(
        topk_idx,
        num_experts=num_experts,
        layout=layout,
        recv_capacity=recv_capacity,
        capacity_factor=capacity_factor,
        expert_alignment=expert_alignment,
        drop=drop,
        pad_experts=pad_experts,
        rank_mask=rank_mask,
        missing=missing,
    )
    _check_formats(wire_dtype, recv_dtype, x_is_quantized=isinstance(x, QuantizedRows))
    if wire_dtype is None:
        rows = _rows_of_tokens(plan, np.asarray(x).astype(dtype))
    else:
        sent = x if isinstance(x, QuantizedRows) else quantize_fp8(np.asarray(x).astype(dtype))
        rows = QuantizedRows(*(_rows_of_tokens(plan, np.asarray(part)) for part in sent))
        if recv_dtype is None:
            rows = dequantize_fp8(*rows, dtype)
    weights = None
    if topk_weights is not None:
        weights = dispatch_scalars(plan, np.asarray(topk_weights, np.float32))
    return Dispatched(
        x=rows,
        weights=weights,
        topk_idx=plan.row_topk_idx,
        group_sizes=plan.group_sizes,
        tokens_per_expert=plan.tokens_per_expert,
        num_dropped=plan.num_dropped,
        plan=plan,
    )


def _check_formats(
    wire_dtype: DTypeLike | None, recv_dtype: DTypeLike | None, *, x_is_quantized: bool
) -> None:
    for name, dtype in (("wire_dtype", wire_dtype), ("recv_dtype", recv_dtype)):
        if dtype is not None and np.dtype(dtype).name != "float8_e4m3fn":
            raise ValueError(f"{name} is {dtype}; allowed: None, float8_e4m3fn")
    if wire_dtype is None and (x_is_quantized or recv_dtype is not None):
        what = "x is a QuantizedRows" if x_is_quantized else "recv_dtype is float8_e4m3fn"
        raise ValueError(f"{what} and wire_dtype is None; allowed with wire_dtype float8_e4m3fn")


def _rows_of_tokens(plan: Plan, tokens: np.ndarray) -> np.ndarray:
    """`[R, T, H]` to `[R, C, H]`: every row gets its token, or zeros."""
    flat = tokens.reshape(-1, tokens.shape[-1])
    rows = np.zeros((*plan.row_source.shape, tokens.shape[-1]), tokens.dtype)
    for rank, row in np.argwhere(plan.row_source >= 0):
        rows[rank, row] = flat[plan.row_source[rank, row]]
    return rows


def dispatch_scalars(plan: Plan, token_scalars: np.ndarray) -> np.ndarray:
    """A number per selection, `[R, T, K]`, at its row: `[R, C]`, or `[R, C, K]` by rank."""
    shape = plan.row_source.shape
    if plan.row_topk_idx is not None:
        shape = plan.row_topk_idx.shape
    rows = np.zeros(shape, token_scalars.dtype)
    for source, token, k in np.argwhere(plan.slot >= 0):
        rank = plan.topk_idx[source, token, k] // plan.num_local_experts
        row = plan.slot[source, token, k]
        at = (rank, row) if plan.layout == "expert" else (rank, row, k)
        rows[at] = token_scalars[source, token, k]
    return rows


def combine_scalars(plan: Plan, row_scalars: np.ndarray) -> np.ndarray:
    """The transpose of `dispatch_scalars`: `[R, T, K]`, 0 where a selection has no row."""
    tokens = np.zeros(plan.slot.shape, row_scalars.dtype)
    for source, token, k in np.argwhere(plan.slot >= 0):
        rank = plan.topk_idx[source, token, k] // plan.num_local_experts
        row = plan.slot[source, token, k]
        at = (rank, row) if plan.layout == "expert" else (rank, row, k)
        tokens[source, token, k] = row_scalars[at]
    return tokens


def _terms(
    plan: Plan, weights: np.ndarray | None, source: int, token: int
) -> Iterator[tuple[int, list[tuple[int, Any]]]]:
    """A token's `(rank, [(row, weight), ...])` in the order in which combine adds them up.

    Ranks ascend, and within a rank so do local experts. A weight of None stands for "just add".
    """
    experts, slots = plan.topk_idx[source, token], plan.slot[source, token]
    for rank in range(plan.topk_idx.shape[0]):
        ks = [k for k in np.argsort(experts) if slots[k] >= 0]
        ks = [k for k in ks if experts[k] // plan.num_local_experts == rank]
        if not ks:
            continue
        if plan.layout == "expert":
            terms = [(slots[k], None if weights is None else weights[rank, slots[k]]) for k in ks]
        elif weights is None:
            terms = [(slots[ks[0]], None)]  # the row once, however many experts it was for
        else:
            terms = [(slots[k], weights[rank, slots[k], k]) for k in ks]
        yield rank, terms


def combine(
    y: ArrayLike,
    plan: Plan,
    weights: ArrayLike | None = None,
    *,
    dtype: DTypeLike | None = None,
    exact_bits: bool = True,
    domain_size: int | None = None,
    missing: ArrayLike | None = None,
) -> np.ndarray:
    """Sums every token's rows, times their weights, where the token came from.

    Args:
        y: `[R, C, H]`. Rows that hold no token are not read.
        plan: from `plan` or `dispatch(...).plan`.
        weights: None, or shaped as `Dispatched.weights`.
        dtype: of rows and result, with `exact_bits`.
        exact_bits: True: the defined float32 operations, roundings and order, giving `dtype`.
            False: the mathematical value, in float64, from which a right implementation differs
            by at most `combine_error_bound`.
        domain_size: consecutive ranks whose sum is rounded before it is added to those of the
            others; None: all are one domain.
        missing: `[R, R]` bool: whether the rank of the row did not get the rows of that of the
            column, here or in the dispatch: then its sums have nothing of them. None: all got all.

    Returns:
        `[R, T, H]`.
    """
    domain_size = _checked_domain_size(plan, domain_size)
    if missing is not None:
        plan = _without_missing(plan, missing)
    if not exact_bits:
        return _sum_terms(
            np.asarray(y), plan, weights, domain_size, np.float64, _plain_fma, lambda v: v
        )
    if dtype is None:
        raise ValueError("dtype is None; exact_bits needs the dtype of the rows")
    rounded = np.dtype(dtype)
    rows = np.asarray(y).astype(rounded)
    out = _sum_terms(
        rows, plan, weights, domain_size, np.float32, fma32,
        lambda v: round_to(v, rounded).astype(np.float32),
    )  # fmt: skip
    return round_to(out, rounded)


def _without_missing(plan: Plan, missing: ArrayLike) -> Plan:
    missing = checked_missing(missing, plan.topk_idx.shape[0])
    owner = np.where(plan.topk_idx >= 0, plan.topk_idx // plan.num_local_experts, 0)
    source = np.arange(len(missing))[:, None, None]
    return dataclasses.replace(plan, slot=np.where(missing[source, owner], -1, plan.slot))


def _checked_domain_size(plan: Plan, domain_size: int | None) -> int:
    num_ranks = plan.topk_idx.shape[0]
    if domain_size is None:
        return num_ranks
    if domain_size < 1 or num_ranks % domain_size:
        raise ValueError(f"domain_size is {domain_size}; it must divide the {num_ranks} ranks")
    return domain_size


def _plain_fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    return a * b + c


def _sum_terms(
    y: np.ndarray,
    plan: Plan,
    weights: ArrayLike | None,
    domain_size: int,
    number: type[np.floating],
    fma: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray],
    to_wire: Callable[[np.ndarray], np.ndarray],
) -> np.ndarray:
    """`combine` in arithmetic of `number`; `to_wire` rounds the sums of each rank and domain."""
    y = y.astype(number)
    weights = None if weights is None else np.asarray(weights).astype(number)
    num_ranks, num_tokens, _ = plan.topk_idx.shape
    out = np.zeros((num_ranks, num_tokens, y.shape[-1]), number)
    with np.errstate(all="ignore"):
        for source, token in np.ndindex(num_ranks, num_tokens):
            of_domain: dict[int, np.ndarray] = {}  # ascending, as ranks are
            for rank, terms in _terms(plan, weights, source, token):
                partial = np.zeros(y.shape[-1], number)
                for row, weight in terms:
                    value = y[rank, row]
                    partial = partial + value if weight is None else fma(weight, value, partial)
                before = of_domain.get(rank // domain_size, np.zeros(y.shape[-1], number))
                of_domain[rank // domain_size] = before + to_wire(partial)
            for total in of_domain.values():
                out[source, token] += to_wire(total)
    return out


def combine_error_bound(
    y: ArrayLike,
    plan: Plan,
    weights: ArrayLike | None = None,
    *,
    dtype: DTypeLike,
    domain_size: int | None = None,
) -> np.ndarray:
    """The most by which a right `combine` may differ from the float64 value, per element.

    With `u` the unit roundoff of `dtype` (0 for float32: no rounding happens), `n` operations in
    float32 lose at most `g(n) = n 2^-24 / (1 - n 2^-24)` times the sum of the terms' magnitudes
    (Higham, Accuracy and Stability of Numerical Algorithms, section 3). So a rank's partial sum of
    `n` terms is off by `e = g(n) S`, and by `u (|p| + e)` more once rounded; the sum of `m`
    partials loses `g(m)` times their magnitudes. The sum of a domain is rounded in the same way,
    and so are the domains' sums added; the last rounding adds `u` times the value. Every rounding
    may in addition lose the smallest positive number, or a float32 subnormal flushed to zero.
    Overflow is not covered.

    Args:
        y: as for `combine`, and so on.
        plan: likewise.
        weights: likewise.
        dtype: likewise.
        domain_size: likewise.

    Returns:
        `[R, T, H]` float64.
    """
    domain_size = _checked_domain_size(plan, domain_size)
    if domain_size == 1:  # what is rounded again does not change
        domain_size = plan.topk_idx.shape[0]
    y = np.asarray(y).astype(np.float64)
    weights = None if weights is None else np.asarray(weights).astype(np.float64)
    info = {"float32": (0.0, 2.0**-126), "bfloat16": (2.0**-8, 2.0**-126)}
    unit, tiny = {**info, "float16": (2.0**-11, 2.0**-24)}[np.dtype(dtype).name]

    def lost(n: int) -> float:
        return n * 2.0**-24 / (1 - n * 2.0**-24)

    # Values, and by how much they may be off.
    def rounded(value: np.ndarray, off: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return value, off + unit * (np.abs(value) + off) + tiny

    def added(parts: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
        value = error = size = np.zeros(y.shape[-1])
        for part, off in parts:
            value, error, size = value + part, error + off, size + np.abs(part) + off
        return value, error + lost(len(parts)) * size

    num_ranks, num_tokens, _ = plan.topk_idx.shape
    bound = np.zeros((num_ranks, num_tokens, y.shape[-1]))
    for source, token in np.ndindex(num_ranks, num_tokens):
        of_domain: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}
        for rank, terms in _terms(plan, weights, source, token):
            products = np.stack([y[rank, r] if w is None else w * y[rank, r] for r, w in terms])
            off = lost(len(terms)) * np.abs(products).sum(axis=0) + len(terms) * 2.0**-126
            partial = rounded(products.sum(axis=0), off)
            of_domain.setdefault(rank // domain_size, []).append(partial)
        sums = [added(partials) for partials in of_domain.values()]
        # The second rounding of a single domain's sum changes nothing.
        value, error = sums[0] if len(sums) == 1 else added([rounded(*s) for s in sums])
        bound[source, token] = rounded(value, error)[1]
    return bound


def dispatch_vjp(
    plan: Plan, grad_x: ArrayLike, grad_weights: ArrayLike | None = None
) -> tuple[np.ndarray, np.ndarray | None]:
    """The gradient of `dispatch` in float64; straight through an FP8 wire.

    Args:
        plan: of the forward pass.
        grad_x: `[R, C, H]` cotangent of the received rows.
        grad_weights: cotangent of the received weights, or None.

    Returns:
        The cotangents of `x [R, T, H]` and of `topk_weights [R, T, K]` (None if none came).
    """
    x_bar = combine(grad_x, plan, exact_bits=False)
    if grad_weights is None:
        return x_bar, None
    return x_bar, combine_scalars(plan, np.asarray(grad_weights).astype(np.float64))


def combine_vjp(
    y: ArrayLike,
    plan: Plan,
    weights: ArrayLike | None,
    grad_out: ArrayLike,
    *,
    dtype: DTypeLike | None = None,
) -> tuple[np.ndarray, np.ndarray | None]:
    """The gradient of `combine`.

    Args:
        y: `[R, C, H]` of the forward pass.
        plan: of the forward pass.
        weights: of the forward pass, or None.
        grad_out: `[R, T, H]` cotangent of the result.
        dtype: None: the mathematical value, in float64. Or that of rows: the defined float32
            operations, roundings and order, giving `dtype` and float32.

    Returns:
        The cotangents of `y [R, C, H]` and of `weights` (None if there were none); 0 in rows that
        hold no token.
    """
    exact_bits = dtype is not None
    given = np.dtype(dtype if exact_bits else np.float64)
    number = np.float32 if exact_bits else np.float64
    rows = _rows_of_tokens(plan, np.asarray(grad_out).astype(given))
    if weights is None:
        return rows, None
    rows = rows.astype(number)
    holds_token = plan.row_source >= 0
    y = np.where(holds_token[..., None], np.asarray(y).astype(given), 0).astype(number)
    inner = dot32(rows, y) if exact_bits else (rows * y).sum(axis=-1)
    factor = np.where(holds_token, _row_weights(plan, np.asarray(weights).astype(number)), 0)
    with np.errstate(all="ignore"):
        y_bar = round_to(rows * factor[..., None].astype(number), given)
    if plan.row_topk_idx is None:
        return y_bar, inner
    return y_bar, np.where(plan.row_topk_idx >= 0, inner[..., None], 0)


def _row_weights(plan: Plan, weights: np.ndarray) -> np.ndarray:
    """`[R, C]`: what combine multiplies a row by, in all."""
    if plan.row_topk_idx is None:
        return weights
    used = np.where(plan.row_topk_idx >= 0, weights, 0).astype(weights.dtype)
    return functools.reduce(np.add, np.moveaxis(used, -1, 0))
