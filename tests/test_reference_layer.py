# SPDX-License-Identifier: Apache-2.0
"""The oracle's routing, losses and expert layer against cases worked out by hand."""

import math

import numpy as np
import pytest

from ep_testing import problems
from jax_ep import reference


def test_softmax_top_2_by_hand():
    # exp gives 1, 2, 4, 8: shares 1/15, 2/15, 4/15, 8/15.
    logits = np.log([[1.0, 2.0, 4.0, 8.0], [8.0, 1.0, 4.0, 2.0]])
    idx, weights = reference.route(logits, num_topk=2)
    assert idx.tolist() == [[3, 2], [0, 2]]
    assert idx.dtype == np.int32
    np.testing.assert_allclose(weights, [[2 / 3, 1 / 3], [2 / 3, 1 / 3]], rtol=1e-15)
    _, weights = reference.route(logits, num_topk=2, normalize=False, scale=3.0)
    np.testing.assert_allclose(weights, [[1.6, 0.8], [1.6, 0.8]], rtol=1e-15)


def test_large_logits_do_not_overflow():
    logits = np.array([[1000.0, -1000.0], [-1000.0, -999.0]])
    for score in ("softmax", "sigmoid"):
        _, weights = reference.route(logits, num_topk=2, score=score, normalize=False)
        assert np.isfinite(weights).all()
    assert reference.router_z_loss(logits[:1]) == 1e6


def test_equal_scores_go_to_the_lower_index():
    idx, _ = reference.route(np.zeros((1, 6)), num_topk=3)
    assert idx.tolist() == [[0, 1, 2]]
    idx, _ = reference.route(np.zeros((1, 6)), num_topk=3, num_groups=3, num_topk_groups=2)
    assert idx.tolist() == [[0, 1, 2]]


def test_the_bias_chooses_and_does_not_weigh_by_hand():
    logits = np.log([[1.0, 2.0, 4.0, 8.0]])
    idx, weights = reference.route(logits, num_topk=2, bias=[0.9, 0, 0, 0], normalize=False)
    assert idx.tolist() == [[0, 3]]
    np.testing.assert_allclose(weights, [[1 / 15, 8 / 15]], rtol=1e-15)


def logit(p):
    return np.log(p) - np.log1p(-p)


# Sigmoid scores of 8 experts in 4 groups of 2. Sums: 1.0, 1.1, 1.05, 0.95.
SCORES = np.array([[0.9, 0.1, 0.6, 0.5, 0.4, 0.65, 0.15, 0.8]])


def test_group_limited_gating_by_hand():
    sizes = {"num_topk": 3, "score": "sigmoid", "num_groups": 4, "num_topk_groups": 2}
    # The best expert of all, 0, is in a group that is not among the best two.
    idx, weights = reference.route(logit(SCORES), **sizes, scale=2.5)
    assert idx.tolist() == [[5, 2, 3]]
    np.testing.assert_allclose(weights, 2.5 * np.array([[0.65, 0.6, 0.5]]) / 1.75, rtol=1e-14)
    # A bias on its weaker expert lifts group 0 to 1.2; the weights stay without bias.
    bias = [0, 0.2, 0, 0, 0, 0, 0, 0]
    idx, weights = reference.route(logit(SCORES), **sizes, bias=bias, normalize=False)
    assert idx.tolist() == [[0, 2, 3]]
    np.testing.assert_allclose(weights, [[0.9, 0.6, 0.5]], rtol=1e-14)


def test_a_group_scores_its_two_best_experts_only():
    # Group 0 has the larger sum of all, group 1 the larger sum of two.
    scores = np.array([[0.5, 0.5, 0.5, 0.8, 0.3, 0.1]])
    idx, _ = reference.route(
        logit(scores), num_topk=1, score="sigmoid", num_groups=2, num_topk_groups=1
    )
    assert idx.tolist() == [[3]]


def test_load_balance_loss_by_hand():
    logits = np.log([[1.0, 3.0], [1.0, 1.0], [3.0, 1.0]])
    # f = (2/3, 1/3); P = (1/4 + 1/2 + 3/4, ...) / 3 = (1/2, 1/2).
    loss = reference.load_balance_loss(logits, [[1], [0], [0]])
    np.testing.assert_allclose(loss, 1.0, rtol=1e-15)
    # Without the last token: f = (1/2, 1/2), which gives 1 whatever P is.
    np.testing.assert_allclose(reference.load_balance_loss(logits, [[1], [0], [-1]]), 1.0)
    # Only the last one: f = (1, 0), P = (3/4, 1/4).
    loss = reference.load_balance_loss(logits, [[-1], [-1], [0]])
    np.testing.assert_allclose(loss, 1.5, rtol=1e-15)
    # Sigmoid scores 1/4, 3/4 and 1/2, 1/2 of the last token only: P = (3/5, 2/5), f = (1, 0).
    loss = reference.load_balance_loss(logit(np.array([[0.75, 0.5]])), [[0]], score="sigmoid")
    np.testing.assert_allclose(loss, 1.2, rtol=1e-15)


def test_load_balance_loss_ranges_from_1_to_the_number_of_experts():
    idx = np.arange(8).reshape(4, 2) % 4
    np.testing.assert_allclose(reference.load_balance_loss(np.zeros((4, 4)), idx), 1.0)
    logits = np.full((4, 4), -100.0)
    logits[:, 2] = 100.0
    np.testing.assert_allclose(reference.load_balance_loss(logits, np.full((4, 1), 2)), 4.0)


def test_router_z_loss_by_hand():
    logits = np.log([[1.0, 3.0], [math.e - 0.5, 0.5]])
    np.testing.assert_allclose(reference.router_z_loss(logits), (math.log(4) ** 2 + 1) / 2)
    np.testing.assert_allclose(reference.router_z_loss(logits, [[-1, -1], [-1, 0]]), 1.0)


@pytest.mark.parametrize("shape", [(0, 4), (3, 4)])
def test_losses_of_no_tokens_are_0(shape):
    nothing = np.full((shape[0], 2), -1)
    assert reference.load_balance_loss(np.ones(shape), nothing) == 0
    assert reference.router_z_loss(np.ones(shape), nothing) == 0


def test_update_bias_by_hand():
    # The mean is 4.
    got = reference.update_bias([0.0, 1.0, 2.0, 3.0], [1, 4, 5, 6], rate=0.5)
    assert got.tolist() == [0.5, 1.0, 1.5, 2.5]


def test_moe_by_hand():
    # One hidden channel, one channel in between; expert e computes (1 + e) x * x, as gate = x.
    w_gate = np.ones((2, 1, 1))
    w_up = np.array([1.0, 2.0]).reshape(2, 1, 1)
    w_down = np.ones((2, 1, 1))
    x = np.array([[[3.0]], [[5.0]]])
    idx = np.array([[[0, 1]], [[1, -1]]])
    weights = np.array([[[0.5, 0.25]], [[2.0, 7.0]]])
    kwargs = {"activation": lambda v: v}
    for layout in ("expert", "rank"):
        out = reference.moe(x, idx, weights, w_gate, w_up, w_down, layout=layout, **kwargs)
        assert out.tolist() == [[[0.5 * 9 + 0.25 * 18]], [[2.0 * 50]]]
        # Rank 1 has room for one row only: that of token 0 of rank 0.
        out = reference.moe(
            x, idx, weights, w_gate, w_up, w_down, layout=layout, recv_capacity=1, **kwargs
        )
        assert out.tolist() == [[[0.5 * 9 + 0.25 * 18]], [[0.0]]]
    assert reference.silu(np.array([0.0, math.log(3)])).tolist() == [0.0, 0.75 * math.log(3)]


@pytest.mark.parametrize("problem", problems.params())
def test_moe_is_the_dense_layer_where_nothing_is_dropped(problem):
    hidden, num_experts = problem.hidden, problem.num_experts
    shapes = [(num_experts, hidden, 6), (num_experts, hidden, 6), (num_experts, 6, hidden)]
    w = [problem.random(s, salt=20 + i).astype(np.float64) for i, s in enumerate(shapes)]
    x = problem.random(problem.x.shape, salt=23).astype(np.float64)
    routing = problem.topk_idx, problem.topk_weights.astype(np.float64)
    kwargs = {**problem.plan_kwargs(), "recv_capacity": None, "capacity_factor": None}
    del kwargs["num_experts"]
    out = reference.moe(x, *routing, *w, **kwargs)
    dense = reference.moe_dense(x, *routing, *w)
    np.testing.assert_allclose(out, dense, rtol=1e-10, atol=1e-10)
    # A dropped selection is one that was never made.
    kwargs |= {"recv_capacity": problem.capacity, "capacity_factor": problem.capacity_factor}
    kept = np.where(problem.plan.slot >= 0, problem.topk_idx, -1)
    out = reference.moe(x, *routing, *w, **kwargs)
    dense = reference.moe_dense(x, kept, routing[1], *w)
    np.testing.assert_allclose(out, dense, rtol=1e-10, atol=1e-10)
