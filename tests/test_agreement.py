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
from programs import Exchanged, exchange, exchange_program, make_group, run_exchange


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


def _check_unweighted(problem: EpProblem, got: np.ndarray) -> None:
    want = reference.combine(problem.expert_outputs(), problem.plan, dtype=problem.np_dtype)
    explain.assert_same_output(got, want, problem)


def _check_weighted(problem: EpProblem, got: np.ndarray, backend: str) -> None:
    y, weights, dtype = problem.expert_outputs(), problem.dispatched.weights, problem.np_dtype
    if backend == "ffi":
        want = reference.combine(y, problem.plan, weights, dtype=dtype)
        explain.assert_same_output(got, want, problem)
        return
    # XLA decides whether it fuses a product and a sum, so the last bit is not defined.
    value = reference.combine(y, problem.plan, weights, exact_bits=False)
    bound = reference.combine_error_bound(y, problem.plan, weights, dtype=dtype)
    off = np.abs(got.astype(np.float64) - value) - bound
    assert np.all(off <= 0), f"{problem.name}: off the derived bound by {np.max(off)}"


def _check_all(problem: EpProblem, got: Exchanged, backend: str) -> None:
    _check_received(problem, got.received)
    _check_unweighted(problem, got.unweighted)
    _check_weighted(problem, got.weighted, backend)


@pytest.mark.parametrize("problem", params())
def test_a_backend_gives_the_oracles_bits(problem, backend):
    got = exchange(problem, backend)
    _check_received(problem, got.received)
    _check_unweighted(problem, got.unweighted)
    _check_weighted(problem, got.weighted, backend)


@hypothesis.given(problem=strategies.problems())
@hypothesis.settings(max_examples=6)
def test_random_sizes_agree(problem):
    for backend in ("ffi", "xla"):
        _check_all(problem, exchange(problem, backend), backend)


@functools.cache
def _program(base: EpProblem, backend: str):
    return exchange_program(make_group(base, backend))  # open until the tests end


@hypothesis.given(data=hypothesis.strategies.data())
@hypothesis.settings(max_examples=40)
@pytest.mark.parametrize("name", ["masked_half", "capacity_ample_by_rank", "alignment_8_drops"])
def test_random_routings_of_one_size_agree(name, data):
    base = PROBLEMS[name]
    problem = data.draw(strategies.reroutings(base))
    for backend in ("ffi", "xla"):
        _check_all(problem, run_exchange(_program(base, backend), problem), backend)


@pytest.mark.parametrize("problem", params("eight_ranks", "deepseek_by_rank", "fp8"))
def test_the_same_inputs_give_the_same_bits_on_every_run(problem, backend):
    with make_group(problem, backend) as group:
        program = exchange_program(group)
        first = run_exchange(program, problem)
        for _ in range(5):
            again = run_exchange(program, problem)
            explain.assert_same_output(again.weighted, first.weighted, problem)
            explain.assert_same_rows(again.received.x, first.received.x, problem)
