# SPDX-License-Identifier: Apache-2.0
"""`EpConfig.drop` "even": every local expert gets its share of the rows that there are."""

import functools
import types

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest

import jax_ep
from ep_testing import strategies
from ep_testing.even_drops import BASE, PROBLEMS
from ep_testing.oracle_checks import assert_matches_oracle
from ep_testing.programs import (
    exchange,
    exchange_program,
    make_group,
    over_ranks,
    run_exchange,
)
from jax_ep import reference
from jax_ep._src import drops

DROPS = ["uniform", "zipf", "zipf_1.25", "aligned", "cut", "masked", "three_ranks", "fp8_rows"]


# --- the oracle --------------------------------------------------------------------------------


def _plan(asked, capacity, align):
    """The oracle's plan of one rank, whose experts are asked for so many rows."""
    num_tokens = max(asked)
    idx = np.full((1, num_tokens, len(asked)), -1)
    for expert, rows in enumerate(asked):
        idx[0, :rows, expert] = expert
    return reference.plan(
        idx, num_experts=len(asked), recv_capacity=capacity, expert_alignment=align, drop="even"
    )


@pytest.mark.parametrize(
    ("asked", "capacity", "align", "kept", "group_sizes"),
    [
        # A share of 3 rows; what experts 1 and 2 leave goes to expert 0, and then to 3.
        ([5, 1, 2, 4], 12, 1, [5, 1, 2, 4], [5, 1, 2, 4]),
        ([9, 1, 2, 4], 12, 1, [6, 1, 2, 3], [6, 1, 2, 3]),
        ([4, 1, 2, 9], 12, 1, [4, 1, 2, 5], [4, 1, 2, 5]),
        ([9, 9, 9, 9], 12, 1, [3, 3, 3, 3], [3, 3, 3, 3]),
        ([9, 9, 9, 9], 14, 1, [5, 3, 3, 3], [5, 3, 3, 3]),
        # Whole groups: a share of 4, and padding that takes room.
        ([9, 1], 12, 4, [8, 1], [8, 4]),
        ([9, 9], 12, 4, [8, 4], [8, 4]),
        ([1, 9], 12, 4, [1, 8], [4, 8]),
        ([9, 0], 12, 4, [9, 0], [12, 0]),
        # The last group with rows need not be whole: its padding is cut off.
        ([9, 1], 13, 4, [9, 1], [12, 1]),
        ([9, 2], 13, 4, [8, 2], [8, 4]),
        ([9, 9], 15, 4, [8, 7], [8, 7]),
        ([9, 9], 14, 4, [8, 6], [8, 6]),
        ([14, 0], 14, 4, [14, 0], [14, 0]),
        # No share: in row order.
        ([9, 9], 7, 4, [7, 0], [7, 0]),
    ],
)
def test_what_is_kept_by_hand(asked, capacity, align, kept, group_sizes):
    plan = _plan(asked, capacity, align)
    assert (plan.slot[0] >= 0).sum(axis=0).tolist() == kept
    assert plan.group_sizes[0].tolist() == group_sizes
    assert plan.tokens_per_expert[0].tolist() == asked
    assert plan.num_dropped[0] == sum(asked) - sum(kept)
    starts = np.cumsum([0, *group_sizes[:-1]])
    for expert, rows in enumerate(kept):  # the first of its tokens, in their order
        first = np.arange(rows) + starts[expert]
        assert plan.slot[0, :rows, expert].tolist() == first.tolist()
        assert plan.row_source[0, first].tolist() == list(range(rows))


_ROWS = st.lists(st.integers(0, 20), min_size=1, max_size=6).filter(any)


@hypothesis.given(_ROWS, st.integers(1, 60), st.sampled_from([1, 2, 3, 8]))
@hypothesis.settings(max_examples=200)
def test_what_is_kept_is_what_the_definition_promises(asked, capacity, align):
    plan = _plan(asked, capacity, align)
    kept = (plan.slot[0] >= 0).sum(axis=0)
    fair = capacity // len(asked) // align * align
    assert np.all(kept >= np.minimum(asked, fair))
    assert plan.group_sizes.sum() <= capacity
    in_row_order = reference.plan(
        plan.topk_idx, num_experts=len(asked), recv_capacity=capacity, expert_alignment=align
    )
    if not in_row_order.num_dropped.any() or fair == 0:
        np.testing.assert_array_equal(plan.slot, in_row_order.slot)
        np.testing.assert_array_equal(plan.group_sizes, in_row_order.group_sizes)
    if align == 1:  # no row stays empty while there are rows to be dropped
        assert kept.sum() == min(sum(asked), capacity)


@hypothesis.given(_ROWS, st.integers(1, 60), st.sampled_from([1, 2, 3, 8]))
@hypothesis.settings(max_examples=60)
def test_the_closed_form_is_the_definition(asked, capacity, align):
    spec = types.SimpleNamespace(
        recv_capacity=capacity, expert_alignment=align, num_local_experts=len(asked)
    )
    if drops._fair_rows(spec) == 0:
        return  # "rows", to which nothing is done
    kept = drops.kept_rows(spec, jnp.asarray([asked], jnp.int32))
    plan = _plan(asked, capacity, align)
    np.testing.assert_array_equal(kept[0], (plan.slot[0] >= 0).sum(axis=0))


def test_the_oracle_has_it_in_one_layout_only():
    with pytest.raises(ValueError, match="layout 'rank' with drop 'even' is not defined"):
        reference.plan(np.zeros((1, 1, 1)), num_experts=1, layout="rank", drop="even")


# --- the backends ------------------------------------------------------------------------------


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
def test_a_backend_gives_the_oracles_bits(problem, backend):
    got = exchange(problem, backend)
    assert_matches_oracle(problem, got, backend)
    np.testing.assert_array_equal(got.received.handle.topk_idx, problem.topk_idx)


@pytest.mark.parametrize("name", DROPS)
def test_these_problems_drop_and_not_as_rows_do(name):
    problem = PROBLEMS[name]
    assert problem.plan.num_dropped.any()
    in_row_order = problem.replace(drop="rows").plan
    assert not np.array_equal(problem.plan.slot, in_row_order.slot)


@functools.cache
def _program(name, backend):
    return exchange_program(make_group(PROBLEMS[name], backend))  # open until the tests end


@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=15)
@pytest.mark.parametrize("name", ["masked", "cut"])
def test_random_routings_agree(name, data):
    problem = data.draw(strategies.reroutings(PROBLEMS[name]))
    for backend in ("ffi", "xla"):
        got = run_exchange(_program(name, backend), problem)
        assert_matches_oracle(problem, got, backend)


def test_drops_of_near_uniform_routing_are_spread_evenly():
    """In row order the last expert of each rank loses a fifth of its rows, the first ones none."""
    problem = BASE.replace(num_tokens=512, num_experts=16, max_tokens_per_rank=512)
    dropped = {}
    for drop in ("rows", "even"):
        made = problem.replace(drop=drop)
        with make_group(made, "ffi") as group:
            received = over_ranks(
                group, lambda idx, group=group: jax_ep.dispatch(
                    jnp.zeros((512, 8)), idx, group=group
                )
            )(problem.topk_idx)  # fmt: skip
        asked = np.asarray(received.tokens_per_expert)
        kept = np.asarray(received.group_sizes)
        np.testing.assert_array_equal(received.num_dropped, (asked - kept).sum(axis=1))
        dropped[drop] = (asked - kept) / asked
        np.testing.assert_array_equal(kept.sum(axis=1), np.minimum(asked.sum(axis=1), 2048))
        if drop == "even":
            # No expert loses more than what it was asked for above its share.
            assert np.all(asked - kept <= np.maximum(asked - 512, 0))
    assert dropped["rows"][:, :3].max() == 0 < dropped["rows"][:, 3].max()
    assert dropped["even"].max() < dropped["rows"].max()
