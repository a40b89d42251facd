# SPDX-License-Identifier: Apache-2.0
"""The problems that ranks on GPUs run: all named ones, and larger ones."""

from typing import Any

from ep_launch.ranks import Case
from ep_testing.problems import PROBLEMS, EpProblem
from ep_testing.rank_cases import case_of
from ep_testing.rank_programs import exchange, gradients, moe
from jax_ep._src import limits

FP8 = "float8_e4m3fn"


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
        wire_dtype=FP8,
        recv_capacity=340,
    ),
    *_in_both_layouts(
        "fp8_rows_7168",
        num_tokens=40,
        hidden=7168,
        dtype="bfloat16",
        wire_dtype=FP8,
        recv_dtype=FP8,
        recv_capacity=340,
    ),
    *_in_both_layouts("fp8_8191", num_tokens=9, hidden=8191, dtype="float32", wire_dtype=FP8),
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


def problem_cases(num_ranks: int, **changes: Any) -> list[Case]:
    """Exchanges, gradients and layers of the problems of so many ranks.

    `changes` are fields that all of them get.
    """
    differentiated = [n for name in DIFFERENTIATED for n in (name, f"{name}_by_rank")]
    problems = {
        exchange: [*PROBLEMS.values(), *LARGER],
        gradients: [PROBLEMS[name] for name in differentiated],
        moe: [PROBLEMS[name] for name in BLOCKS],
    }
    return [
        case_of(function, problem.replace(**changes))
        for function, of_function in problems.items()
        for problem in of_function
        if problem.num_ranks == num_ranks
    ]


def low_latency_cases(num_ranks: int, **changes: Any) -> list[Case]:
    """The same, of groups whose low-latency kernels serve all calls that they can.

    Gradients and odd rows come between.
    """
    cases = []
    for case in problem_cases(num_ranks, **changes):
        problem = case.kwargs["problem"]
        most = limits.MAX_LOW_LATENCY_SELECTIONS // (num_ranks * problem.num_topk)
        tokens = min(problem.tokens_limit, limits.MAX_LOW_LATENCY_TOKENS, most)
        cases.append(case_of(case.function, problem.replace(low_latency_tokens=tokens)))
    return cases
