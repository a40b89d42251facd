# SPDX-License-Identifier: Apache-2.0
"""What layers whose experts have copies are given: weights of others, placements, and errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jax_ep
from ep_testing.flax_layers import (
    EXPERT_WEIGHTS,
    EXPERTS,
    FFN,
    HIDDEN,
    LOAD,
    RANKS,
    SLOTS,
    make_group,
    make_nnx,
    plan_of,
)
from jax_ep.flax import linen as ep_linen
from jax_ep.flax import load_experts, stored_from_logical
from jax_ep.flax import nnx as ep_nnx


@pytest.fixture(scope="module")
def group():
    with make_group(num_experts=RANKS * SLOTS) as group:
        yield group


# --- checkpoints of others -----------------------------------------------------------------------


def test_load_experts_fills_slots(group):
    rng = np.random.default_rng(0)
    logical = {
        "gate": rng.standard_normal((EXPERTS, HIDDEN, FFN)).astype(np.float32),
        "up": rng.standard_normal((EXPERTS, HIDDEN, FFN)).astype(np.float32),
        "down": rng.standard_normal((EXPERTS, FFN, HIDDEN)).astype(np.float32),
        "router": rng.standard_normal((HIDDEN, EXPERTS)).astype(np.float32),
    }
    arrays = plan_of().layer(0)
    names = dict(zip(("gate", "up", "down"), EXPERT_WEIGHTS, strict=True)) | {"router": "router"}
    want = stored_from_logical({names[n]: a for n, a in logical.items()}, plan_of())
    moe = ep_nnx.MoE(group, FFN, placement=arrays, rngs=nnx.Rngs(0))
    load_experts(moe, layout="jax", **logical)
    alone = load_experts(layout="jax", placement=arrays, **logical)
    shapes = {n: jax.ShapeDtypeStruct(a.shape, a.dtype) for n, a in want.items()}
    linen = load_experts(shapes, layout="jax", placement=arrays, **logical)
    for name, values in want.items():
        for got in (getattr(moe, name).get_value(), alone[name], linen[name]):
            np.testing.assert_array_equal(got, values)
    expanded = ep_nnx.MoE(group, FFN, placement=arrays, replicas="expanded", rngs=nnx.Rngs(0))
    load_experts(expanded, layout="jax", **logical)
    np.testing.assert_array_equal(expanded.w_up.get_value(), logical["up"])
    with pytest.raises(ValueError, match="placement is given, and the layer has its own"):
        load_experts(moe, layout="jax", placement=arrays, **logical)
    with pytest.raises(ValueError, match="placement is a tuple; allowed: None, or the Placement"):
        load_experts(layout="jax", placement=(1, 2), **logical)
    short = {n: jax.ShapeDtypeStruct((6, *a.shape[1:]), a.dtype) for n, a in want.items()}
    del short["router"], logical["router"]
    with pytest.raises(ValueError, match="placement has 12 slots; allowed: 6, as the layer has"):
        load_experts(short, layout="jax", placement=arrays, **logical)


def test_slots_without_an_expert_get_zeros():
    plan = jax_ep.plan_placement(np.ones(3), num_ranks=4, slots_per_rank=1, max_copies=1)
    values = np.arange(1, 7, dtype=np.float32).reshape(3, 2)
    for array in (values, jnp.asarray(values)):
        got = stored_from_logical({"w": array, "router_bias": np.ones(3)}, plan)
        assert isinstance(got["w"], jax.Array) == isinstance(array, jax.Array)
        slots = plan.slot_expert[0]
        np.testing.assert_array_equal(got["w"], np.where(slots[:, None] < 0, 0, values[slots]))
        np.testing.assert_array_equal(got["router_bias"], np.ones(3))


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"replicas": "copied"}, "replicas is 'copied'; allowed: 'stored', 'expanded'"),
        (
            {"placement": None, "replicas": "expanded"},
            "replicas is 'expanded', and experts have no copies; allowed: 'stored', or a placement",
        ),
        ({"placement": plan_of()}, "placement is a ExpertPlacement; allowed: None, or the Placeme"),
        ({"num_logical_experts": 7}, "num_logical_experts is 7, and placement is of 8 experts"),
        (
            {"placement": None, "num_logical_experts": 0},
            "num_logical_experts is 0; allowed: None, or an int of at least 1",
        ),
        (
            {"placement": None, "num_logical_experts": 13},
            "slots_per_rank is 3; allowed: at least 4, so that 4 alive ranks hold all 13 experts",
        ),
        (
            {"placement": jax_ep.plan_placement(LOAD, num_ranks=6, slots_per_rank=2).layer(0)},
            "placement is a placement for 6 ranks; allowed: one for the group's 4",
        ),
        (
            {"placement": jax_ep.plan_placement(LOAD, num_ranks=4, slots_per_rank=2).layer(0)},
            r"placement.slot_expert is int32\[8\]; allowed: int32\[12\], a slot for each",
        ),
        (
            {"placement": None, "num_logical_experts": 6, "replicas": "expanded"},
            r"group has the axes \('expert',\) with 4 devices, and w_gate is \[6, 16, 12\]",
        ),
    ],
)
def test_errors_of_layers(group, options, message):
    options = {"placement": plan_of().layer(0)} | options
    with pytest.raises(ValueError, match=message):
        ep_nnx.MoE(group, FFN, rngs=nnx.Rngs(0), **options)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(
            ep_linen.MoE(group, FFN, **options).init, jax.random.key(0), jnp.zeros((8, HIDDEN))
        )


def test_errors_of_placements(group):
    moe = ep_nnx.MoE(group, FFN, placement=plan_of().layer(0), rngs=nnx.Rngs(0))
    tables = {name: getattr(moe, name).get_value() for name in ("slot_expert", "copies", "upper")}
    narrow = plan_of(max_copies=3).layer(0)
    other = jax_ep.plan_placement(LOAD, num_ranks=6, slots_per_rank=2).layer(0)
    for replace in (moe.set_placement, functools.partial(ep_linen.set_placement, tables)):
        with pytest.raises(ValueError, match="arrays is a ExpertPlacement; allowed: the Placement"):
            replace(plan_of())
        with pytest.raises(
            ValueError, match=r"arrays.copies is int32\[8, 3\]; allowed: int32\[8, "
        ):
            replace(narrow)
    with pytest.raises(ValueError, match="arrays is a placement for 6 ranks; allowed"):
        moe.set_placement(other)
    with make_group() as plain_group:
        plain = make_nnx(plain_group)
    with pytest.raises(ValueError, match="placement is None for this MoE; allowed for set_place"):
        plain.set_placement(plan_of().layer(0))
    with pytest.raises(ValueError, match=r"tables has \['copies'\]; allowed: \['copies', 'slot"):
        ep_linen.set_placement({"copies": 1}, plan_of().layer(0))
    assert plain.placement is None
    two = plan_of(np.stack([LOAD, LOAD]))
    with pytest.raises(ValueError, match=r"plan is of 2 layers; allowed: that of one"):
        stored_from_logical({}, two)
    with pytest.raises(ValueError, match=r"plan is a int; allowed: an ExpertPlacement"):
        stored_from_logical({}, 3)
    with pytest.raises(ValueError, match=r"params has 'w_up', \[6, 2\]; allowed: \[8, ...\]"):
        stored_from_logical({"w_up": np.ones((6, 2))}, plan_of())
    with pytest.raises(ValueError, match=r"params has 'w_up', str; allowed: \[8, ...\]"):
        stored_from_logical({"w_up": "w"}, plan_of())


def test_slots_must_divide():
    message = r"EpConfig\.num_experts is 10; allowed with it: a multiple of the 4 ranks"
    with (
        make_group(num_experts=10, pad_experts=True) as padded,
        pytest.raises(ValueError, match=message),
    ):
        ep_nnx.MoE(padded, FFN, num_logical_experts=8, rngs=nnx.Rngs(0))


def test_the_group_of_weights_is_closed_with_the_layers():
    with make_group(num_experts=RANKS * SLOTS) as group:
        moe = ep_nnx.MoE(
            group, FFN, num_logical_experts=EXPERTS, replicas="expanded", rngs=nnx.Rngs(0)
        )
        own = [value for value in group._kept.values() if isinstance(value, jax_ep.EpGroup)]
        assert len(own) == 1
        assert not own[0].closed
    assert own[0].closed
    with pytest.raises(jax_ep.EpGroupClosed):
        moe(jnp.zeros((8, HIDDEN)))
