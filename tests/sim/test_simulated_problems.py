# SPDX-License-Identifier: Apache-2.0
"""The kernels, on the simulator, give the oracle's bits on every named problem; see `make sim`."""

import ctypes
import functools
import os
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

from ep_testing import assertions
from ep_testing.oracle_checks import assert_matches_oracle
from ep_testing.problems import PROBLEMS, EpProblem, params
from jax_ep import reference

LIBRARY = os.environ.get("JAX_EP_SIMULATED_EXCHANGE")

pytestmark = [
    pytest.mark.sim,
    pytest.mark.skipif(LIBRARY is None, reason="needs the simulator: `make sim` runs it"),
]

CALLS = 2  # of every problem, on the same heaps
SEEDS = (1, 2)
DOMAINS = ("domains", "domains_of_three")
# About a number of ranks, which is theirs.
OF_THEIR_RANKS = {
    name + layout
    for name in ("one_rank", "three_ranks", "six_ranks", "eight_ranks", *DOMAINS)
    for layout in ("", "_by_rank")
}
FORMATS = ("dtype", "quantized")

# The arrays, in the order of the C structure.
OPERANDS = ("topk_idx", "topk_weights", "x", "x_scales", "y")
PLANNED = ("slot", "row_source", "row_topk_idx", "group_sizes", "tokens_per_expert", "num_dropped")
COMBINED = ("weighted", "unweighted", "returned_weights")
RESULTS = (*PLANNED, "rows", "rows_scales", "row_weights", *COMBINED)


class SimulatedExchange(ctypes.Structure):
    """As in csrc/testing/simulated_exchange.h."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("num_ranks", "num_experts", "num_topk")),
        *((name, ctypes.c_int32) for name in ("expert_alignment", "layout", "dtype", "wire")),
        *((name, ctypes.c_int32) for name in ("x_format", "rows_format", "zero_fill")),
        *((name, ctypes.c_int32) for name in ("calls", "blocks", "tail_blocks", "domain_size")),
        *((name, ctypes.c_int64) for name in ("num_tokens", "max_tokens", "capacity", "hidden")),
        ("seed", ctypes.c_uint64),
        *((name, ctypes.c_void_p) for name in OPERANDS + RESULTS),
    ]


@functools.cache
def simulate():
    """The entry point of the shared library."""
    function = ctypes.CDLL(LIBRARY).jax_ep_simulate
    function.argtypes = [ctypes.POINTER(SimulatedExchange)]
    function.restype = ctypes.c_char_p
    return function


def operands(problem: EpProblem, x_format: str) -> dict[str, np.ndarray]:
    """What all ranks bring, `[R, ...]`."""
    x, x_scales = problem.x, np.empty(0, np.float32)
    if x_format == "quantized":
        x, x_scales = reference.quantize_fp8(x)
    arrays = (problem.topk_idx, problem.topk_weights, x, x_scales, problem.expert_outputs())
    return dict(zip(OPERANDS, map(np.ascontiguousarray, arrays), strict=True))


def empty_results(problem: EpProblem, rows_format: str) -> dict[str, np.ndarray]:
    """Arrays of the results of all calls, `[CALLS, R, ...]`."""
    plan, hidden = problem.plan, problem.hidden
    quantized = rows_format == "quantized"

    def like(array: np.ndarray) -> np.ndarray:
        return np.empty((CALLS, *array.shape), array.dtype)

    def rows(columns: int, dtype: np.typing.DTypeLike) -> np.ndarray:
        return np.empty((CALLS, *plan.row_source.shape, columns), dtype)

    return {
        **{name: like(getattr(plan, name)) for name in PLANNED if name != "row_topk_idx"},
        "row_topk_idx": rows(problem.num_topk if problem.layout == "rank" else 0, np.int32),
        "rows": rows(hidden, ml_dtypes.float8_e4m3fn if quantized else problem.np_dtype),
        "rows_scales": rows(-(-hidden // 128) if quantized else 0, np.float32),
        "row_weights": like(problem.dispatched.weights),
        "weighted": like(problem.x),
        "unweighted": like(problem.x),
        "returned_weights": like(problem.topk_weights),
    }


def run(
    problem: EpProblem, seed: int, x_format: str = "dtype", rows_format: str = "dtype"
) -> list[SimpleNamespace]:
    """Runs a problem; the results of each call."""
    brought = operands(problem, x_format)
    results = empty_results(problem, rows_format)
    exchange = SimulatedExchange(
        num_ranks=problem.num_ranks,
        num_experts=problem.num_experts,
        num_topk=problem.num_topk,
        expert_alignment=problem.expert_alignment,
        layout=("expert", "rank").index(problem.layout),
        dtype=("float32", "bfloat16", "float16").index(problem.dtype),
        wire=(None, "float8_e4m3fn").index(problem.wire_dtype),
        x_format=FORMATS.index(x_format),
        rows_format=FORMATS.index(rows_format),
        zero_fill=problem.zero_fill,
        calls=CALLS,
        blocks=1 + seed % 3,
        tail_blocks=seed % 2,
        domain_size=problem.domain_size or 0,
        num_tokens=problem.num_tokens,
        max_tokens=problem.tokens_limit,
        capacity=problem.plan.capacity,
        hidden=problem.hidden,
        seed=seed,
        **{name: array.ctypes.data for name, array in (brought | results).items()},
    )
    report = simulate()(ctypes.byref(exchange)).decode()
    assert not report, f"{problem.name}, R {problem.num_ranks}, seed {seed}:\n{report}"
    return [
        SimpleNamespace(**{name: array[call] for name, array in results.items()})
        for call in range(CALLS)
    ]


def as_exchanged(problem: EpProblem, got: SimpleNamespace) -> SimpleNamespace:
    """The results of a call, as backends give them."""
    in_fp8 = problem.recv_dtype is not None
    received = SimpleNamespace(
        handle=SimpleNamespace(slot=got.slot, row_source=got.row_source),
        x=reference.QuantizedRows(got.rows, got.rows_scales) if in_fp8 else got.rows,
        weights=got.row_weights,
        topk_idx=got.row_topk_idx if problem.layout == "rank" else None,
        group_sizes=got.group_sizes,
        tokens_per_expert=got.tokens_per_expert,
        num_dropped=got.num_dropped,
    )
    return SimpleNamespace(received=received, weighted=got.weighted, unweighted=got.unweighted)


def at_ranks(problem: EpProblem, num_ranks: int) -> EpProblem:
    """The problem on another number of ranks; enough experts for its selections."""
    per_rank = problem.num_experts // problem.num_ranks
    per_rank = max(per_rank, -(-problem.num_topk // num_ranks))
    return problem.replace(num_ranks=num_ranks, num_experts=num_ranks * per_rank)


def at_all_ranks() -> list:
    """All named problems at their own number of ranks, and the others at more."""
    cases = []
    for name, problem in PROBLEMS.items():
        others = () if name in OF_THEIR_RANKS else (1, 2, 3, 4, 8)
        for num_ranks in sorted({problem.num_ranks, *others}):
            case = at_ranks(problem, num_ranks)
            cases.append(pytest.param(case, id=f"{name}-R{num_ranks}"))
    return cases


@pytest.mark.parametrize("problem", at_all_ranks())
def test_the_kernels_give_the_oracles_bits(problem):
    plan = problem.plan
    returned = reference.combine_scalars(plan, problem.dispatched.weights)
    rows_format = "dtype" if problem.recv_dtype is None else "quantized"
    for seed in SEEDS:
        for got in run(problem, seed, rows_format=rows_format):
            assert_matches_oracle(problem, as_exchanged(problem, got), "ffi")
            np.testing.assert_array_equal(got.returned_weights, returned, "returned_weights")
            if not problem.zero_fill:  # as they were before: all bits set
                for part in (got.rows, got.rows_scales):
                    assert (assertions.bits(part[plan.row_source < 0]) + 1 == 0).all()


@pytest.mark.parametrize(
    ("x_format", "rows_format"),
    [("quantized", "dtype"), ("dtype", "quantized"), ("quantized", "quantized")],
)
@pytest.mark.parametrize(
    "problem", params(*(name for name in PROBLEMS if "fp8" in name and "rows" not in name))
)
def test_rows_come_and_go_quantized(problem, x_format, rows_format):
    values, scales = reference.quantize_fp8(problem.x)
    source = problem.plan.row_source
    for got in run(problem, 1, x_format, rows_format):
        if rows_format == "dtype":
            assertions.assert_rows_equal(got.rows, problem.dispatched.x, problem)
            continue
        for result, sent in ((got.rows, values), (got.rows_scales, scales)):
            want = sent.reshape(-1, sent.shape[-1])[source]
            want[source < 0] = 0
            np.testing.assert_array_equal(assertions.bits(result), assertions.bits(want))
