# SPDX-License-Identifier: Apache-2.0
"""On a GPU, ranks get the oracle's bits and the CPU backend's, for every named problem and more."""

import pytest

from ep_launch.placement import Placement
from ep_launch.ranks import Case, failure_report, stacked
from ep_testing import large_shape
from ep_testing.rank_cases import check_cases
from ep_testing.rank_problems import FP8, low_latency_cases, problem_cases

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(540)]


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 6, 8])
def test_ranks_get_the_oracles_bits(num_ranks, on_ranks):
    check_cases(on_ranks, problem_cases(num_ranks), num_ranks)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 6, 8])
def test_low_latency_kernels_give_the_oracles_bits(num_ranks, on_ranks):
    check_cases(on_ranks, low_latency_cases(num_ranks), num_ranks)


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
