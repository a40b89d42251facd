# SPDX-License-Identifier: Apache-2.0
"""Oracle, `ffi` and `xla` agree on every named problem and on random ones, bit by bit."""

import functools

import hypothesis
import numpy as np
import pytest

import explain
import strategies
from jax_ep import reference
from problems import PROBLEMS, EpProblem, params
from programs import exchange


@functools.lru_cache(maxsize=256)
def _exchanged(name: str, backend: str):
    return exchange(PROBLEMS[name], backend)


def _check_received(problem: EpProblem, received) -> None:
    want = problem.dispatched
    for field in ("group_sizes", "tokens_per_expert", "num_dropped"):
        np.testing.assert_array_equal(getattr(received, field), getattr(want, field), field)
    np.testing.assert_array_equal(received.handle.slot, want.plan.slot, "slot")
    np.testing.assert_array_equal(received.handle.row_source, want.plan.row_source, "row_source")
    explain.assert_same_rows(received.x, want.x, problem)
    np.testing.assert_array_equal(received.weights, want.weights, "weights")
    if problem.layout == "rank":
        np.testing.assert_array_equal(received.topk_idx, want.topk_idx, "topk_idx")
    else:
        assert received.topk_idx is None


@pytest.mark.parametrize("problem", params())
def test_dispatch_gives_the_oracles_bits(problem, backend):
    _check_received(problem, _exchanged(problem.name, backend).received)


@pytest.mark.parametrize("problem", params())
def test_unweighted_combine_gives_the_oracles_bits(problem, backend):
    got = _exchanged(problem.name, backend).unweighted
    want = reference.combine(problem.expert_outputs(), problem.plan, dtype=problem.np_dtype)
    explain.assert_same_output(got, want, problem)


@pytest.mark.parametrize("problem", params())
def test_weighted_combine_of_ffi_gives_the_oracles_bits(problem):
    got = _exchanged(problem.name, "ffi").weighted
    want = reference.combine(
        problem.expert_outputs(), problem.plan, problem.dispatched.weights, dtype=problem.np_dtype
    )
    explain.assert_same_output(got, want, problem)


@pytest.mark.parametrize("problem", params())
def test_weighted_combine_of_xla_is_within_the_derived_bound(problem):
    # XLA decides whether it fuses a product and a sum, so the last bit is not defined.
    got = _exchanged(problem.name, "xla").weighted.astype(np.float64)
    y, weights = problem.expert_outputs(), problem.dispatched.weights
    want = reference.combine(y, problem.plan, weights, exact_bits=False)
    bound = reference.combine_error_bound(y, problem.plan, weights, dtype=problem.np_dtype)
    assert np.all(np.abs(got - want) <= bound), np.max(np.abs(got - want) - bound)


@hypothesis.given(problem=strategies.problems())
@hypothesis.settings(max_examples=15)
def test_random_routings_agree(problem):
    for backend in ("ffi", "xla"):
        got = exchange(problem, backend)
        _check_received(problem, got.received)
        want = reference.combine(problem.expert_outputs(), problem.plan, dtype=problem.np_dtype)
        explain.assert_same_output(got.unweighted, want, problem)


@pytest.mark.parametrize("problem", params("eight_ranks", "deepseek_by_rank", "fp8"))
def test_the_same_inputs_give_the_same_bits_on_every_run(problem, backend):
    first = _exchanged(problem.name, backend)
    for _ in range(3):
        again = exchange(problem, backend)
        explain.assert_same_output(again.weighted, first.weighted, problem)
        explain.assert_same_rows(again.received.x, first.received.x, problem)
