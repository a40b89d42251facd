# SPDX-License-Identifier: Apache-2.0
"""Named problems: what every backend and the oracle are compared on, and how to read a failure.

Every element of the payload says which token of which rank it belongs to, so that a test can
report "holds token 3 of rank 1, expected token 0 of rank 2" instead of a largest difference.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from jax_ep import reference

Table = tuple[tuple[tuple[int, ...], ...], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EpProblem:
    """Sizes, formats and routing of one exchange among all ranks; makes its own arrays.

    Attributes:
        name: also the id of the test.
        num_ranks: `R`.
        num_tokens: `T` of the call, on every rank.
        hidden: `H`.
        num_topk: `K`.
        num_experts: `E`.
        layout: "expert" or "rank".
        dtype: name of the dtype of token rows.
        wire_dtype: None or "float8_e4m3fn".
        recv_dtype: None or "float8_e4m3fn", with the same `wire_dtype`.
        recv_capacity: rows; None: the worst case; "exact": as many as the fullest rank needs;
            "one_short": one fewer.
        capacity_factor: of the config.
        expert_alignment: rows.
        drop: of the config.
        pad_experts: of the config.
        zero_fill: of the config.
        routing: key of `ROUTINGS`, or "table".
        table: `topk_idx` of all ranks, written out; with routing "table".
        max_tokens_per_rank: None: `num_tokens`, and at least 1.
        low_latency_tokens: of the config.
        domain_size: of the config.
        seed: of everything random.
    """

    name: str
    num_ranks: int = 2
    num_tokens: int = 4
    hidden: int = 8
    num_topk: int = 2
    num_experts: int = 4
    layout: str = "expert"
    dtype: str = "float32"
    wire_dtype: str | None = None
    recv_dtype: str | None = None
    recv_capacity: int | str | None = None
    capacity_factor: float | None = None
    expert_alignment: int = 1
    drop: str = "rows"
    pad_experts: bool = False
    zero_fill: bool = True
    routing: str = "uniform"
    table: Table | None = None
    max_tokens_per_rank: int | None = None
    low_latency_tokens: int | None = None
    domain_size: int | None = None
    seed: int = 0

    def __str__(self) -> str:
        return self.name

    def replace(self, **fields: Any) -> "EpProblem":
        """This problem with other fields."""
        return dataclasses.replace(self, **fields)

    @property
    def np_dtype(self) -> np.dtype:
        """The dtype of token rows."""
        return np.dtype(self.dtype if self.dtype != "bfloat16" else ml_dtypes.bfloat16)

    @property
    def tokens_limit(self) -> int:
        """`max_tokens_per_rank` of the config."""
        return self.max_tokens_per_rank or max(self.num_tokens, 1)

    @functools.cached_property
    def capacity(self) -> int | None:
        """`recv_capacity` of the config."""
        if not isinstance(self.recv_capacity, str):
            return self.recv_capacity
        sizes = {**self._plan_sizes(), "capacity_factor": None}
        unlimited = reference.plan(self.topk_idx, **sizes)
        fullest = int(unlimited.group_sizes.sum(axis=1).max())
        return max(1, {"exact": fullest, "one_short": fullest - 1}[self.recv_capacity])

    def _plan_sizes(self) -> dict[str, Any]:
        # Only what differs: `reference.moe` takes neither.
        policies: dict[str, Any] = {"drop": self.drop} if self.drop != "rows" else {}
        policies |= {"pad_experts": True} if self.pad_experts else {}
        return {
            "num_experts": self.num_experts,
            "layout": self.layout,
            "capacity_factor": self.capacity_factor,
            "expert_alignment": self.expert_alignment,
            **policies,
        }

    def plan_kwargs(self) -> dict[str, Any]:
        """Keyword arguments of `reference.plan`."""
        return {**self._plan_sizes(), "recv_capacity": self.capacity}

    def dispatch_kwargs(self) -> dict[str, Any]:
        """Keyword arguments of `reference.dispatch`."""
        fp8 = {None: None, "float8_e4m3fn": ml_dtypes.float8_e4m3fn}
        return {
            **self.plan_kwargs(),
            "dtype": self.np_dtype,
            "wire_dtype": fp8[self.wire_dtype],
            "recv_dtype": fp8[self.recv_dtype],
        }

    def config_kwargs(self) -> dict[str, Any]:
        """Keyword arguments of `jax_ep.EpConfig`."""
        return {
            **self.dispatch_kwargs(),
            "num_topk": self.num_topk,
            "hidden": self.hidden,
            "max_tokens_per_rank": self.tokens_limit,
            "low_latency_tokens": self.low_latency_tokens,
            "domain_size": self.domain_size,
            "zero_fill": self.zero_fill,
        }

    @functools.cached_property
    def topk_idx(self) -> np.ndarray:
        """`[R, T, K]` int32."""
        shape = (self.num_ranks, self.num_tokens, self.num_topk)
        if self.routing == "table":
            return np.array(self.table, np.int32).reshape(shape)
        idx = np.empty(shape, np.int32)
        rng = np.random.default_rng(self.seed)
        for rank, token in np.ndindex(shape[:2]):
            idx[rank, token] = ROUTINGS[self.routing](self, rng, rank * self.num_tokens + token)
        return idx

    @functools.cached_property
    def topk_weights(self) -> np.ndarray:
        """`[R, T, K]` float32, all bits in use; not 0 where nothing is selected."""
        rng = np.random.default_rng(self.seed + 1)
        return rng.uniform(0.05, 1.0, self.topk_idx.shape).astype(np.float32)

    @functools.cached_property
    def x(self) -> np.ndarray:
        """`[R, T, H]` in `dtype`: the payload; for an FP8 wire, blocks of very different size."""
        shape = (self.num_ranks, self.num_tokens, self.hidden)
        if self.wire_dtype is None:
            number = np.arange(self.num_ranks * self.num_tokens).reshape(*shape[:2], 1)
            return payload(number, np.arange(self.hidden)).astype(self.np_dtype)
        rng = np.random.default_rng(self.seed + 2)
        num_blocks = -(-self.hidden // 128)
        sizes = 10.0 ** rng.integers(-3, 4, (*shape[:2], num_blocks))
        # Zeros, and blocks so small that the floor under the scale matters.
        sizes *= rng.choice([1.0, 0.0, 1e-3], sizes.shape, p=[0.8, 0.1, 0.1])
        sizes = np.repeat(sizes, 128, axis=-1)[..., : self.hidden]
        return (rng.standard_normal(shape) * sizes).astype(np.float32).astype(self.np_dtype)

    @functools.cached_property
    def plan(self) -> reference.Plan:
        """The oracle's plan."""
        return reference.plan(self.topk_idx, **self.plan_kwargs())

    @functools.cached_property
    def dispatched(self) -> reference.Dispatched:
        """What the oracle receives."""
        return reference.dispatch(
            self.x, self.topk_idx, self.topk_weights, **self.dispatch_kwargs()
        )

    def random(self, shape: Sequence[int], *, salt: int) -> np.ndarray:
        """Normal random numbers in `dtype`; `salt` tells several arrays of a test apart."""
        rng = np.random.default_rng([self.seed, salt])
        return rng.standard_normal(tuple(shape)).astype(np.float32).astype(self.np_dtype)

    def expert_outputs(self, *, poison: bool = True) -> np.ndarray:
        """`[R, C, H]` random rows for combine; NaN in rows that hold no token, with `poison`."""
        y = self.random((self.num_ranks, self.plan.capacity, self.hidden), salt=3)
        if poison:
            y[self.plan.row_source < 0] = np.nan
        return y


def payload(number: Any, column: Any) -> np.ndarray:
    """The value of a token in a column: exact in bfloat16 and float16, never 0, up to 1024 tokens.

    Tokens of one column differ from each other in all cases. The offset is quadratic in the column,
    so that a row moved sideways looks like no single token.
    """
    number, column = np.asarray(number), np.asarray(column)
    if number.size and number.max() >= 1024:
        raise ValueError(f"the payload tells 1024 tokens apart; this is token {number.max()}")
    mantissa = 128 + (number + column * (column + 1) // 2) % 128
    sign = 1 - 2 * ((number + column) % 2)
    return sign * mantissa * np.exp2(number // 128 - 7.0)


def _pick(
    problem: EpProblem, rng: np.random.Generator, experts: Sequence[int], p: Any = None
) -> np.ndarray:
    """`K` different ones of `experts`, and -1 where there are not enough."""
    picked = np.full(problem.num_topk, -1)
    count = min(problem.num_topk, len(experts))
    picked[:count] = rng.choice(experts, count, replace=False, p=p)
    return rng.permutation(picked)


def _uniform(problem: EpProblem, rng: np.random.Generator, token: int) -> np.ndarray:
    return _pick(problem, rng, range(problem.num_experts))


def _zipf(problem: EpProblem, rng: np.random.Generator, token: int) -> np.ndarray:
    share = 1.0 / np.arange(1, problem.num_experts + 1)
    # Popular experts on every rank, instead of all of them on the first one.
    order = np.random.default_rng(problem.seed).permutation(problem.num_experts)
    return _pick(problem, rng, order, share / share.sum())


def _only(problem: EpProblem, expert: int, token: int) -> np.ndarray:
    picked = np.full(problem.num_topk, -1)
    picked[token % problem.num_topk] = expert
    return picked


def _masked_half(problem: EpProblem, rng: np.random.Generator, token: int) -> np.ndarray:
    is_masked = (rng.random(problem.num_topk) < 0.5) | (token % 4 == 3)
    return np.where(is_masked, -1, _uniform(problem, rng, token))


def _experts_of(problem: EpProblem, rank: int) -> range:
    num_local = -(-problem.num_experts // problem.num_ranks)
    return range(rank * num_local, min((rank + 1) * num_local, problem.num_experts))


def _empty_rank(problem: EpProblem, rng: np.random.Generator, token: int) -> np.ndarray:
    empty = _experts_of(problem, problem.num_ranks // 2)
    return _pick(problem, rng, [e for e in range(problem.num_experts) if e not in empty])


ROUTINGS = {
    "uniform": _uniform,
    "zipf": _zipf,
    "one_hot": lambda problem, rng, token: _only(problem, problem.num_experts // 2, token),
    "last_expert_only": lambda problem, rng, token: _only(problem, problem.num_experts - 1, token),
    "masked_half": _masked_half,
    "all_masked": lambda problem, rng, token: np.full(problem.num_topk, -1),
    "empty_rank": _empty_rank,
    "all_to_one_rank": lambda problem, rng, token: _pick(
        problem, rng, _experts_of(problem, problem.num_ranks - 1)
    ),
}


def _in_both_layouts(name: str, **fields: Any) -> list[EpProblem]:
    return [
        EpProblem(name=name, layout="expert", **fields),
        EpProblem(name=f"{name}_by_rank", layout="rank", **fields),
    ]


_WIDE = {"num_ranks": 4, "num_experts": 8, "num_tokens": 8}


def _problems_of_sizes() -> list[EpProblem]:
    """Ranks, tokens, experts, and who selects what."""
    both, wide = _in_both_layouts, _WIDE
    return [
        *both("tiny"),
        *both("no_tokens", num_tokens=0, max_tokens_per_rank=4),
        *both("no_tokens_but_rows", num_tokens=0, recv_capacity=5),
        *both("one_token", num_tokens=1, num_ranks=4),
        *both("fewer_tokens", num_tokens=3, max_tokens_per_rank=7),
        *both("low_latency", num_tokens=3, max_tokens_per_rank=7, low_latency_tokens=4),
        *both("topk_1", num_topk=1, **wide),
        *both("topk_all", num_topk=8, **wide),
        *both("one_rank", num_ranks=1),
        *both("one_expert_per_rank", num_ranks=4, num_experts=4),
        *both("three_ranks", num_ranks=3, num_experts=9, num_topk=4, num_tokens=5),
        *both("six_ranks", num_ranks=6, num_experts=12, num_topk=3, num_tokens=5),
        *both("eight_ranks", num_ranks=8, num_experts=16, num_topk=4, num_tokens=6, routing="zipf"),
        *both("domains", num_ranks=4, num_experts=8, num_topk=4, num_tokens=6, domain_size=2),
        *both(
            "domains_of_three",
            num_ranks=6,
            num_experts=12,
            num_topk=5,
            num_tokens=5,
            domain_size=3,
            dtype="bfloat16",
        ),
        *both("empty_rank", num_topk=3, routing="empty_rank", **wide),
        *both("one_hot", num_topk=3, routing="one_hot", **wide),
        *both("all_to_one_rank", num_topk=3, routing="all_to_one_rank", **wide),
        *both("last_expert_only", routing="last_expert_only", **wide),
        *both("all_masked", routing="all_masked", **wide),
        *both("masked_half", num_topk=4, routing="masked_half", **wide),
    ]


def _problems_of_capacity() -> list[EpProblem]:
    """Rows of the receive buffer, and alignment."""
    both, wide = _in_both_layouts, _WIDE
    return [
        *both("capacity_exact", recv_capacity="exact", routing="zipf", **wide),
        *both("capacity_one_short", recv_capacity="one_short", routing="zipf", **wide),
        *both("capacity_1", recv_capacity=1, **wide),
        *both("capacity_ample", recv_capacity=200, num_topk=1, num_tokens=5),
        *both("capacity_factor", capacity_factor=1.25, max_tokens_per_rank=20, **wide),
        *both("capacity_factor_small", capacity_factor=0.3, routing="zipf", **wide),
        *both("one_hot_drops", num_topk=1, routing="one_hot", recv_capacity=5, **wide),
        EpProblem(name="alignment_8", expert_alignment=8, routing="zipf", **wide),
        EpProblem(name="alignment_8_factor", expert_alignment=8, capacity_factor=0.6, **wide),
        EpProblem(name="alignment_128", expert_alignment=128, num_tokens=6),
        EpProblem(name="alignment_3", expert_alignment=3, routing="masked_half", **wide),
        EpProblem(
            name="alignment_8_exact", expert_alignment=8, recv_capacity="exact", num_topk=3, **wide
        ),
        EpProblem(
            name="alignment_8_drops", expert_alignment=8, recv_capacity=13, num_topk=4, **wide
        ),
    ]


def _problems_of_rows() -> list[EpProblem]:
    """Length of a row, dtypes, and the wire; then models' proportions."""
    both, wide = _in_both_layouts, _WIDE
    fp8 = "float8_e4m3fn"
    rows = {"wire_dtype": fp8, "recv_dtype": fp8}
    return [
        *both("hidden_1", hidden=1, dtype="bfloat16"),
        *both("hidden_7", hidden=7, dtype="bfloat16", **wide),
        *both("hidden_20", hidden=20, dtype="float16"),
        *both("hidden_33", hidden=33),
        *both("bfloat16", hidden=64, dtype="bfloat16", num_topk=4, **wide),
        *both("float16", hidden=64, dtype="float16", num_topk=4, **wide),
        *both("float32", hidden=64, dtype="float32", num_topk=4, **wide),
        *both("no_zero_fill", zero_fill=False, recv_capacity=19, dtype="bfloat16", **wide),
        *both("fp8", hidden=256, dtype="bfloat16", wire_dtype=fp8, **wide),
        *both("fp8_float32", hidden=200, dtype="float32", wire_dtype=fp8, **wide),
        *both("fp8_float16", hidden=129, dtype="float16", wire_dtype=fp8, **wide),
        *both("fp8_hidden_1", hidden=1, dtype="bfloat16", wire_dtype=fp8),
        *both("fp8_rows", hidden=256, dtype="bfloat16", **rows, **wide),
        *both("fp8_rows_float32", hidden=200, recv_capacity=19, **rows, **wide),
        *both("fp8_rows_float16", hidden=129, dtype="float16", routing="masked_half", **rows),
        *both("fp8_rows_hidden_1", hidden=1, dtype="bfloat16", **rows),
        *both("fp8_rows_no_tokens", hidden=144, num_tokens=0, max_tokens_per_rank=4, **rows),
        *both(
            "fp8_rows_no_zero_fill", hidden=272, zero_fill=False, recv_capacity=19, **rows, **wide
        ),
        EpProblem(name="fp8_rows_alignment_8", hidden=48, expert_alignment=8, **rows, **wide),
        *both("mixtral", num_ranks=4, num_tokens=16, hidden=64, num_experts=8, dtype="bfloat16"),
        *both(
            "deepseek",
            num_ranks=8,
            num_tokens=8,
            hidden=128,
            num_topk=8,
            num_experts=32,
            dtype="bfloat16",
            routing="zipf",
        ),
    ]


PROBLEMS = {
    problem.name: problem
    for problem in (*_problems_of_sizes(), *_problems_of_capacity(), *_problems_of_rows())
}


def params(*names: str) -> list[Any]:
    """`pytest.param`s of the named problems, or of all."""
    return [pytest.param(PROBLEMS[name], id=name) for name in names or PROBLEMS]
