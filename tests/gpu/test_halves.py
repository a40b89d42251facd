# SPDX-License-Identifier: Apache-2.0
"""Exchanges in halves: the bits of those in one piece, and no SM is held between the halves."""

import os

import numpy as np
import pytest

from ep_launch.placement import Placement
from ep_launch.ranks import failure_report
from ep_testing.halves import PROBLEM
from ep_testing.rank_cases import case_of, check_cases
from ep_testing.rank_halves import in_halves, product_between_halves

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(540)]

LOW_LATENCY = PROBLEM.replace(
    num_tokens=7, max_tokens_per_rank=24, low_latency_tokens=8, hidden=128, num_experts=16
)
MOST_SLOWER = 1.05


@pytest.mark.parametrize("num_ranks", Placement.chosen().numbers_of_ranks())
def test_halves_have_the_bits_of_one_piece(num_ranks, on_ranks):
    problem = LOW_LATENCY.replace(num_ranks=num_ranks)
    variants = [
        problem,
        problem.replace(layout="rank", dtype="bfloat16"),
        problem.replace(hidden=512, dtype="bfloat16", wire_dtype="float8_e4m3fn"),
        problem.replace(num_tokens=20),  # in one piece: too many for the kernels of halves
    ]
    check_cases(on_ranks, [case_of(in_halves, p) for p in variants], num_ranks)


@pytest.mark.skipif(
    Placement.chosen() is Placement.ONE_PROCESS,
    reason="one process launches all ranks' kernels together: `make gpu` has one for each rank",
)
def test_a_product_between_the_halves_has_all_sms(on_ranks):
    """A flight waits for a rank that has not begun; products beside it are as fast as alone."""
    problem = LOW_LATENCY.replace(num_ranks=2, hidden=7168, dtype="bfloat16")
    arguments = {"size": 8192, "count": 20, "late_s": 5.0, "trace": os.environ.get("JAX_EP_TRACE")}
    case = case_of(product_between_halves, problem, **arguments)
    runs = on_ranks([case], num_ranks=2)
    assert failure_report(runs, [case]) is None, failure_report(runs, [case])
    first, second = (run.outcomes[0].value for run in runs)
    assert first["differ"] == second["differ"] == 0
    assert first["early"] > 0, "the other rank had begun: the products were late"
    alone, between = np.median(first["alone"]), np.median(first["between"])
    print(f"product of 8192: alone {alone * 1e3:.3f} ms, between halves {between * 1e3:.3f} ms")
    assert between <= MOST_SLOWER * alone
