# SPDX-License-Identifier: Apache-2.0
"""`load_experts` finds every weight in every layout, and says which layout would fit."""

import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from ep_testing.flax_layers import DEEPSEEK, EXPERTS, FFN, HIDDEN, make_group, make_nnx
from ep_testing.programs import make_mesh
from jax_ep.flax import linen as ep_linen
from jax_ep.flax import load_experts


def _random(*shape, dtype=np.float32):
    return np.random.default_rng(len(shape)).normal(size=shape).astype(dtype)


# The weights as the layer has them, all different.
WANTED = {
    "w_gate": _random(EXPERTS, HIDDEN, FFN),
    "w_up": _random(EXPERTS, HIDDEN, FFN) + 1,
    "w_down": _random(EXPERTS, FFN, HIDDEN) + 2,
    "bias_gate": _random(EXPERTS, FFN),
    "bias_up": _random(EXPERTS, FFN) + 1,
    "bias_down": _random(EXPERTS, HIDDEN) + 2,
    "router": _random(HIDDEN, EXPERTS),
    "router_bias": _random(EXPERTS),
    "selection_bias": _random(EXPERTS) + 1,
    "shared_gate": _random(HIDDEN, 2 * FFN),
    "shared_up": _random(HIDDEN, 2 * FFN) + 1,
    "shared_down": _random(2 * FFN, HIDDEN) + 2,
    "shared_expert_gate": _random(HIDDEN, 1),
}
ARGUMENTS = {"w_gate": "gate", "w_up": "up", "w_down": "down"}
GATED = ("w_gate", "w_up", "w_down")


def _torch(w):
    return np.ascontiguousarray(np.einsum("...io->...oi", w))


def _separate(layout, names=tuple(WANTED)):
    turn = _torch if layout == "torch" else np.array
    are_vectors = ("bias_gate", "bias_up", "bias_down", "router_bias", "selection_bias")
    return {
        ARGUMENTS.get(name, name): WANTED[name] if name in are_vectors else turn(WANTED[name])
        for name in names
    }


def _fuse(gate, up, *, interleaved):
    """The outputs of both along the last axis, written one by one."""
    ffn = gate.shape[-1]
    fused = np.empty((*gate.shape[:-1], 2 * ffn), gate.dtype)
    for f in range(ffn):
        fused[..., 2 * f if interleaved else f] = gate[..., f]
        fused[..., 2 * f + 1 if interleaved else ffn + f] = up[..., f]
    return fused


def _fused(layout, *, interleaved):
    turn = _torch if layout == "torch" else np.array
    pairs = {
        "gate_up": turn(_fuse(WANTED["w_gate"], WANTED["w_up"], interleaved=interleaved)),
        "bias_gate_up": _fuse(WANTED["bias_gate"], WANTED["bias_up"], interleaved=interleaved),
        "shared_gate_up": turn(
            _fuse(WANTED["shared_gate"], WANTED["shared_up"], interleaved=interleaved)
        ),
    }
    own = {"gate", "up", "bias_gate", "bias_up", "shared_gate", "shared_up"}
    rest = {name: value for name, value in _separate(layout).items() if name not in own}
    return {**pairs, **rest, "interleaved": interleaved}


def _check(made, names=tuple(WANTED)):
    assert made.keys() == set(names)
    for name in names:
        np.testing.assert_array_equal(made[name], WANTED[name], err_msg=name)


@pytest.fixture(scope="module")
def group():
    with make_group() as group:
        yield group


# --- values ------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["torch", "jax"])
@pytest.mark.parametrize("packing", ["separate", "fused", "interleaved"])
def test_every_weight_comes_from_every_layout(layout, packing):
    if packing == "separate":
        arguments = _separate(layout)
    else:
        arguments = _fused(layout, interleaved=packing == "interleaved")
    _check(load_experts(layout=layout, **arguments))


def _as_list(a):
    return list(a)


def _as_functions(a):
    return [lambda e=e: a[e] for e in range(len(a))]


def _as_function(a):
    return lambda: a


@pytest.mark.parametrize("form", [_as_list, _as_functions, _as_function, jnp.asarray])
def test_experts_come_stacked_or_one_by_one_and_when_they_are_asked_for(form):
    names = {"gate_up", "down", "bias_gate_up", "bias_down"}
    fused = _fused("torch", interleaved=False)
    made = load_experts(layout="torch", **{name: form(fused[name]) for name in names})
    _check(made, [name for name in WANTED if name[:2] == "w_" or name[:5] == "bias_"])


def test_router_and_shared_expert_may_have_another_layout():
    experts = _separate("jax", GATED)
    dense = _separate("torch", [n for n in WANTED if n == "router" or n.startswith("shared")])
    made = load_experts(layout="jax", dense_layout="torch", **experts, **dense)
    _check(made, made)
    assert len(made) == 8


def test_the_layout_decides_where_shapes_do_not():
    square = _random(2, 6, 6)
    for layout, want in (("jax", square), ("torch", np.swapaxes(square, 1, 2))):
        made = load_experts(layout=layout, up=square, down=square)
        np.testing.assert_array_equal(made["w_up"], want)
        np.testing.assert_array_equal(made["w_down"], want)


def test_dtypes_are_kept_or_converted_and_the_routers_is_float32():
    half = {n: a.astype(ml_dtypes.bfloat16) for n, a in _separate("torch").items()}
    made = load_experts(layout="torch", **half)
    assert {made[name].dtype for name in GATED} == {np.dtype(ml_dtypes.bfloat16)}
    assert {made[n].dtype.name for n in ("router", "router_bias", "selection_bias")} == {"float32"}
    made = load_experts(layout="torch", gate=half["gate"], dtype=np.float32)
    np.testing.assert_array_equal(made["w_gate"], np.float32(WANTED["w_gate"].astype("bfloat16")))
    assert made["w_gate"].dtype == np.float32


def test_experts_of_zeros_are_added():
    made = load_experts(layout="torch", **_separate("torch", (*GATED, "router")), pad_experts=11)
    for name in GATED:
        assert made[name].shape[0] == 11
        np.testing.assert_array_equal(made[name][:EXPERTS], WANTED[name])
        assert not made[name][EXPERTS:].any()
    np.testing.assert_array_equal(made["router"], WANTED["router"])


# --- layers ------------------------------------------------------------------------------------


def _names_of(moe):
    return [name for name in WANTED if hasattr(getattr(moe, name, None), "get_value")]


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_an_nnx_layer_is_filled_where_its_weights_are(axis_type):
    mesh = jax.make_mesh((2, 4), ("data", "expert"), axis_types=(axis_type,) * 2)
    with make_group(mesh) as group:
        moe = make_nnx(group, **DEEPSEEK)
        before = {n: (getattr(moe, n).get_value().sharding) for n in _names_of(moe)}
        names = _names_of(moe)
        assert len(names) == 8
        returned = load_experts(moe, layout="torch", **_separate("torch", names))
        for name, sharding in before.items():
            value = getattr(moe, name).get_value()
            np.testing.assert_array_equal(value, WANTED[name], err_msg=name)
            assert value.sharding == sharding
            assert value is returned[name]
        assert moe.w_gate.get_value().sharding.spec == P("expert", None, None)


def test_the_layer_computes_what_the_weights_say(group):
    x = jax.random.normal(jax.random.key(0), (8, 4, HIDDEN))
    names = [*GATED, "router"]
    moe = make_nnx(group)
    load_experts(moe, layout="torch", **_separate("torch", names))
    layer = ep_linen.MoE(group, FFN)
    loaded = load_experts(layout="torch", **_separate("torch", names))
    np.testing.assert_array_equal(moe(x), layer.apply({"params": loaded}, x))


def test_what_is_not_passed_is_left_alone(group):
    moe = make_nnx(group)
    router, down = moe.router.get_value(), moe.w_down.get_value()
    load_experts(moe, layout="torch", **_separate("torch", ["w_gate", "w_up"]))
    assert moe.router.get_value() is router
    assert moe.w_down.get_value() is down
    np.testing.assert_array_equal(moe.w_up.get_value(), WANTED["w_up"])


def test_an_abstract_layer_is_filled_without_being_made_first(group):
    with jax.set_mesh(group.mesh):
        moe = nnx.eval_shape(lambda: make_nnx(group))
    load_experts(moe, layout="torch", **_separate("torch", [*GATED, "router"]))
    value = moe.w_gate.get_value()
    np.testing.assert_array_equal(value, WANTED["w_gate"])
    assert value.sharding.shard_shape(value.shape) == (EXPERTS // 4, HIDDEN, FFN)


def test_a_process_reads_the_experts_that_it_has():
    read = []

    def reader(expert):
        def read_one():
            read.append(expert)
            return _torch(WANTED["w_gate"][expert])

        return read_one

    sharding = jax.sharding.NamedSharding(make_mesh((4,), ("expert",)), P("expert"))
    like = {"w_gate": jax.ShapeDtypeStruct(WANTED["w_gate"].shape, jnp.float32, sharding=sharding)}
    made = load_experts(like, layout="torch", gate=[reader(e) for e in range(EXPERTS)])
    np.testing.assert_array_equal(made["w_gate"], WANTED["w_gate"])
    assert sorted(read) == [0, *range(EXPERTS)]  # the first one's shape was looked at


def test_parameters_of_linen_say_where_the_weights_go(group):
    x = jnp.zeros((8, HIDDEN))
    layer = ep_linen.MoE(group, FFN, param_dtype=jnp.bfloat16)
    params = nn.unbox(layer.init(jax.random.key(0), x)["params"])
    made = load_experts(params, layout="torch", **_separate("torch", [*GATED, "router"]))
    assert made.keys() == params.keys()
    for name, value in made.items():
        assert value.dtype == params[name].dtype
        assert value.sharding == params[name].sharding
        np.testing.assert_array_equal(value, WANTED[name].astype(value.dtype))
    assert made["w_gate"].dtype == jnp.bfloat16


def test_a_layer_with_more_experts_gets_zeros_if_that_is_asked_for(group):
    few = {name: a[:5] for name, a in _separate("torch", GATED).items()}
    with pytest.raises(ValueError, match=r"gate is 5 x .*pad_experts=True adds experts of zeros"):
        load_experts(make_nnx(group), layout="torch", **few)
    moe = make_nnx(group)
    load_experts(moe, layout="torch", **few, pad_experts=True)
    np.testing.assert_array_equal(moe.w_up.get_value()[:5], WANTED["w_up"][:5])
    assert not np.asarray(moe.w_up.get_value())[5:].any()


def test_experts_that_can_be_selected_are_never_padding():
    with make_group(num_experts=6, pad_experts=True) as group:  # of 8, on 4 ranks
        moe = make_nnx(group)
        few = {name: value[:5] for name, value in _separate("torch", GATED).items()}
        with pytest.raises(ValueError, match=r"gate is 5 x .* allowed: 6 x"):
            load_experts(moe, layout="torch", **few, pad_experts=True)


def test_a_layer_that_pads_its_experts_gets_zeros_without_being_asked():
    with make_group(num_experts=6, pad_experts=True) as group:  # of 8, on 4 ranks
        moe = make_nnx(group)
        weights = _separate("torch", [*GATED, "router"])
        six = {name: a[:6] for name, a in weights.items()}
        load_experts(moe, layout="torch", **six)
        for name in GATED:
            value = np.asarray(getattr(moe, name).get_value())
            np.testing.assert_array_equal(value[:6], WANTED[name][:6])
            assert value.shape[0] == 8
            assert not value[6:].any()
        np.testing.assert_array_equal(moe.router.get_value(), WANTED["router"][:, :6])
        with pytest.raises(ValueError, match="gate is 5 x"):
            load_experts(moe, layout="torch", gate=weights["gate"][:5])


def test_weights_that_are_split_along_every_dimension_are_read_whole():
    mesh = make_mesh((2, 4, 2), ("data", "expert", "tensor"))
    with make_group(mesh) as group:
        moe = make_nnx(group, fsdp_axes=("data",), tensor_axes=("tensor",))
        load_experts(moe, layout="torch", **_separate("torch", GATED))
        for name in GATED:
            value = getattr(moe, name).get_value()
            np.testing.assert_array_equal(value, WANTED[name])
            assert value.addressable_shards[0].data.size == value.size // 16


# --- errors ------------------------------------------------------------------------------------


def _message(layer, **arguments):
    with pytest.raises(ValueError, match="allowed") as caught:
        load_experts(layer, **arguments)
    return re.sub(r"\s+", " ", str(caught.value))


def test_a_layout_that_does_not_fit_names_the_one_that_does(group):
    moe = make_nnx(group)
    before = moe.w_gate.get_value()
    separate, fused = _separate("torch"), _fused("torch", interleaved=False)
    message = _message(moe, layout="jax", gate=separate["gate"])
    assert f"gate is {EXPERTS} x float32[{FFN}, {HIDDEN}]" in message
    assert f"layout='jax' reads as [H, F] = [{FFN}, {HIDDEN}]" in message
    assert f"allowed: {EXPERTS} x [H, F] = [{HIDDEN}, {FFN}], as the layer has" in message
    assert "It would fit with layout='torch'" in message
    message = _message(moe, layout="torch", gate=fused["gate_up"])
    assert message.endswith("It would fit passed as gate_up")
    message = _message(moe, layout="jax", up=fused["gate_up"])
    assert "It would fit passed as gate_up with layout='torch'" in message
    message = _message(moe, layout="torch", gate_up=separate["gate"])
    assert message.endswith("It would fit passed as gate")
    message = _message(moe, layout="jax", gate_up=fused["gate_up"])
    assert "It would fit with layout='torch'" in message
    message = _message(moe, layout="jax", dense_layout="torch", router=WANTED["router"])
    assert "dense_layout='torch' reads as [H, E]" in message
    assert "It would fit with dense_layout='jax'" in message
    message = _message(moe, layout="torch", down=_random(EXPERTS, 3, 5))
    assert message.endswith("No layout would fit")
    assert moe.w_gate.get_value() is before


def test_tensors_that_do_not_fit_each_other_are_an_error_without_a_layer():
    torch = _separate("torch", GATED)
    message = _message(None, layout="torch", gate=torch["gate"], down=WANTED["w_down"])
    assert message.startswith("down is")
    assert "its transpose (swapaxes(-1, -2))" in message
    assert "as the rest has" in message
    message = _message(None, layout="torch", router=_random(HIDDEN, EXPERTS), gate=torch["gate"])
    assert message.startswith("router is")
    message = _message(None, layout="torch", gate=torch["gate"], up=torch["up"][:-1])
    assert message.startswith(f"up is {EXPERTS - 1} x")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"layout": "fused"}, ["layout is 'fused'", "'torch'", "gate_up", "interleaved=True"]),
        ({"layout": "jax", "dense_layout": "x"}, ["dense_layout is 'x'", "'torch'"]),
        ({"layout": "jax"}, ["got no tensor", "gate", "router"]),
        ({"layout": "jax", "up": WANTED["w_up"][0]}, ["up is float32[16, 12]", "3 dimensions"]),
        ({"layout": "jax", "up": [WANTED["w_up"]]}, ["up[0] is float32[8, 16", "2 dimensions"]),
        ({"layout": "jax", "up": []}, ["up is a list of 0", "at least one expert"]),
        ({"layout": "jax", "router": [WANTED["router"]]}, ["router is a list", "an array"]),
        ({"layout": "jax", "up": np.ones((2, 3, 4), np.int8)}, ["up is int8", "scales"]),
        (
            {"layout": "jax", "down": np.ones((2, 3, 4), ml_dtypes.float8_e4m3fn)},
            ["down is float8_e4m3fn", "QuantizedMatrices"],
        ),
        (
            {"layout": "jax", "gate_up": _random(2, 3, 4), "up": _random(2, 3, 2)},
            ["up and gate_up were both passed"],
        ),
        (
            {"layout": "jax", "gate_up": _random(2, 3, 5)},
            ["gate_up is float32[3, 5]", "an even number"],
        ),
        ({"layout": "jax", "up": _random(4, 3, 5), "pad_experts": True}, ["pad_experts is True"]),
        ({"layout": "jax", "up": _random(4, 3, 5), "pad_experts": 3}, ["is 3", "at least 4"]),
        (
            {"layout": "jax", "up": [np.ones((3, 4)), np.ones((4, 3))]},
            ["up[1] is float64[4, 3]", "[3, 4], as up[0] is"],
        ),
    ],
)
def test_what_cannot_be_loaded_is_an_error(arguments, parts):
    message = _message(None, **arguments)
    for part in parts:
        assert part in message, message


def test_what_is_no_layer_or_has_no_such_weight_is_an_error(group):
    moe = make_nnx(group)
    shared = _separate("jax", ["shared_up"])
    assert "has no shared_up; it has: w_gate, w_up" in _message_of_names(moe, shared)
    for wrong in ("moe", {}, nnx.Linear(2, 2, rngs=nnx.Rngs(0))):
        message = _message(wrong, layout="jax", **shared)
        assert f"layer is a {type(wrong).__name__}" in message
    boxed = ep_linen.MoE(group, FFN).init(jax.random.key(0), jnp.zeros((8, HIDDEN)))["params"]
    assert "flax.linen.unbox" in _message(boxed, layout="jax", up=WANTED["w_up"])
    stacked = {"w_up": np.zeros((3, *WANTED["w_up"].shape))}
    assert "Load stacked layers one by one" in _message(stacked, layout="jax", up=WANTED["w_up"])


def _message_of_names(layer, arguments):
    with pytest.raises(ValueError, match="was passed") as caught:
        load_experts(layer, layout="jax", **arguments)
    return str(caught.value)
