# SPDX-License-Identifier: Apache-2.0
"""`Rebalancer` and `python -m jax_ep plan`."""

import logging
import math
import re

import numpy as np
import pytest

import jax_ep
from jax_ep.__main__ import main
from jax_ep._src.balancing import report

R, S, E = 4, 5, 16


def lognormal(*shape, seed=0):
    return np.exp(np.random.default_rng(seed).standard_normal(shape))


def plan(load):
    return jax_ep.plan_placement(load, num_ranks=R, slots_per_rank=S)


def made_uneven(placement, load, layer=0, by=1.5):
    """Loads for which one copy's rank is hot, and other shares would not help."""
    load = np.array(load)
    alone = np.flatnonzero((placement.copies[layer] >= 0).sum(axis=1) == 1)
    rank = placement.copies[layer, alone, 0] // placement.slots_per_rank
    for expert in alone[rank == rank[0]]:
        load[layer, expert] *= by
    return load


def test_nothing_happens_before_the_end_of_a_window_or_while_loads_are_even():
    load = lognormal(2, E)
    rebalancer = jax_ep.Rebalancer(plan(load), every=10)
    for _ in range(25):
        assert rebalancer.observe(load) is None
    assert rebalancer.placement == plan(load)
    assert rebalancer.age_steps == 25
    # What is seen after the window's end is in the next one.
    assert rebalancer.observe(load * 0, steps=5) is None
    assert rebalancer.metrics()["jax_ep_placement_imbalance"] < 1.03


def test_shares_change_first(caplog):
    """Expert 0 has two copies with experts beside them whose loads change a little."""
    placement = jax_ep.plan_placement([3, 3, 2], num_ranks=2, slots_per_rank=2)
    assert placement.slot_expert.tolist() == [[0, 1, 0, 2]]
    rebalancer = jax_ep.Rebalancer(placement, every=100, reshare_above=1.03, move_above=1.2)
    changed = [3, 2, 3]
    with caplog.at_level(logging.INFO, "jax_ep"):
        assert rebalancer.observe(changed, steps=99) is None
        assert not caplog.records
        assert rebalancer.observe(changed, steps=1) == "reshare"
    after = rebalancer.placement
    assert after == placement.reshare(changed)
    assert after.upper[0, 0].tolist() == [43691, 65536]
    (record,) = caplog.records
    assert record.getMessage() == (
        f"placement {placement.digest}, step 100: reshare of 1 of 1 layers, 0 slots move; "
        "imbalance of the worst layer 1.250 -> 1.000, mean 1.250 -> 1.000; age 100 steps, now "
        f"{after.digest}"
    )
    assert rebalancer.age_steps == 0
    assert rebalancer.metrics() == {
        "jax_ep_placement_age_steps": 0.0,
        "jax_ep_placement_imbalance": pytest.approx(1.25, abs=1e-4),
        "jax_ep_placement_moved_slots_total": 0.0,
    }


@pytest.mark.parametrize("max_moved", [1, 3, None])
def test_copies_move_where_shares_do_not_help(max_moved, caplog):
    load = lognormal(3, E)
    before = plan(load)
    uneven = made_uneven(before, load, layer=1, by=10)
    assert before.reshare(uneven).imbalance(uneven)[1] > 1.08
    rebalancer = jax_ep.Rebalancer(before, every=1, max_moved=max_moved)
    with caplog.at_level(logging.INFO, "jax_ep"):
        after = rebalancer.observe(uneven)
    assert isinstance(after, jax_ep.ExpertPlacement)
    assert rebalancer.placement is after
    # The other layers are even, and stay as they were to the bit.
    for name in ("slot_expert", "copies", "upper"):
        for layer in (0, 2):
            np.testing.assert_array_equal(getattr(after, name)[layer], getattr(before, name)[layer])
    moved = after.moves(before)
    assert 0 < moved <= (max_moved or E)
    assert after.imbalance(uneven)[1] < before.reshare(uneven).imbalance(uneven)[1]
    assert rebalancer.metrics()["jax_ep_placement_moved_slots_total"] == moved
    (record,) = caplog.records
    assert f"step 1: move of 1 of 3 layers, {moved} slots move" in record.getMessage()


def test_copies_do_not_move_where_they_may_not():
    load = lognormal(1, E)
    before = plan(load)
    uneven = made_uneven(before, load, by=3)
    for options in ({"move_above": math.inf}, {"max_moved": 0}):
        rebalancer = jax_ep.Rebalancer(before, every=1, **options)
        assert rebalancer.observe(uneven) == "reshare"
        assert rebalancer.placement.moves(before) == 0
        # The best shares are there already.
        assert rebalancer.observe(uneven) is None
        assert rebalancer.age_steps == 1


def test_it_follows_a_drifting_load():
    """Every decision of ten windows, judged on the window after it."""
    rng = np.random.default_rng(0)
    z = rng.standard_normal((2, 64))
    first = jax_ep.plan_placement(np.exp(z), num_ranks=8, slots_per_rank=10)
    rebalancer = jax_ep.Rebalancer(first, every=1, max_moved=8)
    fixed, got = [], []
    for _ in range(10):
        z = 0.95 * z + np.sqrt(1 - 0.95**2) * rng.standard_normal(z.shape)
        load = rng.poisson(1000 * np.exp(z))
        old = rebalancer.placement
        answer = rebalancer.observe(load)
        if isinstance(answer, jax_ep.ExpertPlacement):
            changed = answer.slot_expert != old.slot_expert
            assert changed.sum(axis=1).max() <= 8
        fixed.append(first.imbalance(load).mean())
        got.append(rebalancer.placement.imbalance(load).mean())
    assert np.mean(got) < 1.03 < 1.1 < np.mean(fixed)


def test_ranks_that_are_not_alive_get_nothing():
    load = lognormal(1, E)
    alive = np.array([True, True, True, True, False])
    sizes = {"num_ranks": 5, "slots_per_rank": S, "alive": alive}
    before = jax_ep.plan_placement(load, **sizes)
    rebalancer = jax_ep.Rebalancer(plan(load), every=2)
    rebalancer.observe(load)
    rebalancer.set_placement(before)
    uneven = made_uneven(before, load, by=4)
    assert rebalancer.observe(uneven) is None  # the window began anew
    after = rebalancer.observe(uneven)
    assert (after.alive == alive).all()
    assert (after.slot_expert.reshape(5, S)[4] == -1).all()


@pytest.mark.parametrize("nodes", [{}, {"num_nodes": 2, "num_groups": 4}])
def test_without_room_for_all_experts_shares_change_and_nothing_else(nodes):
    load = lognormal(2, E)
    whole = jax_ep.plan_placement(load, num_ranks=R, slots_per_rank=S, **nodes)
    # Three ranks have 15 slots for 16 experts, and the one of a node has 5 for its 8.
    left = whole.only_alive([False, True, True, True])
    assert left.lost(left.alive).any()
    rebalancer = jax_ep.Rebalancer(whole, every=1, move_above=1.03, **nodes)
    rebalancer.set_placement(left)
    uneven = load * np.where(left.copies[:, :, 0] // S == 3, 20, 1)
    assert left.reshare(uneven).imbalance(uneven).min() > 1.5
    for _ in range(2):
        assert not isinstance(rebalancer.observe(uneven), jax_ep.ExpertPlacement)
        assert rebalancer.placement.imbalance(uneven).tolist() == pytest.approx(
            left.reshare(uneven).imbalance(uneven), rel=1e-3
        )
    # With room it moves again.
    rebalancer.set_placement(whole)
    assert isinstance(rebalancer.observe(uneven), jax_ep.ExpertPlacement)


def test_groups_stay_on_their_node():
    nodes = {"num_nodes": 2, "num_groups": 4}
    load = lognormal(1, E)
    before = jax_ep.plan_placement(load, num_ranks=R, slots_per_rank=S, **nodes)
    rebalancer = jax_ep.Rebalancer(before, every=1, **nodes)
    after = rebalancer.observe(made_uneven(before, load, by=4))
    assert after.moves(before) > 0
    node = [p.slot_expert.reshape(2, -1) for p in (before, after)]
    for one, other in zip(*node, strict=True):
        assert set(one.tolist()) == set(other.tolist())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"placement": 3}, "placement is a int; allowed: an ExpertPlacement"),
        ({"every": 0}, "every is 0; allowed: an int from 1"),
        ({"max_moved": -1}, "max_moved is -1; allowed: None or an int of at least 0"),
        ({"reshare_above": 0.9}, "reshare_above is 0.9; allowed: finite, at least 1"),
        ({"reshare_above": math.nan}, "reshare_above is nan"),
        ({"move_above": 1.01}, r"move_above is 1.01; allowed: at least reshare_above, 1.03"),
    ],
)
def test_bad_arguments(arguments, message):
    arguments = {"placement": plan(lognormal(1, E)), **arguments}
    with pytest.raises(ValueError, match=message):
        jax_ep.Rebalancer(arguments.pop("placement"), **arguments)


def test_bad_counts():
    rebalancer = jax_ep.Rebalancer(plan(lognormal(2, E)))
    with pytest.raises(ValueError, match=r"load has shape \(16,\); allowed: \[2, 16\]$"):
        rebalancer.observe(np.ones(E))
    with pytest.raises(ValueError, match="steps is 0; allowed: an int from 1"):
        rebalancer.observe(np.ones((2, E)), steps=0)


# --- python -m jax_ep plan ---------------------------------------------------------------------


def numbers(text):
    """`[layers, 3]` of the table."""
    rows = re.findall(r"^ +\d+ +([\d.]+) +([\d.]+) +([\d.]+)  ", text, re.MULTILINE)
    return np.array(rows, float)


@pytest.mark.parametrize("name", ["load.npz", "only.npz", "load.npy"])
def test_the_command_prints_a_placement(name, tmp_path, capsys):
    load = lognormal(2, E)
    file, out = tmp_path / name, tmp_path / "placement.npz"
    if name == "load.npy":
        np.save(file, load)
    elif name == "only.npz":
        np.savez(file, counts=load)
    else:
        np.savez(file, load=load, other=np.ones(3))
    arguments = ["plan", str(file), "--num-ranks", str(R), "--slots-per-rank", str(S)]
    assert main([*arguments, "--out", str(out)]) == 0
    placement = plan(load)
    text = capsys.readouterr().out
    assert jax_ep.ExpertPlacement.load(out) == placement
    assert repr(placement) in text
    assert text.endswith(f"saved to {out}\n")
    before = load.reshape(2, R, -1).sum(axis=2)
    want = [before.max(axis=1) / before.mean(axis=1), placement.imbalance(load)]
    want = np.stack([*want, placement.lower_bound(load)], axis=1)
    np.testing.assert_allclose(numbers(text), want, atol=6e-4)
    rows = re.findall(r"^layer (\d+), rank (\d+): (.*)$", text, re.MULTILINE)
    assert len(rows) == 2 * R
    for layer, rank, experts in rows:
        slots = placement.slot_expert[int(layer)].reshape(R, S)[int(rank)]
        assert experts == " ".join(map(str, slots))


def test_the_command_with_groups_and_few_copies(tmp_path, capsys):
    load = lognormal(E)
    np.save(tmp_path / "load.npy", load)
    sizes = {"num_ranks": R, "slots_per_rank": S, "num_nodes": 2, "num_groups": 4, "max_copies": 2}
    options = [f"--{name.replace('_', '-')}={value}" for name, value in sizes.items()]
    assert main(["plan", str(tmp_path / "load.npy"), *options]) == 0
    assert repr(jax_ep.plan_placement(load, **sizes)) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arrays", "slots", "message"),
    [
        ({"a": np.ones(4), "b": np.ones(4)}, 2, r"has the arrays \['a', 'b'\]; allowed: 'load'"),
        ({"load": np.ones(16)}, 2, "slots_per_rank is 2; allowed: at least 4, so that 4 alive"),
        (None, 2, "No such file"),
    ],
)
def test_the_command_says_what_is_wrong(arrays, slots, message, tmp_path, capsys):
    file = tmp_path / "load.npz"
    if arrays:
        np.savez(file, **arrays)
    assert main(["plan", str(file), f"--num-ranks={R}", f"--slots-per-rank={slots}"]) == 1
    assert re.search(message, capsys.readouterr().err)


def test_without_copies_and_without_load():
    assert report.without_copies(np.zeros((1, 4)), 2).tolist() == [1.0]
    assert report.without_copies(np.array([[1.0, 1, 0]]), 2).tolist() == [2.0]
