# SPDX-License-Identifier: Apache-2.0
"""What the oracle promises for every problem: its plans, its error bound, and its gradients."""

import hypothesis
import numpy as np
import pytest

from ep_testing import problems, strategies
from jax_ep import reference


def check_plan(problem):
    """What every plan promises, stated without the plan's own algorithm."""
    plan, idx = problem.plan, problem.topk_idx
    num_local = problem.num_experts // problem.num_ranks
    capacity = plan.capacity
    for rank in range(problem.num_ranks):
        here = (idx >= 0) & (idx // num_local == rank)
        keys = []  # what the rows are sorted by
        for source, token in np.ndindex(idx.shape[:2]):
            locals_ = [int(e) - rank * num_local for e in idx[source, token][here[source, token]]]
            if problem.layout == "rank":
                locals_ = [0] * bool(locals_)
            keys += [(local, source, token) for local in locals_]
        keys.sort()
        held = [k for k in keys if _row(problem, rank, k, keys) < capacity]
        rows = np.flatnonzero(plan.row_source[rank] >= 0)
        assert rows.tolist() == [_row(problem, rank, k, keys) for k in held]
        assert plan.row_source[rank, rows].tolist() == [
            s * problem.num_tokens + t for _, s, t in held
        ]
        assert plan.num_dropped[rank] == len(keys) - len(held)
        counts = [(idx == rank * num_local + local).sum() for local in range(num_local)]
        assert plan.tokens_per_expert[rank].tolist() == counts
        ends = np.cumsum(plan.group_sizes[rank])
        assert ends[-1] <= capacity
        for row, (local, source, _) in zip(rows, held, strict=True):
            group = local if problem.layout == "expert" else source
            assert ends[group] - plan.group_sizes[rank, group] <= row < ends[group]
    for (source, token, k), row in np.ndenumerate(plan.slot):
        if row >= 0:
            rank = idx[source, token, k] // num_local
            assert plan.row_source[rank, row] == source * problem.num_tokens + token


def _row(problem, rank, key, keys):
    align = problem.expert_alignment
    if problem.layout == "rank":
        return keys.index(key)
    row = sum(k[0] == key[0] and k < key for k in keys)
    for local in range(key[0]):
        row += -(-sum(k[0] == local for k in keys) // align) * align
    return row


@pytest.mark.parametrize("problem", problems.params())
def test_named_problems_follow_the_definition(problem):
    check_plan(problem)


@hypothesis.given(strategies.problems())
def test_any_problem_follows_the_definition(problem):
    check_plan(problem)


@pytest.mark.parametrize("problem", problems.params())
def test_exact_bits_stay_within_the_bound_of_the_float64_value(problem):
    y, weights = problem.expert_outputs(), problem.dispatched.weights
    for scale in (None, weights):
        got = reference.combine(y, problem.plan, scale, dtype=problem.np_dtype)
        value = reference.combine(y, problem.plan, scale, exact_bits=False)
        bound = reference.combine_error_bound(y, problem.plan, scale, dtype=problem.np_dtype)
        assert (np.abs(got.astype(np.float64) - value) <= bound).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_bound_is_not_loose(dtype):
    problem = problems.PROBLEMS["deepseek"].replace(dtype=dtype)
    y, weights = problem.expert_outputs(), problem.dispatched.weights
    got = reference.combine(y, problem.plan, weights, dtype=problem.np_dtype)
    value = reference.combine(y, problem.plan, weights, exact_bits=False)
    bound = reference.combine_error_bound(y, problem.plan, weights, dtype=problem.np_dtype)
    assert (np.abs(got.astype(np.float64) - value) / bound).max() > 0.2


@pytest.mark.parametrize("problem", problems.params())
def test_gradients_are_transposes(problem):
    plan, kwargs = problem.plan, problem.dispatch_kwargs()
    kwargs.update(dtype=np.float64, wire_dtype=None, recv_dtype=None)
    x = problem.random(problem.x.shape, salt=10).astype(np.float64)
    recv = reference.dispatch(x, problem.topk_idx, problem.topk_weights, **kwargs)
    x_bar = problem.random(recv.x.shape, salt=11).astype(np.float64)
    weights_bar = problem.random(recv.weights.shape, salt=12).astype(np.float64)
    got_x, got_weights = reference.dispatch_vjp(plan, x_bar, weights_bar)
    np.testing.assert_allclose((recv.x * x_bar).sum(), (x * got_x).sum(), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(
        (recv.weights * weights_bar).sum(), (problem.topk_weights * got_weights).sum(), rtol=1e-12
    )
    assert reference.dispatch_vjp(plan, x_bar)[1] is None

    # Combine is linear in y and in the weights, so a difference is a derivative.
    y = problem.expert_outputs()
    out_bar = problem.random(x.shape, salt=13).astype(np.float64)
    for weights in (None, recv.weights):
        y_bar, got_weights = reference.combine_vjp(y, plan, weights, out_bar)
        step = problem.random(y.shape, salt=14).astype(np.float64)
        change = reference.combine(step, plan, weights, exact_bits=False)
        np.testing.assert_allclose(
            (change * out_bar).sum(), (step * y_bar).sum(), rtol=1e-11, atol=1e-11
        )
        assert not y_bar[plan.row_source < 0].any()
    step = problem.random(recv.weights.shape, salt=15).astype(np.float64)
    change = reference.combine(y, plan, step, exact_bits=False)
    np.testing.assert_allclose(
        (change * out_bar).sum(), (step * got_weights).sum(), rtol=1e-11, atol=1e-11
    )
    empty = recv.topk_idx < 0 if problem.layout == "rank" else plan.row_source < 0
    assert not got_weights[empty].any()


@hypothesis.given(strategies.problems())
def test_weights_that_sum_to_1_and_identity_experts_give_the_token_back(problem):
    problem = problem.replace(recv_capacity=None, capacity_factor=None)
    selected = problem.topk_idx >= 0
    weights = np.where(selected, 1.0 / np.maximum(selected.sum(-1, keepdims=True), 1), 5.0)
    recv = reference.dispatch(problem.x, problem.topk_idx, weights, **problem.dispatch_kwargs())
    out = reference.combine(recv.x, recv.plan, recv.weights, exact_bits=False)
    want = np.where(selected.any(-1, keepdims=True), problem.x.astype(np.float64), 0.0)
    np.testing.assert_allclose(out, want, rtol=1e-6)
