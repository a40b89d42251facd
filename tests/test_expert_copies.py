# SPDX-License-Identifier: Apache-2.0
"""`expand_experts` and `move_experts`: bits of copies, gradients, what is compiled, errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_ep
from ep_testing import dense_experts as dense
from ep_testing.dense_experts import F, H, K, assert_trees_close
from ep_testing.programs import make_mesh

RANKS, SLOTS, E = 4, 3, 8
P_ALL = RANKS * SLOTS
COPIES = 3
ROWS = H * F // 8  # of one expert's matrix, 8 elements each


def placement(slot_expert, max_copies=COPIES):
    slot_expert = np.asarray(slot_expert, np.int32)
    copies = np.full((E, max_copies), -1, np.int32)
    upper = np.full((E, max_copies), -1, np.int32)
    for expert in range(E):
        slots = np.flatnonzero(slot_expert == expert)
        copies[expert, : len(slots)] = slots
        upper[expert, : len(slots)] = 65536 * np.arange(1, len(slots) + 1) // len(slots)
    return jax_ep.PlacementArrays(*map(jnp.asarray, (slot_expert, copies, upper)))


OLD = placement([0, 1, 2, 3, 4, 0, 5, 6, 0, 7, 2, -1])
NEW = placement([0, 1, 2, 3, 5, 0, 5, 6, 4, 7, 2, 1])


def make_group(*, num_topk=COPIES, tokens=SLOTS * ROWS, capacity=SLOTS * ROWS, **config):
    sizes = {"num_experts": P_ALL, "num_topk": num_topk, "hidden": 8, "dtype": jnp.float32}
    sizes |= {"max_tokens_per_rank": tokens, "recv_capacity": capacity} | config
    mesh = make_mesh((RANKS,), ("expert",))
    return jax_ep.EpGroup(mesh, "expert", jax_ep.EpConfig(**sizes), backend="ffi")


def in_slots(values, arrays):
    """Of experts `[E, ...]`, as the slots have them; zeros where there is none."""
    slots = np.asarray(arrays.slot_expert)
    return np.where((slots >= 0).reshape(-1, *[1] * (values.ndim - 1)), values[slots], 0)


def expander(group):
    def on_rank(weights, arrays):
        return jax_ep.expand_experts(weights, arrays, group=group)

    return jax.jit(
        jax.shard_map(on_rank, mesh=group.mesh, in_specs=(P("expert"), P()), out_specs=P("expert"))
    )


def test_copies_have_the_bits_of_their_expert():
    weights = {name: w for name, w in dense.random_weights().items() if name.startswith("w_")}
    with make_group() as group:
        got = expander(group)(weights, OLD)
    for name, w in weights.items():
        np.testing.assert_array_equal(got[name], in_slots(np.asarray(w), OLD))


def test_gradients_of_copies_are_added_up_in_the_same_bits_each_time():
    w = dense.random_weights()["w_up"]
    bars = jnp.asarray(np.random.default_rng(0).standard_normal((P_ALL, H, F)), jnp.float32)
    with make_group() as group:
        grad = jax.jit(jax.grad(lambda w: (expander(group)(w, OLD) * bars).sum()))
        got, again = grad(w), grad(w)
    np.testing.assert_array_equal(got, again)
    slots = np.asarray(OLD.slot_expert)
    want = np.stack([np.asarray(bars, np.float64)[slots == e].sum(axis=0) for e in range(E)])
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_a_layer_with_copies_learns_what_one_without_does():
    weights = dense.random_weights(biases=False)
    x, idx, w = dense.random_tokens((RANKS * 6,))
    sizes = {"num_topk": K, "hidden": H, "max_tokens_per_rank": 8, "dtype": jnp.float32}
    mesh = make_mesh((RANKS,), ("expert",))
    config = jax_ep.EpConfig(num_experts=P_ALL, **sizes)
    with make_group() as weight_group, jax_ep.EpGroup(mesh, "expert", config) as group:

        def on_rank(x, idx, w, weights, arrays):
            slots = jax_ep.place(idx, arrays, group=group)
            own = jax_ep.expand_experts(weights, arrays, group=weight_group)
            return jax_ep.moe(
                x, slots, w, *(own[n] for n in ("w_gate", "w_up", "w_down")), group=group
            )

        rank = P("expert")
        specs = (rank, rank, rank, rank, P())
        f = jax.shard_map(on_rank, mesh=mesh, in_specs=specs, out_specs=rank)

        def loss(x, w, weights):
            return (f(x, idx, w, weights, OLD) * x).sum()

        got = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(x, w, weights)
    want = jax.value_and_grad(
        lambda x, w, p: (dense.block(x, idx, w, p) * x).sum(), argnums=(0, 1, 2)
    )(x, w, weights)
    assert_trees_close(got, want)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "float8_e4m3fn"])
def test_moved_weights_have_the_bits_of_their_source(dtype):
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 256, (E, H, F * jnp.dtype(dtype).itemsize)).astype(np.uint8)
    values = jnp.asarray(bits.view(jnp.dtype(dtype)))
    with make_group() as group:
        params = jnp.asarray(in_slots(np.asarray(values), OLD))
        params = jax.device_put(params, NamedSharding(group.mesh, P("expert")))
        moved = jax_ep.move_experts({"w": params}, old=OLD, new=NEW, group=group)["w"]
        assert params.is_deleted()
    want = in_slots(np.asarray(values), NEW)
    np.testing.assert_array_equal(np.asarray(moved).view(np.uint8), want.view(np.uint8))


def test_further_moves_compile_nothing_and_have_no_collective():
    rng = np.random.default_rng(1)
    values = rng.standard_normal((E, H, F)).astype(np.float32)
    old, slots = OLD, np.asarray(OLD.slot_expert)
    with make_group(num_topk=RANKS) as group:
        sharding = NamedSharding(group.mesh, P("expert"))
        params = jax.device_put(in_slots(values, old), sharding)
        compiled = []
        jax.monitoring.register_event_duration_secs_listener(
            lambda event, _, **__: compiled.append(event) if "backend_compile" in event else None
        )
        for step in range(6):
            slots = slots.copy()
            slots[rng.integers(P_ALL)] = rng.integers(E)
            if len(set(slots[slots >= 0])) < E:
                slots = np.asarray(old.slot_expert)
            new = placement(slots, max_copies=P_ALL)
            params = jax_ep.move_experts(params, old=old, new=new, group=group)
            np.testing.assert_array_equal(params, in_slots(values, new))
            old = new
            if step == 1:
                compiled.clear()
        jax.monitoring.clear_event_listeners()
    assert compiled == []


ROOM = "allowed: up to EpConfig"
WIRE = {"wire_dtype": jnp.float8_e4m3fn}
BAD_MOVES = [
    (WIRE, {}, "wire_dtype float8_e4m3fn and .*; allowed for move_experts: None and 1"),
    ({"expert_alignment": 4}, {}, "expert_alignment 4; allowed for move_experts: None and 1"),
    ({}, {"params": jnp.zeros((P_ALL, H, F), bool)}, "array of bool; allowed: EpConfig.dtype"),
    ({}, {"params": jnp.zeros((P_ALL, H, F), jnp.int4)}, "array of int4; allowed: EpConfig.dtype"),
    ({"dtype": jnp.bfloat16}, {}, "array of float32; allowed: EpConfig.dtype, bfloat16"),
    ({"tokens": SLOTS * ROWS - 1}, {}, f"a rank's weights are {SLOTS * ROWS} rows; {ROOM}.max_tok"),
    ({"capacity": ROWS - 1}, {}, f"a rank gets {ROWS} rows of weights; {ROOM}.recv_capacity"),
    ({"num_topk": 1}, {"new": placement([0, 1, 2, 3, 4, 5, 5, 6, 5, 7, 2, -1])},
     "copies of one slot"),
    ({}, {"new": placement([0, 1, 2, 3, 4, 0, 5, 6, 0, 7, 2, -1]), "old": placement([0] * 12, 12)},
     "new has expert 1 in slot 1, and old has it nowhere"),
    ({}, {"old": 3}, "old is a int; allowed: what ExpertPlacement.layer gives"),
    ({}, {"params": jnp.zeros((P_ALL, 3))}, r"float32\[12, 3\]; allowed: \[12, ...\] with"),
    ({}, {"params": jnp.zeros((E, H, F))}, r"float32\[8, 16, 24\]; allowed: \[12, ...\]"),
]  # fmt: skip


@pytest.mark.parametrize(("config", "changed", "message"), BAD_MOVES)
def test_moves_that_do_not_fit(config, changed, message):
    arguments = {"params": jnp.zeros((P_ALL, H, F)), "old": OLD, "new": NEW} | changed
    with make_group(**config) as group, pytest.raises(ValueError, match=message):
        jax_ep.move_experts(arguments.pop("params"), **arguments, group=group)


def test_nothing_is_given_away_where_one_of_the_arrays_does_not_fit():
    with make_group() as group:
        sharding = NamedSharding(group.mesh, P("expert"))
        good = jax.device_put(jnp.zeros((P_ALL, H, F)), sharding)
        move = functools.partial(jax_ep.move_experts, old=OLD, new=NEW, group=group)
        with pytest.raises(ValueError, match="allowed"):
            move({"a": good, "b": jnp.zeros((P_ALL, 3))})
        with pytest.raises(ValueError, match="params has an array twice"):
            move({"a": good, "b": good})
        assert not good.is_deleted()
        move(good)
        with pytest.raises(ValueError, match="that was donated before; allowed: what was returned"):
            move(good)


def test_moves_on_explicit_axes_beside_others():
    kinds = (AxisType.Explicit,) * 2
    mesh = jax.make_mesh((2, RANKS), ("data", "expert"), axis_types=kinds)
    sizes = {"num_experts": P_ALL, "num_topk": COPIES, "hidden": 8, "dtype": jnp.float32}
    config = jax_ep.EpConfig(max_tokens_per_rank=SLOTS * ROWS, **sizes)
    values = np.random.default_rng(0).standard_normal((E, H, F)).astype(np.float32)
    with jax_ep.EpGroup(mesh, "expert", config, backend="ffi") as group:
        params = jax.device_put(in_slots(values, OLD), NamedSharding(mesh, P("expert")))
        moved = jax_ep.move_experts(params, old=OLD, new=NEW, group=group)
    np.testing.assert_array_equal(moved, in_slots(values, NEW))


BAD_EXPANSIONS = [
    (WIRE, {}, "allowed for expand_experts: None and 1"),
    ({"num_topk": 2}, {}, "up to 3 copies; allowed: .* EpConfig.num_topk copies, which is 2"),
    ({"capacity": SLOTS * ROWS - 1}, {}, f"a rank gets {SLOTS * ROWS} rows of weights; {ROOM}"),
    (
        {},
        {"weights": jnp.zeros((E, H, F), jnp.bfloat16)},
        "an array of bfloat16; allowed",
    ),
    ({}, {"weights": jnp.zeros((RANKS, H, F))}, r"float32\[1, 16, 24\]; allowed: \[2, ...\]"),
]


@pytest.mark.parametrize(("config", "changed", "message"), BAD_EXPANSIONS)
def test_expansions_that_do_not_fit(config, changed, message):
    weights = changed.get("weights", jnp.zeros((E, H, F)))
    with make_group(**config) as group, pytest.raises(ValueError, match=message):
        jax.eval_shape(functools.partial(expander(group)), weights, OLD)


# --- lost experts --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_experts_of_a_lost_rank_come_from_copies_and_from_the_host(dtype):
    load = np.arange(1, E + 1)
    plan = jax_ep.plan_placement(load, num_ranks=RANKS, slots_per_rank=SLOTS)
    alive = np.array([True, True, False, True])
    left = plan.only_alive(alive)
    lost = plan.lost(alive)[0]
    assert 0 < lost.sum() < E
    np.testing.assert_array_equal((left.copies[0] >= 0).any(axis=1), ~lost)
    assert (left.slot_expert.reshape(RANKS, -1)[~alive] == -1).all()
    new = jax_ep.plan_placement(
        load, num_ranks=RANKS, slots_per_rank=SLOTS, alive=alive, previous=plan
    )
    rng = np.random.default_rng(0)
    values = {n: (9 * rng.standard_normal((E, H, F))).astype(dtype) for n in ("up", "down")}
    asked = []

    def load_expert(layer, expert):
        asked.append((layer, expert))
        return {name: value[expert] for name, value in values.items()}

    with make_group() as group:
        sharding = NamedSharding(group.mesh, P("expert"))
        params = {n: in_slots(v, plan.layer(0)) for n, v in values.items()}
        for value in params.values():  # what the lost rank had is gone
            value.reshape(RANKS, SLOTS, H, F)[~alive] = 0
        params = {n: jax.device_put(v, sharding) for n, v in params.items()}
        arrays = {"old": left.layer(0), "new": new.layer(0)}
        with pytest.raises(ValueError, match=r"old has it nowhere; allowed: .* or keep_lost"):
            jax_ep.move_experts(params, **arrays, group=group)
        moved = jax_ep.move_experts(params, **arrays, group=group, keep_lost=True)
        restored = jax_ep.restore_experts(
            moved, arrays["new"], load_expert, old=arrays["old"], layer=7
        )
        assert asked == [(7, expert) for expert in np.flatnonzero(lost)]
        for name, value in values.items():
            slots = new.slot_expert[0] >= 0
            got = np.asarray(restored[name])[slots]
            np.testing.assert_array_equal(got, in_slots(value, arrays["new"])[slots])
            assert restored[name].sharding == sharding
            assert not moved[name].is_deleted()


def test_all_experts_are_restored_on_any_sharding():
    values = np.random.default_rng(0).standard_normal((E, H, F)).astype(np.float32)
    mesh = make_mesh((2, 2, 2), ("expert", "data", "tensor"))
    for spec in (P("expert", None, "tensor"), P(None, "expert"), P()):
        empty = jax.device_put(jnp.zeros((P_ALL, H, F)), NamedSharding(mesh, spec))
        got = jax_ep.restore_experts([empty], OLD, lambda layer, expert: [values[expert]])[0]
        np.testing.assert_array_equal(got, in_slots(values, OLD))
        assert got.sharding == empty.sharding
    same = jax_ep.restore_experts([empty], OLD, lambda layer, expert: [], old=OLD)[0]
    assert same is empty


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"new": 3}, "new is a int; allowed: what ExpertPlacement.layer gives"),
        ({"old": 3}, "old is a int; allowed: what ExpertPlacement.layer gives"),
        ({"load_expert": 3}, "load_expert is a int; allowed: a function of the layer and"),
        ({"params": [np.zeros((P_ALL, 2), "f")]}, r"params have \[12, 2\]; allowed: JAX arrays"),
        ({"params": [jnp.zeros((E, 2))]}, r"params have \[8, 2\]; allowed: JAX arrays \[12, ...\]"),
        ({"load_expert": lambda *_: {}}, r"load_expert\(0, 0\) gave .*; allowed: a pytree like"),
        (
            {"load_expert": lambda *_: [np.zeros(2, "i")]},
            r"load_expert\(0, 0\) gave int32\[2\]; allowed: float32\[2\], as params have",
        ),
        ({"load_expert": lambda *_: [2]}, "gave int; allowed: float32"),
    ],
)
def test_what_cannot_be_restored(changed, message):
    arguments = {
        "params": [jnp.zeros((P_ALL, 2))],
        "new": OLD,
        "load_expert": lambda *_: [np.zeros(2, "f")],
    } | changed
    positional = [arguments.pop(name) for name in ("params", "new", "load_expert")]
    with pytest.raises(ValueError, match=message):
        jax_ep.restore_experts(*positional, **arguments)
