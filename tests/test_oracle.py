# SPDX-License-Identifier: Apache-2.0
"""Oracle, `ffi` and `xla` agree on every named problem and on random ones, bit by bit."""

import functools

import hypothesis
import pytest

from ep_testing import assertions, strategies
from ep_testing.oracle_checks import assert_matches_oracle
from ep_testing.problems import PROBLEMS, EpProblem, params
from ep_testing.programs import exchange, exchange_program, make_group, run_exchange


@pytest.mark.parametrize("problem", params())
def test_a_backend_gives_the_oracles_bits(problem, backend):
    assert_matches_oracle(problem, exchange(problem, backend), backend)


@hypothesis.given(problem=strategies.problems())
@hypothesis.settings(max_examples=6)
def test_random_sizes_agree(problem):
    for backend in ("ffi", "xla"):
        assert_matches_oracle(problem, exchange(problem, backend), backend)


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
        assert_matches_oracle(problem, run_exchange(_program(base, backend), problem), backend)


@pytest.mark.parametrize("problem", params("eight_ranks", "deepseek_by_rank", "fp8"))
def test_the_same_inputs_give_the_same_bits_on_every_run(problem, backend):
    with make_group(problem, backend) as group:
        program = exchange_program(group)
        first = run_exchange(program, problem)
        for _ in range(5):
            again = run_exchange(program, problem)
            assertions.assert_sums_equal(again.weighted, first.weighted, problem)
            assertions.assert_rows_equal(again.received.x, first.received.x, problem)
