# SPDX-License-Identifier: Apache-2.0
"""`ExpertPlacement`: equality, files, arrays, and what it refuses."""

import os
import pickle
import subprocess
import sys

import jax
import numpy as np
import pytest

import jax_ep


def lognormal(shape, seed=0):
    return np.exp(np.random.default_rng(seed).standard_normal(shape))


def example():
    return jax_ep.plan_placement(lognormal((2, 6)), num_ranks=4, slots_per_rank=2)


def test_arrays_are_read_only_int32():
    plan = example()
    for name in ("slot_expert", "copies", "upper", "alive"):
        array = getattr(plan, name)
        assert array.dtype == (bool if name == "alive" else np.int32)
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0


def test_placements_are_equal_by_content(tmp_path):
    plan, other = example(), example().reshare(lognormal((2, 6), 1))
    copy = pickle.loads(pickle.dumps(plan))
    path = tmp_path / "placement"
    plan.save(path)
    for same in (copy, jax_ep.ExpertPlacement.load(path)):
        assert same == plan
        assert (hash(same), same.digest) == (hash(plan), plan.digest)
        assert not same.slot_expert.flags["W"]
    assert plan != other
    assert plan.digest != other.digest
    assert plan != 3
    assert len(plan.digest) == 16
    assert int(plan.digest, 16) >= 0
    assert plan.digest in repr(plan)
    assert (other.slot_expert == plan.slot_expert).all()


def test_files_of_other_kinds_are_refused(tmp_path):
    path = tmp_path / "file.npz"
    np.savez(path, load=np.ones(3))
    with pytest.raises(ValueError, match=r"has no \['version', 'slot_expert'"):
        jax_ep.ExpertPlacement.load(path)
    plan = example()
    arrays = {n: getattr(plan, n) for n in ("slot_expert", "copies", "upper", "alive")}
    np.savez(path, version=2, **arrays)
    with pytest.raises(ValueError, match=r"is of version 2; allowed: 1"):
        jax_ep.ExpertPlacement.load(path)


def test_a_layers_arrays_are_a_pytree():
    plan = example()
    arrays = plan.layer(-1)
    assert [leaf.shape for leaf in jax.tree.leaves(arrays)] == [(8,), (6, 4), (6, 4)]
    for name in ("slot_expert", "copies", "upper"):
        np.testing.assert_array_equal(getattr(arrays, name), getattr(plan, name)[1])
        assert getattr(arrays, name).dtype == np.int32


def test_planning_needs_no_jax(tmp_path):
    path = tmp_path / "placement.npz"
    example().save(path)
    code = (
        "import sys\n"
        "sys.modules['jax'] = sys.modules['jaxlib'] = None\n"
        "import jax_ep\n"
        f"plan = jax_ep.ExpertPlacement.load({str(path)!r})\n"
        "again = jax_ep.plan_placement([[1, 2], [3, 4]], num_ranks=2, slots_per_rank=2)\n"
        "print(plan.digest)\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == example().digest, done.stderr


def _changed(**arrays):
    plan = example()
    fields = ("slot_expert", "copies", "upper", "alive")
    given = {name: np.array(getattr(plan, name)) for name in fields}
    for name, change in arrays.items():
        given[name] = change(given[name])
    return jax_ep.ExpertPlacement(**given)


def _with(index, value):
    def change(array):
        array[index] = value
        return array

    return change


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"alive": lambda a: a[:3]}, r"have the shapes .*allowed: \[layers, R \* S\]"),
        ({"upper": lambda a: a[:1]}, "have the shapes"),
        ({"slot_expert": _with((0, 0), 6)}, r"has values from 0 to 6; allowed: -1 to 5"),
        ({"copies": lambda a: a[::-1]}, "copies does not have the slots"),
        ({"upper": lambda a: a - 1}, "upper does not ascend"),
        ({"alive": lambda a: ~a}, "experts on ranks that are not alive"),
    ],
)
def test_arrays_that_do_not_fit_each_other_are_refused(arrays, message):
    with pytest.raises(ValueError, match=message):
        _changed(**arrays)


def test_two_copies_on_one_rank_are_refused():
    with pytest.raises(ValueError, match="slot_expert has expert 0 twice on rank 1 of layer 0"):
        jax_ep.ExpertPlacement(
            [[0, 1, 0, 0]], [[[0, 2, 3], [1, -1, -1]]], [[[1, 2, 3]] * 2], [1, 1]
        )


def test_loads_and_placements_of_other_shapes():
    plan = example()
    for method in (plan.imbalance, plan.lower_bound, plan.reshare):
        with pytest.raises(ValueError, match=r"load has shape \(6,\); allowed: \[2, 6\]$"):
            method(np.ones(6))
    with pytest.raises(ValueError, match=r"alive is bool\[3\]; allowed: bool\[4\]"):
        plan.lost(np.ones(3, bool))
    with pytest.raises(ValueError, match=r"old has slot_expert of shape \(1, 8\)"):
        plan.moves(jax_ep.plan_placement(np.ones(6), num_ranks=4, slots_per_rank=2))
