# SPDX-License-Identifier: Apache-2.0
"""`place`: against the oracle, the shares it gives, what it depends on, and MoE over slots."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jax_ep
from ep_testing import dense_experts
from ep_testing.hlo import collectives
from ep_testing.programs import make_mesh, over_ranks
from jax_ep import reference

RANKS, TOKENS, EXPERTS, SLOTS, TOPK = 4, 33, 8, 3, 2


def make_group(num_slots=RANKS * SLOTS, backend="xla", *, mesh=None, axis_name="expert", **options):
    options = {"num_topk": TOPK, "hidden": dense_experts.H, "dtype": "float32", **options}
    config = jax_ep.EpConfig(num_experts=num_slots, max_tokens_per_rank=64, **options)
    mesh = mesh or make_mesh((RANKS,), ("expert",))
    return jax_ep.EpGroup(mesh, axis_name, config, backend=backend)


def plan_of(num_experts=EXPERTS, slots_per_rank=SLOTS, *, seed=0, num_ranks=RANKS):
    load = np.exp(2 * np.random.default_rng(seed).standard_normal(num_experts))
    return jax_ep.plan_placement(load, num_ranks=num_ranks, slots_per_rank=slots_per_rank)


def routing(num_experts=EXPERTS, num_tokens=TOKENS, *, seed=1):
    """`[R, T, K]`, distinct in each token, some -1."""
    rng = np.random.default_rng(seed)
    idx = np.argsort(rng.random((RANKS, num_tokens, num_experts)), axis=-1)[..., :TOPK]
    return np.where(rng.random(idx.shape) < 0.1, -1, idx).astype(np.int32)


def run(group, arrays, topk_idx, token_ids=None, **kwargs):
    """Of all ranks: `[R, T, K]` in and out."""

    def on_rank(topk_idx, *token_ids):
        (ids,) = token_ids or (None,)
        return jax_ep.place(topk_idx, arrays, group=group, token_ids=ids)

    ids = () if token_ids is None else (token_ids,)
    return np.asarray(over_ranks(group, on_rank, **kwargs)(topk_idx, *ids))


@pytest.mark.parametrize("dtype", [None, np.int32, np.uint32])
@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("num_experts", [EXPERTS, 5, 12])
def test_agrees_with_the_oracle(num_experts, check_vma, dtype):
    plan, idx = plan_of(num_experts), routing(num_experts)
    ids = None
    if dtype is not None:
        info = np.iinfo(dtype)
        ids = np.random.default_rng(2).integers(info.min, info.max, idx.shape[:2], dtype)
    with make_group() as group:
        got = run(group, plan.layer(0), idx, ids, check_vma=check_vma)
    want = reference.place(idx, plan.copies[0], plan.upper[0], token_ids=ids)
    assert got.dtype == np.int32
    np.testing.assert_array_equal(got, want)
    # The experts are those that were selected; slots of a token are distinct.
    experts = np.where(got >= 0, plan.slot_expert[0][np.maximum(got, 0)], -1)
    np.testing.assert_array_equal(experts, idx)
    if num_experts < RANKS * SLOTS:
        used = np.unique(got[got >= 0])
        assert len(used) > num_experts


def test_by_hand():
    """Expert 1, token 2, rank 3, by arithmetic that is written out once more."""
    h = (0x9E3779B1 + 2 * 0x85EBCA77 + 3 * 0xC2B2AE3D) % 2**32
    h ^= h // 2**15
    h = h * 0x2C1B3C6D % 2**32
    h ^= h // 2**12
    h = h * 0x297A2D39 % 2**32
    h ^= h // 2**15
    u = h // 2**16
    idx = np.full((4, 3, 1), -1, np.int32)
    idx[3, 2] = 1
    copies = np.array([[0, -1, -1], [1, 2, 3]], np.int32)
    for first, second, want in ((u, 65536, 2), (u + 1, 65536, 1), (0, u, 3), (0, u + 1, 2)):
        upper = np.array([[65536, -1, -1], [first, second, 65536]], np.int32)
        assert reference.place(idx, copies, upper)[3, 2, 0] == want
        tables = np.array([0, 1, 1, 1], np.int32), copies, upper
        arrays = jax_ep.PlacementArrays(*map(jnp.asarray, tables))
        with make_group(4, num_topk=1) as group:
            assert run(group, arrays, idx)[3, 2, 0] == want


def test_what_is_no_expert_or_has_no_copy_is_no_selection():
    plan = plan_of()
    copies, upper = plan.copies[0].copy(), plan.upper[0].copy()
    copies[0] = upper[0] = -1
    idx = np.broadcast_to(np.int32([[0, -1], [8, -2], [2**31 - 1, 7]]), (RANKS, 3, 2))
    arrays = jax_ep.PlacementArrays(*map(jnp.asarray, (plan.slot_expert[0], copies, upper)))
    with make_group() as group:
        got = run(group, arrays, idx)
    assert (got.reshape(RANKS, -1)[:, :5] == -1).all()
    assert (plan.slot_expert[0][got[:, 2, 1]] == 7).all()
    np.testing.assert_array_equal(got, reference.place(idx, copies, upper))


def test_copies_get_their_shares():
    """Chi-square of 2^20 tokens: row numbers, and ids that are far apart."""
    load = np.array([1.0, 5.0, 1.0, 1.0, 2.0])
    plan = jax_ep.plan_placement(load, num_ranks=RANKS, slots_per_rank=2)
    num_tokens = 2**18
    expert = int((plan.copies[0] >= 0).sum(axis=1).argmax())
    idx = np.full((RANKS, num_tokens, 1), expert, np.int32)
    ids = np.arange(RANKS * num_tokens, dtype=np.uint32).reshape(RANKS, -1) * np.uint32(4093)
    count = int((plan.copies[0, expert] >= 0).sum())
    shares = np.diff(plan.upper[0, expert, :count], prepend=0) / 65536
    assert count >= 3
    with make_group(RANKS * 2, num_topk=1) as group:
        for token_ids in (None, ids):
            slots = run(group, plan.layer(0), idx, token_ids)
            for got in (slots, slots[0], slots[3], slots[:, :4096], slots[:, 1::2]):
                seen = np.bincount(got.ravel(), minlength=RANKS * 2)[plan.copies[0, expert, :count]]
                expected = shares * got.size
                assert seen.sum() == got.size
                chi_square = ((seen - expected) ** 2 / np.maximum(expected, 1e-9)).sum()
                # Exceeded by one in 10,000 of random draws, for 3 degrees of freedom.
                assert chi_square < 21.1


def test_ranks_do_not_pick_the_same_copies():
    plan = plan_of()
    expert = int((plan.copies[0] >= 0).sum(axis=1).argmax())
    idx = np.full((RANKS, 64, TOPK), -1, np.int32)
    idx[..., 0] = expert
    with make_group() as group:
        got = run(group, plan.layer(0), idx)[..., 0]
    assert all((got[0] != got[rank]).any() for rank in range(1, RANKS))


def test_with_token_ids_the_neighbors_do_not_matter():
    plan, idx = plan_of(), routing()
    rng = np.random.default_rng(3)
    ids = rng.integers(0, 2**31 - 1, idx.shape[:2], np.int32)
    order = rng.permutation(TOKENS)
    with make_group() as group:
        slots = run(group, plan.layer(0), idx, ids)
        shuffled = run(group, plan.layer(0), idx[:, order], ids[:, order])
        np.testing.assert_array_equal(shuffled, slots[:, order])
        few = run(group, plan.layer(0), idx[:, 5:8], ids[:, 5:8])
        np.testing.assert_array_equal(few, slots[:, 5:8])
        # Without them they do.
        assert (run(group, plan.layer(0), idx[:, order]) != slots[:, order]).any()
        # One token's id moves no other token.
        moved = []
        for number in range(20):
            other = ids.copy()
            other[:, 7] = number
            got = run(group, plan.layer(0), idx, other)
            rest = np.arange(TOKENS) != 7
            np.testing.assert_array_equal(got[:, rest], slots[:, rest])
            moved.append((got[:, 7] != slots[:, 7]).any())
        assert any(moved)


def test_a_new_placement_compiles_nothing():
    first, second = plan_of(seed=0), plan_of(seed=1)
    idx = routing()
    traces = []
    with make_group() as group:

        def on_rank(topk_idx, arrays):
            traces.append(1)
            return jax_ep.place(topk_idx[0], arrays, group=group)[None]

        spec = P("expert")
        program = jax.jit(
            jax.shard_map(on_rank, mesh=group.mesh, in_specs=(spec, P()), out_specs=spec)
        )
        for plan in (first, second):
            want = reference.place(idx, plan.copies[0], plan.upper[0])
            np.testing.assert_array_equal(program(idx, plan.layer(0)), want)
        assert len(traces) == 1
        # No rank asks another one.
        text = program.lower(idx, first.layer(0)).compile().as_text()
    assert not collectives(text)


def test_ranks_over_two_axes():
    """The rank is the position along the axes in row-major order, not a device's number."""
    plan, idx = plan_of(), routing()
    mesh = make_mesh((2, 2), ("a", "b"), order=[3, 1, 0, 2])
    with make_group(mesh=mesh, axis_name=("b", "a")) as group:
        got = run(group, plan.layer(0), idx)
    np.testing.assert_array_equal(got, reference.place(idx, plan.copies[0], plan.upper[0]))


# --- MoE over slots ----------------------------------------------------------------------------

WEIGHTS = ("w_gate", "w_up", "w_down")


def over_slots(group, arrays, x, idx, weights, matrices):
    """`moe` of tokens `[R * T, ...]`, with copies of the logical experts' `[E, ...]` in slots."""
    stored = [matrices[name][jnp.maximum(arrays.slot_expert, 0)] for name in WEIGHTS]

    def on_rank(x, idx, weights, arrays, *matrices):
        slots = jax_ep.place(idx, arrays, group=group)
        return jax_ep.moe(x, slots, weights, *matrices, group=group)

    split, whole = P("expert"), P()
    specs = (split, split, split, whole, split, split, split)
    layer = jax.shard_map(on_rank, mesh=group.mesh, in_specs=specs, out_specs=split)
    return layer(x, idx, weights, arrays, *stored)


@pytest.mark.parametrize("slots_per_rank", [2, 3, 5])
def test_moe_over_slots_is_the_logical_layer(slots_per_rank, backend):
    """Values, and gradients summed over copies."""
    x, idx, weights = dense_experts.random_tokens((RANKS * 16,))
    idx = idx.at[::3, 0].set(-1)
    matrices = dense_experts.random_weights(biases=False)
    plan = plan_of(dense_experts.E, slots_per_rank)
    arrays = plan.layer(0)
    with make_group(RANKS * slots_per_rank, backend) as group:
        layer = functools.partial(over_slots, group, arrays)
        got = jax.jit(layer)(x, idx, weights, matrices)
        want = dense_experts.block(x, idx, weights, matrices)
        dense_experts.assert_trees_close(got, want)

        def loss(f, x, weights, matrices):
            return jnp.square(f(x, idx, weights, matrices)).sum()

        def gradients(f):
            of = jax.grad(functools.partial(loss, f), argnums=(0, 1, 2))
            return jax.jit(of)(x, weights, matrices)

        dense_experts.assert_trees_close(gradients(layer), gradients(dense_experts.block))


def test_copies_even_out_the_rows_of_ranks():
    """One expert is in nearly every token: without copies its rank has most of the rows."""
    rng = np.random.default_rng(0)
    p = 1 / np.arange(1, 17) ** 1.2
    idx = np.argsort(-(np.log(p) + rng.gumbel(size=(RANKS, 64, 16))), axis=-1)[..., :TOPK]
    load = np.bincount(idx.ravel(), minlength=16)
    plan = jax_ep.plan_placement(load, num_ranks=RANKS, slots_per_rank=5)
    with make_group(RANKS * 5) as group:
        slots = run(group, plan.layer(0), idx.astype(np.int32))
    before = np.bincount(idx.ravel() // 4, minlength=RANKS)
    after = np.bincount(slots.ravel() // 5, minlength=RANKS)
    assert before.max() > 1.8 * before.mean()
    assert after.max() < 1.15 * after.mean()


# --- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"topk_idx": np.zeros((4, 3), np.int32)},
            r"topk_idx is int32\[4, 3\]; allowed: int32\[T, 2\], K as EpConfig.num_topk",
        ),
        ({"topk_idx": np.zeros((4, 2), np.int16)}, r"topk_idx is int16\[4, 2\]; allowed: int32"),
        ({"arrays": (1, 2, 3)}, "arrays is a tuple; allowed: a PlacementArrays, as ExpertPlace"),
        (
            {"arrays": 4},
            r"arrays.slot_expert is int32\[16\]; allowed: int32\[12\], a slot for each",
        ),
        (
            {"arrays": 6},
            r"arrays is a placement for 6 ranks; allowed: one for the group's 4",
        ),
        ({"token_ids": np.zeros(3, np.int32)}, r"token_ids is int32\[3\]; allowed: int32\[4\], or"),
        ({"token_ids": np.zeros(4, "f")}, r"token_ids is float32\[4\]; allowed: int32\[4\], or"),
        ({"group": None}, "group is a NoneType; allowed: an EpGroup"),
    ],
)
def test_errors(change, message):
    arguments = {"topk_idx": np.zeros((4, 2), np.int32), "arrays": plan_of().layer(0), **change}
    if arguments["arrays"] == 4:
        arguments["arrays"] = plan_of(slots_per_rank=4).layer(0)
    if arguments["arrays"] == 6:
        other = jax_ep.plan_placement(np.ones(8), num_ranks=6, slots_per_rank=2)
        arguments["arrays"] = other.layer(0)
    with make_group() as group:
        arguments = {"group": group, **arguments}
        with pytest.raises(ValueError, match=message):
            over_ranks(group, lambda _: jax_ep.place(**arguments))(np.zeros((RANKS, 1)))


def test_tables_must_have_one_shape():
    arrays = plan_of().layer(0)
    arrays = dataclasses.replace(arrays, upper=arrays.upper[:, :2])
    with make_group() as group, pytest.raises(ValueError, match=r"arrays.upper is int32\[8, 2\]"):
        run(group, arrays, routing())


def test_outside_of_shard_map_and_after_close():
    idx, arrays = np.zeros((4, 2), np.int32), plan_of().layer(0)
    message = r"place must be called inside jax\.shard_map"
    with make_group() as group, pytest.raises(ValueError, match=message):
        jax_ep.place(idx, arrays, group=group)
    with pytest.raises(jax_ep.EpGroupClosed):
        jax_ep.place(idx, arrays, group=group)
