# SPDX-License-Identifier: Apache-2.0
"""The oracle where ranks did not get each other's data."""

import numpy as np
import pytest

from ep_testing.missing_ranks import PROBLEM, came, expert_outputs, missing_of
from jax_ep import reference

CASES = {
    "expert": PROBLEM,
    "rank": PROBLEM.replace(layout="rank"),
    "drops": PROBLEM.replace(recv_capacity=6, expert_alignment=2),
}
NAMES = ("x", "weights", "group_sizes", "tokens_per_expert", "num_dropped", "topk_idx")
OF_PLAN = ("slot", "row_source")


def dispatch(problem, **kwargs):
    return reference.dispatch(
        problem.x, problem.topk_idx, problem.topk_weights, **problem.dispatch_kwargs(), **kwargs
    )


def assert_same(got, want, ranks=slice(None)):
    pairs = [(n, getattr(got, n), getattr(want, n)) for n in NAMES]
    pairs += [(n, getattr(got.plan, n), getattr(want.plan, n)) for n in OF_PLAN]
    for name, a, b in pairs:
        if b is None:
            assert a is None
        else:
            np.testing.assert_array_equal(a[ranks], b[ranks], name)


@pytest.mark.parametrize("case", CASES)
def test_who_misses_nobody_has_all(case):
    problem = CASES[case]
    nobody = np.zeros((8, 8), bool)
    got, want = dispatch(problem, missing=nobody), dispatch(problem)
    assert_same(got, want)
    y = expert_outputs(problem)
    sums = [reference.combine(y, p, dtype=np.float32, missing=m)
            for p, m in ((got.plan, nobody), (want.plan, None))]  # fmt: skip
    np.testing.assert_array_equal(*sums)


@pytest.mark.parametrize("case", CASES)
def test_ranks_that_all_others_miss_are_as_left_out(case):
    problem, here = CASES[case], came(CASES[case], 2, 7)
    got, want = dispatch(problem, missing=missing_of(here)), dispatch(problem, rank_mask=here)
    assert_same(got, want, here)
    np.testing.assert_array_equal(got.plan.topk_idx, problem.topk_idx)
    # A rank that misses all others has what it sent itself.
    assert (got.plan.row_source[2] // problem.num_tokens <= 2).all()
    own = dispatch(problem, rank_mask=np.arange(8) == 2)
    assert_same(got, own, [2])


def test_two_ranks_may_miss_different_ones_by_hand():
    """Two ranks with an expert each; both have one token for both."""
    missing = np.array([[False, True], [False, False]])  # rank 0 did not get what rank 1 sent
    plan = reference.plan([[[0, 1]], [[0, 1]]], num_experts=2, recv_capacity=2, missing=missing)
    assert plan.row_source.tolist() == [[0, -1], [0, 1]]
    assert plan.slot.tolist() == [[[0, 0]], [[-1, 1]]]
    assert plan.tokens_per_expert.tolist() == [[1], [2]]
    y = np.array([[[1.0], [8.0]], [[10.0], [20.0]]])
    assert reference.combine(y, plan, dtype=np.float32).tolist() == [[[11.0]], [[20.0]]]
    sums = reference.combine(y, plan, dtype=np.float32, missing=missing)
    assert sums.tolist() == [[[1.0]], [[20.0]]]


def test_what_is_no_missing_is_refused():
    with pytest.raises(ValueError, match=r"missing has shape \(8,\); it must be \(8, 8\)"):
        dispatch(PROBLEM, missing=np.zeros(8, bool))
    with pytest.raises(ValueError, match="missing has True on its diagonal; no rank misses itself"):
        reference.combine(
            expert_outputs(PROBLEM), PROBLEM.plan, dtype=np.float32, missing=np.eye(8, dtype=bool)
        )
