# SPDX-License-Identifier: Apache-2.0
"""On a GPU, calls whose mask of ranks changes get the CPU backend's bits, also in CUDA graphs."""

import numpy as np
import pytest

from ep_launch.placement import Placement
from ep_testing.graph_flags import DEFAULT, GRAPHS
from ep_testing.problems import EpProblem
from ep_testing.rank_cases import case_of, check_cases
from ep_testing.rank_masks import masked_calls

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(540)]


@pytest.mark.parametrize("flags", [DEFAULT, GRAPHS], ids=["default", "graphs"])
@pytest.mark.parametrize("num_ranks", Placement.chosen().numbers_of_ranks())
def test_masks_that_change_from_call_to_call(num_ranks, flags, on_ranks):
    def run(cases, **kwargs):
        return on_ranks(cases, environment={"XLA_FLAGS": flags}, **kwargs)

    problems = [
        EpProblem(
            name=f"{layout}, low latency {tokens}", num_ranks=num_ranks, num_tokens=24, num_topk=3,
            num_experts=4 * num_ranks, hidden=64, layout=layout, low_latency_tokens=tokens,
        )
        for layout in ("expert", "rank")
        for tokens in (0, 24)
    ]  # fmt: skip
    masks = np.random.default_rng(1).random((24, num_ranks)) < 0.6
    masks[0], masks[1] = False, True
    masks[2] = np.arange(num_ranks) == 1
    check_cases(run, [case_of(masked_calls, p, masks=masks) for p in problems], num_ranks)
