# SPDX-License-Identifier: Apache-2.0
"""Comparisons that say which token of which rank went where."""

import itertools
from typing import Any

import numpy as np

from ep_testing.problems import EpProblem
from jax_ep import reference

_MAX_LINES = 8


def bits(a: np.ndarray) -> np.ndarray:
    """The bit patterns of `a`, for comparisons in which -0 is not 0 and NaN equals itself."""
    a = np.ascontiguousarray(a)
    return a.view(f"u{a.dtype.itemsize}")


def describe_row(row: np.ndarray, problem: EpProblem) -> str:
    """Says whose row this is: `token 3 of rank 1`, or what it is pieced together from."""
    row = np.asarray(row)
    if not row.astype(np.float32).any():
        return "zeros"
    sent = problem.x
    if problem.wire_dtype is not None:
        sent = reference.dequantize_fp8(*reference.quantize_fp8(sent), problem.np_dtype)
    matches = bits(sent.reshape(-1, problem.hidden)) == bits(row.astype(problem.np_dtype))
    if not matches.size:
        return "no token's values"
    whole = np.flatnonzero(matches.all(axis=1))
    if len(whole):
        return _token_name(whole[0], problem)
    # One token for each column: the one that explains most of the row, where several could be it.
    popularity = matches.sum(axis=1, keepdims=True)
    best = np.where(matches.any(axis=0), (matches * popularity).argmax(axis=0), -1)
    parts, column = [], 0
    for number, run in itertools.groupby(best):
        last = column + len(list(run)) - 1
        name = "no token's values" if number < 0 else _token_name(number, problem)
        parts.append(f"{name} in columns {column} to {last}")
        column = last + 1
    shown = parts[:_MAX_LINES] + ["..."] * (len(parts) > _MAX_LINES)
    return "; ".join(shown)


def _token_name(number: int, problem: EpProblem) -> str:
    rank, token = divmod(int(number), problem.num_tokens)
    return f"token {token} of rank {rank}"


def _expected_row(rank: int, row: int, problem: EpProblem) -> str:
    source = problem.plan.row_source[rank, row]
    if source < 0:
        return "no token"
    of_rank, token = divmod(int(source), problem.num_tokens)
    local = problem.topk_idx[of_rank, token] - rank * problem.plan.num_local_experts
    here = problem.plan.slot[of_rank, token] == row
    ks = [k for k in np.flatnonzero(here) if 0 <= local[k] < problem.plan.num_local_experts]
    chosen = ", ".join(f"k {k}: local expert {local[k]}" for k in ks)
    return f"{_token_name(source, problem)} ({chosen})"


def describe_differing_rows(got: np.ndarray, want: np.ndarray, problem: EpProblem) -> str:
    """Lists the rows `[R, C, H]` that differ: whose row is there, and whose should be."""
    lines = []
    differs = (bits(got) != bits(want)).any(axis=-1)
    for rank, row in np.argwhere(differs):
        lines.append(
            f"rank {rank}, row {row}: holds {describe_row(got[rank, row], problem)}; "
            f"expected {_expected_row(rank, row, problem)}"
        )
    return _shorten(lines, f"{problem.name}: {len(lines)} rows differ")


def describe_differing_sums(got: np.ndarray, want: np.ndarray, problem: EpProblem) -> str:
    """Lists the tokens `[R, T, H]` whose sums differ, with the rows that they come from."""
    lines = []
    for rank, token in np.argwhere((bits(got) != bits(want)).any(axis=-1)):
        column = int(np.flatnonzero(bits(got[rank, token]) != bits(want[rank, token]))[0])
        rows = [
            f"expert {expert} (rank {expert // problem.plan.num_local_experts}) "
            + ("dropped" if row < 0 else f"row {row}")
            for expert, row in zip(
                problem.topk_idx[rank, token], problem.plan.slot[rank, token], strict=True
            )
            if expert >= 0
        ]
        lines.append(
            f"rank {rank}, token {token}, column {column}: got {got[rank, token, column]!r}, "
            f"expected {want[rank, token, column]!r}, from {', '.join(rows) or 'no rows'}"
        )
    return _shorten(lines, f"{problem.name}: {len(lines)} tokens differ")


def _shorten(lines: list[str], title: str) -> str:
    rest = len(lines) - _MAX_LINES
    return "\n  ".join([title, *lines[:_MAX_LINES], *([f"and {rest} more"] if rest > 0 else [])])


def _assert_same_shape_and_dtype(got: np.ndarray, want: np.ndarray) -> None:
    assert (got.shape, got.dtype) == (want.shape, want.dtype)


def assert_rows_equal(got: np.ndarray, want: np.ndarray, problem: EpProblem) -> None:
    """Rows `[R, C, H]` agree bit by bit; without zero_fill, only where they hold a token."""
    got, want = np.asarray(got), np.asarray(want)
    _assert_same_shape_and_dtype(got, want)
    if not problem.zero_fill:
        got = np.where(problem.plan.row_source[..., None] >= 0, got, want)
    assert np.array_equal(bits(got), bits(want)), describe_differing_rows(got, want, problem)


def assert_received_rows_equal(got: Any, want: Any, problem: EpProblem) -> None:
    """What arrived, in FP8 or not, agrees bit by bit with what the oracle or a backend received."""
    if problem.recv_dtype is None:
        assert_rows_equal(got, want, problem)
        return
    values, scales = np.asarray(got.values), np.asarray(got.scales)
    # First what the rows stand for, because that message says whose they are.
    for_reading = (
        reference.dequantize_fp8(q.values, q.scales, problem.np_dtype) for q in (got, want)
    )
    assert_rows_equal(*for_reading, problem)
    assert_rows_equal(values, want.values, problem)
    _assert_same_shape_and_dtype(scales, want.scales)
    held = problem.plan.row_source >= 0 if not problem.zero_fill else ...
    np.testing.assert_array_equal(bits(scales[held]), bits(want.scales[held]), "scales")


def assert_sums_equal(got: np.ndarray, want: np.ndarray, problem: EpProblem) -> None:
    """Sums `[R, T, H]` agree bit by bit."""
    got, want = np.asarray(got), np.asarray(want)
    _assert_same_shape_and_dtype(got, want)
    assert np.array_equal(bits(got), bits(want)), describe_differing_sums(got, want, problem)
