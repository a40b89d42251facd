# SPDX-License-Identifier: Apache-2.0
"""On a GPU, ranks get the oracle's bits and the CPU backend's, for every named problem and more."""

import pytest

from ep_launch.placement import Placement
from ep_launch.ranks import Case, failure_report, stacked
from ep_testing import large_shape
from ep_testing.problems import PROBLEMS, EpProblem
from ep_testing.rank_cases import case_of, check_cases
from ep_testing.rank_programs import exchange, gradients, moe
from jax_ep._src import limits

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(540)]

_FP8 = "float8_e4m3fn"


def _in_both_layouts(name: str, num_topk: int = 8, **fields) -> list[EpProblem]:
    problem = EpProblem(name=name, num_ranks=8, num_experts=64, num_topk=num_topk, **fields)
    return [problem, problem.replace(name=f"{name}_by_rank", layout="rank")]


# Larger than what the oracle can do for all backends on each commit.
LARGER = [
    *_in_both_layouts(
        "hidden_8192", num_tokens=40, hidden=8192, dtype="bfloat16", recv_capacity=340
    ),
    *_in_both_layouts("hidden_8191", num_tokens=9, hidden=8191, dtype="float32", routing="zipf"),
    *_in_both_layouts(
        "hidden_4097", num_tokens=33, hidden=4097, dtype="float16", recv_capacity=280
    ),
    *_in_both_layouts(
        "fp8_7168",
        num_tokens=40,
        hidden=7168,
        dtype="bfloat16",
        wire_dtype=_FP8,
        recv_capacity=340,
    ),
    *_in_both_layouts(
        "fp8_rows_7168",
        num_tokens=40,
        hidden=7168,
        dtype="bfloat16",
        wire_dtype=_FP8,
        recv_dtype=_FP8,
        recv_capacity=340,
    ),
    *_in_both_layouts("fp8_8191", num_tokens=9, hidden=8191, dtype="float32", wire_dtype=_FP8),
    *_in_both_layouts("many_tokens", num_tokens=128, hidden=24, dtype="bfloat16", routing="zipf"),
    *_in_both_layouts("many_masked", num_tokens=127, hidden=33, routing="masked_half"),
    *_in_both_layouts("one_rank_only", num_tokens=128, hidden=16, routing="all_to_one_rank"),
    *_in_both_layouts("many_dropped", num_tokens=100, hidden=16, recv_capacity=300),
    *_in_both_layouts("topk_32", num_topk=32, num_tokens=30, hidden=72, dtype="bfloat16"),
]
DIFFERENTIATED = ("tiny", "masked_half", "capacity_one_short", "deepseek", "three_ranks", "fp8")
BLOCKS = (
    *("three_ranks", "alignment_8_drops", "no_zero_fill", "hidden_20", "fp8_float32"),
    *("fp8_rows", "fp8_rows_no_zero_fill"),
)


def _cases(num_ranks: int) -> list[Case]:
    problems = [*PROBLEMS.values(), *LARGER]
    blocks = [PROBLEMS[name] for name in BLOCKS]
    differentiated = [PROBLEMS[n] for name in DIFFERENTIATED for n in (name, f"{name}_by_rank")]
    return [
        *(case_of(exchange, p) for p in problems if p.num_ranks == num_ranks),
        *(case_of(gradients, p) for p in differentiated if p.num_ranks == num_ranks),
        *(case_of(moe, p) for p in blocks if p.num_ranks == num_ranks),
    ]


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 6, 8])
def test_ranks_get_the_oracles_bits(num_ranks, on_ranks):
    check_cases(on_ranks, _cases(num_ranks), num_ranks)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 6, 8])
def test_low_latency_kernels_give_the_oracles_bits(num_ranks, on_ranks):
    """Where they serve a problem; gradients and odd rows come between."""
    cases = []
    for case in _cases(num_ranks):
        problem = case.kwargs["problem"]
        most = limits.MAX_LOW_LATENCY_SELECTIONS // (num_ranks * problem.num_topk)
        tokens = min(problem.tokens_limit, limits.MAX_LOW_LATENCY_TOKENS, most)
        cases.append(case_of(case.function, problem.replace(low_latency_tokens=tokens)))
    check_cases(on_ranks, cases, num_ranks)


@pytest.mark.parametrize("num_ranks", Placement.chosen().numbers_of_ranks())
def test_deepseek_v3s_shape(num_ranks, on_ranks):
    variants = [("expert", None), ("rank", None), ("expert", _FP8)]
    cases = [
        Case(f"{layout}, {wire}", large_shape.run, {"layout": layout, "wire_dtype": wire})
        for layout, wire in variants
    ]
    runs = on_ranks(cases, num_ranks=num_ranks)
    assert failure_report(runs, cases) is None, failure_report(runs, cases)
    for index, (layout, wire) in enumerate(variants):
        large_shape.check(stacked(runs, index), layout, wire)
