# SPDX-License-Identifier: Apache-2.0
"""`plan_placement`: what every plan promises, how good plans are, errors."""

import logging

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

import jax_ep
from jax_ep._src.balancing import packing

ONE = 65536


@st.composite
def planned(draw):
    """`load [layers, E]` and arguments of `plan_placement` that fit it."""
    num_ranks = draw(st.integers(1, 6))
    num_experts = draw(st.integers(1, 12))
    least = -(-num_experts // num_ranks)
    spare = draw(st.integers(0, 3)) if num_ranks > 1 else 0
    sizes = {"num_ranks": num_ranks, "slots_per_rank": least + spare}
    if draw(st.booleans()):
        sizes["max_copies"] = draw(st.integers(1, num_ranks))
    return draw(loads(draw(st.integers(1, 2)), num_experts)), sizes


def loads(num_layers, num_experts):
    """Any small integers: many are equal, many are 0. Or a long tail, all different."""
    number = st.integers(0, 9) | st.just(1000)
    row = st.lists(number, min_size=num_experts, max_size=num_experts)
    small = st.lists(row, min_size=num_layers, max_size=num_layers).map(np.array)
    tail = st.integers(0, 99).map(lambda seed: lognormal((num_layers, num_experts), seed))
    return small | tail


def lognormal(shape, seed=0):
    return np.exp(np.random.default_rng(seed).standard_normal(shape))


def rank_loads(plan, load):
    """`[layers, R]` by the tables' definition, one share after the other."""
    out = np.zeros((plan.num_layers, plan.num_ranks))
    for layer, expert, copy in np.ndindex(plan.copies.shape):
        if (slot := plan.copies[layer, expert, copy]) >= 0:
            upper = plan.upper[layer, expert]
            share = upper[copy] - (upper[copy - 1] if copy else 0)
            out[layer, slot // plan.slots_per_rank] += load[layer, expert] * share / ONE
    return out


def check(plan, load, *, is_full=True):
    """What every plan promises, and that no slot is left empty that an expert could use."""
    num_layers, num_experts = load.shape
    by_rank = plan.slot_expert.reshape(num_layers, plan.num_ranks, -1)
    most = min(int(plan.alive.sum()), plan.max_copies)
    assert (by_rank[:, ~plan.alive] == -1).all()
    for layer in range(num_layers):
        count = np.bincount(plan.slot_expert[layer] + 1, minlength=num_experts + 1)[1:]
        assert count.min() >= 1
        assert count.max() <= most
        could = min(plan.alive.sum() * plan.slots_per_rank, num_experts * most)
        assert count.sum() == could if is_full else count.sum() <= could
        for rank in by_rank[layer]:
            experts = rank[rank >= 0].tolist()
            assert len(experts) == len(set(experts))
        for expert in range(num_experts):
            slots = np.flatnonzero(plan.slot_expert[layer] == expert).tolist()
            behind = [-1] * (plan.max_copies - len(slots))
            assert plan.copies[layer, expert].tolist() == slots + behind
            upper = plan.upper[layer, expert].tolist()
            assert upper[len(slots) :] == behind
            assert upper[len(slots) - 1] == ONE
            assert (np.diff([0, *upper[: len(slots)]]) >= 0).all()
    got, hottest = plan.imbalance(load), rank_loads(plan, load)
    total = hottest.sum(axis=1)
    want = np.where(total > 0, hottest.max(axis=1) * plan.alive.sum() / np.maximum(total, 1e-9), 1)
    np.testing.assert_allclose(got, want, rtol=1e-12)
    assert (got >= plan.lower_bound(load) * (1 - 1e-4)).all()


@hypothesis.given(planned())
def test_every_expert_has_copies_on_distinct_ranks_and_shares_sum_to_one(drawn):
    load, sizes = drawn
    plan = jax_ep.plan_placement(load, **sizes)
    check(plan, load)
    assert plan == jax_ep.plan_placement(load, **sizes)


@hypothesis.given(planned())
def test_swaps_and_shares_make_no_plan_worse(drawn):
    load, sizes = drawn
    plan = jax_ep.plan_placement(load, **sizes)
    num_ranks, per_rank = sizes["num_ranks"], sizes["slots_per_rank"]
    for layer, of_layer in enumerate(load.astype(np.float64)):
        if not of_layer.any():
            continue
        copies = packing.replicate(of_layer, num_ranks * per_rank, plan.max_copies)
        slots = packing.pack(of_layer, copies, num_ranks, per_rank, swap=False)
        first = packing.Packing(slots, of_layer, copies).rank_load.max() / of_layer.sum()
        # The rounding of shares.
        assert plan.imbalance(load)[layer] <= first * num_ranks * (1 + 1e-4) + 1e-4


@hypothesis.given(planned(), st.data())
def test_a_plan_of_its_own_loads_is_a_fixed_point(drawn, data):
    load, sizes = drawn
    plan = jax_ep.plan_placement(load, **sizes)
    max_moved = data.draw(st.none() | st.integers(0, 3))
    again = jax_ep.plan_placement(load, **sizes, previous=plan, max_moved=max_moved)
    assert again == plan
    assert again.moves(plan) == 0


@hypothesis.given(planned(), st.data())
def test_max_moved_is_obeyed_and_slots_keep_their_numbers(drawn, data):
    load, sizes = drawn
    plan = jax_ep.plan_placement(load, **sizes)
    other = data.draw(loads(*load.shape))
    max_moved = data.draw(st.none() | st.integers(0, 5))
    after = jax_ep.plan_placement(other, **sizes, previous=plan, max_moved=max_moved)
    check(after, other)
    changed = (after.slot_expert != plan.slot_expert) & (after.slot_expert >= 0)
    assert after.moves(plan) == changed.sum()
    if max_moved is not None:
        assert changed.sum(axis=1).max() <= max_moved
    if max_moved == 0:
        assert after == plan.reshare(other)
        assert (after.slot_expert == plan.slot_expert).all()


@hypothesis.given(planned(), st.data())
def test_dead_ranks_get_nothing_and_nothing_is_lost(drawn, data):
    load, sizes = drawn
    num_ranks = sizes["num_ranks"]
    alive = np.array(data.draw(st.lists(st.booleans(), min_size=num_ranks, max_size=num_ranks)))
    hypothesis.assume(alive.any())
    sizes["slots_per_rank"] = -(-load.shape[1] // int(alive.sum()))
    plan = jax_ep.plan_placement(load, **sizes)
    without = jax_ep.plan_placement(load, **sizes, alive=alive)
    check(without, load)
    assert not without.lost(alive).any()
    assert (without.lost(~alive)).all()
    # From the placement before: what lost its copies gets one, even where nothing may move.
    lost = plan.lost(alive).sum(axis=1)
    after = jax_ep.plan_placement(load, **sizes, alive=alive, previous=plan, max_moved=0)
    assert not after.lost(alive).any()
    changed = (after.slot_expert != plan.slot_expert) & (after.slot_expert >= 0)
    assert (changed.sum(axis=1) == lost).all()
    # And back. The slots that are free may all be on a rank that has the experts that want one.
    check(jax_ep.plan_placement(load, **sizes, previous=after), load, is_full=False)


@pytest.mark.parametrize("seed", range(4))
def test_permuted_experts_give_the_same_loads(seed):
    load = lognormal((1, 40), seed)
    order = np.random.default_rng(seed).permutation(40)
    sizes = {"num_ranks": 6, "slots_per_rank": 8}
    plan = jax_ep.plan_placement(load, **sizes)
    permuted = jax_ep.plan_placement(load[:, order], **sizes)
    count = (plan.copies >= 0).sum(axis=2)
    assert (count[:, order] == (permuted.copies >= 0).sum(axis=2)).all()
    # The slots are the same but for their names; where the flow ends depends on the names.
    np.testing.assert_allclose(permuted.imbalance(load[:, order]), plan.imbalance(load), rtol=1e-3)
    even = [np.sort(_even(p, w)) for p, w in ((plan, load), (permuted, load[:, order]))]
    np.testing.assert_allclose(*even, rtol=1e-12)


def _even(plan, load):
    count = (plan.copies[0] >= 0).sum(axis=1)
    return (load[0] / count)[plan.slot_expert[0]].reshape(plan.num_ranks, -1).sum(axis=1)


# --- by hand -----------------------------------------------------------------------------------


def test_by_hand():
    # Expert 0 gets the two spare slots: 6 / 3 = 2. Then 2 2 | 2 1 | 1 0 would be the ranks.
    plan = jax_ep.plan_placement([6, 1, 1, 1], num_ranks=3, slots_per_rank=2)
    assert plan.slot_expert.tolist() == [[0, 1, 0, 2, 0, 3]]
    assert plan.copies.tolist() == [[[0, 2, 4], [1, -1, -1], [3, -1, -1], [5, -1, -1]]]
    assert plan.upper.tolist()[0][0] == [21845, 43691, 65536]
    assert plan.imbalance([6, 1, 1, 1]) == pytest.approx([1.0], abs=1e-4)
    # One third and two thirds, so that both ranks get 4.
    plan = jax_ep.plan_placement([3, 3, 2], num_ranks=2, slots_per_rank=2)
    assert plan.slot_expert.tolist() == [[0, 1, 0, 2]]
    assert plan.upper.tolist()[0][0] == [21845, 65536]
    assert plan.imbalance([3, 3, 2]) == pytest.approx([1.0], abs=1e-4)
    assert plan.imbalance([0, 3, 1]) == pytest.approx([1.5])


def test_a_copy_makes_room_where_only_its_own_rank_has_a_free_slot():
    load = np.array([3.0, 1.0, 4.0])
    slots = np.array([[0, 1], [2, -1]])
    full = packing.Packing(slots, load, np.array([1, 1, 2]))
    full.add(2)
    assert full.slots.tolist() == [[2, 1], [2, 0]]
    assert full.rank_load.tolist() == [3, 5]
    assert full.has[:, :3].tolist() == [[False, True, True], [True, False, True]]


def test_no_load_is_planned_evenly():
    plan = jax_ep.plan_placement(np.zeros((2, 6)), num_ranks=4, slots_per_rank=2)
    assert (np.sort((plan.copies >= 0).sum(axis=2)) == [1, 1, 1, 1, 2, 2]).all()
    assert plan.imbalance(np.zeros(6) + np.zeros((2, 1))).tolist() == [1, 1]
    assert plan.imbalance(np.ones((2, 6))).max() <= 1.34


def test_slots_that_nobody_may_have_stay_empty():
    plan = jax_ep.plan_placement([1, 1], num_ranks=4, slots_per_rank=1, max_copies=1)
    assert sorted(plan.slot_expert[0].tolist()) == [-1, -1, 0, 1]
    assert plan.imbalance([1, 1]).tolist() == [2.0]
    assert plan.lower_bound([1, 1]).tolist() == [2.0]


def test_groups_stay_on_a_node():
    load = lognormal((3, 64))
    sizes = {"num_ranks": 8, "slots_per_rank": 9, "num_nodes": 4, "num_groups": 8}
    plan = jax_ep.plan_placement(load, **sizes)
    check(plan, load)
    moved = jax_ep.plan_placement(lognormal((3, 64), 1), **sizes, previous=plan, max_moved=5)
    assert 0 < moved.moves(plan) <= 15
    for p in (plan, moved):
        node = np.where(p.copies >= 0, p.copies // (2 * 9), -1)
        of_group = node.reshape(3, 8, -1)
        owner = of_group.max(axis=2)
        assert ((of_group == owner[..., None]) | (of_group == -1)).all()
        assert (np.sort(owner, axis=1) == [0, 0, 1, 1, 2, 2, 3, 3]).all()
    free = jax_ep.plan_placement(load, num_ranks=8, slots_per_rank=9)
    with pytest.raises(ValueError, match=r"previous has groups of layer 0 on several nodes"):
        jax_ep.plan_placement(load, **sizes, previous=free)


def test_groups_without_a_copy_left_go_where_there_is_room():
    load, alive = lognormal((2, 8)), [True, False, True, True]
    sizes = {"num_ranks": 4, "slots_per_rank": 4, "num_nodes": 2, "num_groups": 8}
    plan = jax_ep.plan_placement(load, **sizes, max_copies=1)
    left = plan.only_alive(alive)
    assert left.lost(alive).any(axis=1).all()
    again = jax_ep.plan_placement(load, **sizes, alive=alive, previous=left, max_moved=0)
    check(again, load)
    node = again.copies[..., 0] // 8
    assert (np.sort(node, axis=1) == [0, 0, 0, 0, 1, 1, 1, 1]).all()
    kept = ~left.lost(alive)
    assert (again.copies == left.copies)[kept].all()
    # All that is lost was of node 0, and only there is room.
    assert (node[~kept] == 0).all()


# --- quality -----------------------------------------------------------------------------------


def drawn_load(kind, num_experts, num_ranks, slots_per_rank, seed=0):
    """Counts of 4096 * 8 selections of each rank."""
    rng = np.random.default_rng([seed, num_experts, num_ranks, slots_per_rank])
    place = np.arange(1, num_experts + 1)
    if kind == "uniform":
        p = rng.random(num_experts)
    elif kind == "lognormal":
        p = np.exp(rng.standard_normal(num_experts))
    else:
        p = rng.permutation(place ** -float(kind.removeprefix("zipf ")))
    return rng.multinomial(4096 * 8 * num_ranks, p / p.sum())


@pytest.mark.parametrize("kind", ["uniform", "lognormal", "zipf 0.6", "zipf 1"])
@pytest.mark.parametrize(
    ("num_experts", "num_ranks", "slots_per_rank"),
    [
        (256, 8, 32),
        (256, 8, 33),
        (256, 8, 36),
        (256, 32, 9),
        (256, 64, 5),
        (64, 8, 9),
        (128, 2, 65),
    ],
)
def test_the_hottest_rank_is_close_to_the_lower_bound(kind, num_experts, num_ranks, slots_per_rank):
    load = drawn_load(kind, num_experts, num_ranks, slots_per_rank)
    sizes = {"num_ranks": num_ranks, "slots_per_rank": slots_per_rank}
    plan = jax_ep.plan_placement(load, **sizes, max_copies=num_ranks)
    ratio = plan.imbalance(load) / plan.lower_bound(load)
    if kind == "zipf 1" and slots_per_rank == 32:
        # No spare slot: the bound knows nothing of slots.
        assert 1.1 < ratio < 1.15
    else:
        assert ratio <= 1.015


# Hottest rank per mean with groups of experts on nodes, where the bound knows nothing of groups;
# DeepSeek's planner reaches 1.038, 1.092, 1.055 and 1.360 in the mean of ten such loads.
@pytest.mark.parametrize(
    ("kind", "most"),
    [("uniform", 1.038), ("lognormal", 1.092), ("zipf 0.6", 1.055), ("zipf 1", 1.36)],
)
def test_groups_on_nodes_are_no_worse_than_published_planners(kind, most):
    sizes = {"num_ranks": 32, "slots_per_rank": 9, "num_nodes": 4, "num_groups": 8}
    got = []
    for seed in range(10):
        load = drawn_load(kind, 256, 32, 9, seed)
        got.append(jax_ep.plan_placement(load, **sizes).imbalance(load)[0])
    assert np.mean(got) <= most


@pytest.mark.parametrize(
    ("num_ranks", "slots_per_rank", "max_moved", "most"),
    [(8, 33, 8, 1.025), (8, 33, 16, 1.018), (8, 36, 8, 1.015), (32, 9, 32, 1.035)],
)
def test_a_few_moves_follow_a_drifting_load(num_ranks, slots_per_rank, max_moved, most):
    """Judged on another draw of the same window: mean of seven windows."""
    rng = np.random.default_rng([0, num_ranks])
    z = rng.standard_normal(256)
    plan, got = None, []
    for _ in range(8):
        z = 0.95 * z + np.sqrt(1 - 0.95**2) * rng.standard_normal(256)
        p = np.exp(z) / np.exp(z).sum()
        load, other = (rng.multinomial(4096 * 8 * num_ranks, p) for _ in range(2))
        sizes = {"num_ranks": num_ranks, "slots_per_rank": slots_per_rank}
        if plan is not None:
            sizes |= {"previous": plan, "max_moved": max_moved}
        plan = jax_ep.plan_placement(load, **sizes)
        got.append(plan.imbalance(other)[0])
    assert np.mean(got[1:]) <= most


def test_a_small_max_copies_is_reported_with_its_cost(caplog):
    load = drawn_load("zipf 1", 256, 64, 5)
    with caplog.at_level(logging.WARNING, "jax_ep"):
        jax_ep.plan_placement(load, num_ranks=64, slots_per_rank=5)
        assert not caplog.records
        plan = jax_ep.plan_placement(load, num_ranks=64, slots_per_rank=5, max_copies=4)
    (record,) = caplog.records
    start = "max_copies is 4, which makes 1 of 1 layers less even; layer 0 wants"
    assert record.getMessage().startswith(start)
    assert f"at least {plan.lower_bound(load)[0]:.3f} of the mean, 1.000" in record.getMessage()


# --- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"load": [[1, 2], [np.nan, 1]]}, r"load\[1, 0\] is nan; allowed: finite numbers of at"),
        ({"load": [1, -1]}, r"load\[1\] is -1.0; allowed: finite numbers of at least 0"),
        ({"load": [1, 1e308]}, r"load\[1\] is 1e\+308; allowed: finite numbers .* up to 1e\+300"),
        ({"load": [True]}, "load is of dtype bool; allowed: integers or floats"),
        ({"load": 3}, r"load has shape \(\); allowed: \[layers, E\] or \[E\]"),
        ({"num_ranks": 0}, "num_ranks is 0; allowed: an int from 1"),
        ({"slots_per_rank": 1.5}, "slots_per_rank is 1.5; allowed: an int"),
        ({"max_copies": 0}, "max_copies is 0; allowed"),
        ({"num_nodes": 2}, "num_groups is None with num_nodes 2; allowed: both"),
        ({"num_nodes": 3, "num_groups": 3}, "num_nodes is 3; allowed: divisors of num_ranks 4"),
        ({"num_nodes": 2, "num_groups": 3}, "num_groups is 3; allowed: multiples of num_nodes 2"),
        ({"num_groups": 4}, "num_groups is 4; allowed: divisors of the 6 experts"),
        ({"alive": [1, 1, 1, 1]}, r"alive is int64\[4\]; allowed: bool\[4\]"),
        ({"alive": [False] * 4}, "alive has no rank"),
        (
            {"slots_per_rank": 1},
            "slots_per_rank is 1; allowed: at least 2, so that 4 alive ranks hold all 6 experts",
        ),
        (
            {"alive": [True, True, False, False]},
            "slots_per_rank is 2; allowed: at least 3, so that 2 alive ranks hold all 6 experts",
        ),
        (
            {"num_nodes": 2, "num_groups": 2, "alive": [True, True, False, False]},
            "alive has no rank of node 1; allowed: at least one",
        ),
        (
            {"num_nodes": 2, "num_groups": 2, "alive": [True, True, False, True]},
            "at least 3, so that 1 alive ranks of node 1 hold its 3 experts",
        ),
        ({"num_ranks": 1, "slots_per_rank": 7}, "slots_per_rank is 7; allowed with 1 rank: 6"),
        ({"max_moved": 3}, "max_moved is 3 without previous; allowed: None"),
        ({"max_moved": -1}, "max_moved is -1; allowed: None or an int of at least 0"),
        (
            {"previous": jax_ep.plan_placement(np.ones((2, 6)), num_ranks=4, slots_per_rank=2)},
            r"previous has .* \(2, 6, 4, 2\); allowed: \(1, 6, 4, 2\)",
        ),
    ],
)
def test_bad_arguments(arguments, message):
    arguments = {"load": np.ones(6), "num_ranks": 4, "slots_per_rank": 2, **arguments}
    with pytest.raises(ValueError, match=message):
        jax_ep.plan_placement(arguments.pop("load"), **arguments)


def test_a_previous_placement_with_too_many_copies():
    plan = jax_ep.plan_placement([9, 1, 1, 1], num_ranks=3, slots_per_rank=2)
    with pytest.raises(ValueError, match="max_copies is 2, and expert 0 of layer 0 has 3 copies"):
        jax_ep.plan_placement(
            [9, 1, 1, 1], num_ranks=3, slots_per_rank=2, previous=plan, max_copies=2
        )
