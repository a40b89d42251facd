# SPDX-License-Identifier: Apache-2.0
"""On a GPU, ranks get the oracle's bits and the CPU backend's, for every named problem and more."""

import pytest

from ep_launch.placement import Placement
from ep_launch.ranks import Case, failure_report, stacked
from ep_testing import large_shape
from ep_testing.rank_cases import case_of, check_cases
from ep_testing.rank_problems import FP8, problem_cases
from jax_ep._src import limits

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(540)]


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 6, 8])
def test_ranks_get_the_oracles_bits(num_ranks, on_ranks):
    check_cases(on_ranks, problem_cases(num_ranks), num_ranks)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 6, 8])
def test_low_latency_kernels_give_the_oracles_bits(num_ranks, on_ranks):
    """Where they serve a problem; gradients and odd rows come between."""
    cases = []
    for case in problem_cases(num_ranks):
        problem = case.kwargs["problem"]
        most = limits.MAX_LOW_LATENCY_SELECTIONS // (num_ranks * problem.num_topk)
        tokens = min(problem.tokens_limit, limits.MAX_LOW_LATENCY_TOKENS, most)
        cases.append(case_of(case.function, problem.replace(low_latency_tokens=tokens)))
    check_cases(on_ranks, cases, num_ranks)


@pytest.mark.parametrize("num_ranks", Placement.chosen().numbers_of_ranks())
def test_deepseek_v3s_shape(num_ranks, on_ranks):
    variants = [("expert", None), ("rank", None), ("expert", FP8)]
    cases = [
        Case(f"{layout}, {wire}", large_shape.run, {"layout": layout, "wire_dtype": wire})
        for layout, wire in variants
    ]
    runs = on_ranks(cases, num_ranks=num_ranks)
    assert failure_report(runs, cases) is None, failure_report(runs, cases)
    for index, (layout, wire) in enumerate(variants):
        large_shape.check(stacked(runs, index), layout, wire)
