# SPDX-License-Identifier: Apache-2.0
"""The NNX and the Linen layer against each other and against the oracle on one device."""

import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import PartitionSpec as P

import jax_ep
from ep_testing.flax_layers import (
    DEEPSEEK,
    EXPERTS,
    FFN,
    HIDDEN,
    OPTIONS,
    TOPK,
    dense,
    make_group,
    make_nnx,
    routing_of,
    run_linen,
    run_nnx,
    to_linen,
)
from ep_testing.programs import make_mesh
from jax_ep import reference
from jax_ep.flax import linen as ep_linen
from jax_ep.flax import nnx as ep_nnx


@pytest.fixture(scope="module")
def group():
    with make_group() as group:
        yield group


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(7), (8, 6, HIDDEN))


# --- values ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIONS)
def test_nnx_and_linen_are_the_dense_layer(name, group, x):
    options = OPTIONS[name]
    moe = make_nnx(group, **options)
    out, stats = run_nnx(moe, x)
    layer = ep_linen.MoE(group, FFN, **options)
    linen_out, linen_stats = run_linen(layer, to_linen(moe), x)
    assert out.shape == x.shape
    np.testing.assert_array_equal(out, linen_out)
    np.testing.assert_allclose(out, dense(moe, x, options), rtol=1e-4, atol=1e-5)

    assert stats.keys() == linen_stats.keys()
    for key, value in stats.items():
        np.testing.assert_array_equal(value, linen_stats[key])
    logits, topk_idx, _ = routing_of(moe, x, options)
    load = np.bincount(topk_idx.ravel(), minlength=EXPERTS)
    np.testing.assert_array_equal(stats["tokens_per_expert"], load)
    assert stats["num_dropped"] == 0
    score = options.get("score", "softmax")
    balance = reference.load_balance_loss(logits, topk_idx, score=score)
    np.testing.assert_allclose(stats["load_balance_loss"], balance, rtol=1e-5)
    np.testing.assert_allclose(stats["router_z_loss"], reference.router_z_loss(logits), rtol=1e-5)


def test_gradients_are_those_of_a_dense_layer(group, x):
    moe = make_nnx(group, num_shared_experts=1)

    def objective(out, balance, z):
        return jnp.square(out).mean() + 0.1 * balance + 0.01 * z

    @nnx.jit
    def nnx_gradient(moe, x):
        def loss(moe):
            out = moe(x)
            return objective(out, moe.load_balance_loss[...], moe.router_z_loss[...])

        return nnx.value_and_grad(loss)(moe)

    layer = ep_linen.MoE(group, FFN, num_shared_experts=1)

    @jax.jit
    @jax.value_and_grad
    def linen_gradient(params, x):
        out, state = layer.apply({"params": params}, x, mutable=[ep_linen.STATS])
        stats = state[ep_linen.STATS]
        return objective(out, stats["load_balance_loss"][0], stats["router_z_loss"][0])

    @jax.jit
    @jax.value_and_grad
    def dense_gradient(p, x):
        tokens = x.reshape(-1, HIDDEN)
        logits = tokens @ p["router"]
        idx, weights = jax_ep.route(logits, num_topk=TOPK)
        weight = (jax.nn.one_hot(idx, EXPERTS) * weights[..., None]).sum(axis=1)
        gate = jax.nn.silu(jnp.einsum("th,ehf->tef", tokens, p["w_gate"]))
        up = jnp.einsum("th,ehf->tef", tokens, p["w_up"])
        out = jnp.einsum("tef,efh,te->th", gate * up, p["w_down"], weight)
        gate = jax.nn.silu(tokens @ p["shared_gate"])
        out = out + (gate * (tokens @ p["shared_up"])) @ p["shared_down"]
        return objective(out, jax_ep.load_balance_loss(logits, idx), jax_ep.router_z_loss(logits))

    params = to_linen(moe)["params"]
    value, grads = nnx_gradient(moe, x)
    linen_value, linen_grads = linen_gradient(params, x)
    dense_value, dense_grads = dense_gradient(params, x)
    np.testing.assert_allclose(value, dense_value, rtol=1e-5)
    np.testing.assert_allclose(linen_value, dense_value, rtol=1e-5)
    for name, want in dense_grads.items():
        np.testing.assert_allclose(grads[name][...], want, rtol=1e-3, atol=1e-6, err_msg=name)
        np.testing.assert_allclose(linen_grads[name], want, rtol=1e-3, atol=1e-6, err_msg=name)
        assert grads[name][...].sharding.is_equivalent_to(params[name].sharding, want.ndim)


@pytest.mark.parametrize("flavor", ["nnx", "linen"])
def test_rows_received_in_fp8_change_nothing(flavor, x):
    """The layer's output and gradients are those of the FP8 wire alone."""

    def value_and_gradients(recv_dtype):
        fp8 = {"wire_dtype": "float8_e4m3fn", "recv_dtype": recv_dtype}
        with make_group(**fp8) as group:
            moe = make_nnx(group)
            params = to_linen(moe)["params"]
            layer = ep_linen.MoE(group, FFN)

            def linen_loss(params, x):
                return jnp.square(layer.apply({"params": params}, x)).mean()

            def nnx_loss(moe, x):
                return jnp.square(moe(x)).mean()

            if flavor == "linen":
                results = jax.jit(jax.value_and_grad(linen_loss, (0, 1)))(params, x)
            else:
                results = nnx.jit(nnx.value_and_grad(nnx_loss, argnums=(0, 1)))(moe, x)
            return jax.tree.map(np.asarray, jax.tree.leaves(results))

    got, want = map(value_and_gradients, ("float8_e4m3fn", None))
    for g, w in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("shape", [(5,), (), (3, 7), (0,), (8, 0), (16, 2)])
def test_any_number_of_tokens(shape, group):
    x = jax.random.normal(jax.random.key(1), (*shape, HIDDEN))
    moe = make_nnx(group)
    out = moe(x)
    assert out.shape == x.shape
    np.testing.assert_allclose(out, dense(moe, x, {}), rtol=1e-4, atol=1e-5)
    assert moe.tokens_per_expert[...].sum() == TOPK * math.prod(shape)
    logits, topk_idx, _ = routing_of(moe, x, {})
    # Tokens that fill up the last device count for nothing.
    want = reference.load_balance_loss(logits, topk_idx)
    np.testing.assert_allclose(moe.load_balance_loss[...], want, rtol=1e-5)


def test_the_router_sees_more_than_the_experts():
    """In bfloat16 the tokens are rounded for the experts and not for the router."""
    with make_group(dtype=jnp.bfloat16) as group:
        moe = make_nnx(group, num_shared_experts=1)
        x = jax.random.normal(jax.random.key(3), (8, 16, HIDDEN))
        out, stats = run_nnx(moe, x)
        _, topk_idx, _ = routing_of(moe, x, {})
    assert out.dtype == jnp.bfloat16
    assert moe.w_gate.dtype == jnp.float32
    load = np.bincount(topk_idx.ravel(), minlength=EXPERTS)
    np.testing.assert_array_equal(stats["tokens_per_expert"], load)
    want = dense(moe, x, {"num_shared_experts": 1})
    np.testing.assert_allclose(out.astype(jnp.float32), want, rtol=0.05, atol=0.05)


def test_other_meshes(x):
    """A tuple of axes for the experts, and an axis along which all do the same."""
    mesh = make_mesh((2, 2, 2), ("data", "expert", "tensor"))
    with make_group(mesh) as group:
        moe = make_nnx(group, data_axes=("data",))
        out, stats = run_nnx(moe, x)
        assert stats["tokens_per_expert"].sum() == TOPK * 48
        want = dense(moe, x, {})
        np.testing.assert_allclose(out, want, rtol=1e-4, atol=1e-5)
        all_axes = ep_linen.MoE(group, FFN)
        np.testing.assert_allclose(all_axes.apply(to_linen(moe), x), want, rtol=1e-4, atol=1e-5)
    with make_group(mesh, ("expert", "tensor")) as group:
        moe = make_nnx(group)
        np.testing.assert_allclose(moe(x), want, rtol=1e-4, atol=1e-5)
        assert moe.w_up[...].sharding.spec[0] == ("expert", "tensor")


# --- capacity ----------------------------------------------------------------------------------


def test_capacity_factor_drops_as_the_oracle_does(x):
    with make_group(capacity_factor=0.5, max_tokens_per_rank=6) as group:
        moe = make_nnx(group)
        out, stats = run_nnx(moe, x)
        assert group.config.capacity(num_ranks=4, num_tokens=6) == 6
    _, topk_idx, topk_weights = routing_of(moe, x, {})
    dropped, want = 0, []
    # Each coordinate of the data axis is a group of four ranks with six tokens each.
    for part in range(2):
        tokens = np.asarray(x).reshape(2, 4, 6, HIDDEN)[part]
        idx, weights = (a.reshape(2, 4, 6, TOPK)[part] for a in (topk_idx, topk_weights))
        experts = [moe.w_gate[...], moe.w_up[...], moe.w_down[...]]
        want.append(reference.moe(tokens, idx, weights, *experts, recv_capacity=6))
        plan = reference.plan(idx, num_experts=EXPERTS, recv_capacity=6)
        dropped += plan.num_dropped.sum()
    np.testing.assert_allclose(out, np.reshape(want, out.shape), rtol=1e-4, atol=1e-5)
    assert stats["num_dropped"] == dropped > 20
    assert stats["tokens_per_expert"].sum() == TOPK * 48


# --- parameters and where they are -------------------------------------------------------------


def test_metadata_shards_experts(group, x):
    experts, everywhere = P("expert", None, None), P(None, None)
    want = {"router": everywhere, "w_gate": experts, "w_up": experts, "w_down": experts}
    want |= dict.fromkeys(("shared_gate", "shared_up", "shared_down"), everywhere)
    moe = make_nnx(group, num_shared_experts=1)
    specs = nnx.get_partition_spec(nnx.state(moe, nnx.Param))
    assert {name: spec.get_value() for name, spec in specs.items()} == want
    for name, spec in want.items():
        array = getattr(moe, name)[...]
        num_parts = 4 if spec == experts else 1
        assert array.addressable_shards[0].data.shape[0] * num_parts == array.shape[0]

    layer = ep_linen.MoE(group, FFN, num_shared_experts=1)
    variables = jax.eval_shape(layer.init, jax.random.key(0), x)
    assert nn.get_partition_spec(variables)["params"] == want
    assert variables.keys() == {"params"}
    variables = jax.jit(layer.init)(jax.random.key(0), x)
    shapes = {name: value.shape for name, value in to_linen(moe)["params"].items()}
    assert jax.tree.map(jnp.shape, nn.unbox(variables)["params"]) == shapes


def test_initial_values(group, x):
    """One expert's matrix is drawn by its own fan-in, and no two are alike."""
    calls = []

    def initializer(key, shape, dtype):
        calls.append((shape, dtype))
        return jax.random.normal(key, shape, dtype)

    options = {"param_dtype": jnp.bfloat16, "kernel_init": initializer, "num_shared_experts": 1}
    moe = ep_nnx.MoE(group, FFN, rngs=nnx.Rngs(0), **options)
    assert {shape for shape, _ in calls} == {(HIDDEN, FFN), (FFN, HIDDEN)}
    assert {dtype for _, dtype in calls} == {np.dtype(jnp.bfloat16)}
    assert moe.router.dtype == jnp.float32
    assert moe.w_gate.dtype == jnp.bfloat16
    assert len(np.unique(moe.w_up[...].astype(np.float32)[:, 0, 0])) == EXPERTS
    layer = ep_linen.MoE(group, FFN, **options)
    params = nn.unbox(layer.init(jax.random.key(0), x))["params"]
    assert params["w_down"].dtype == jnp.bfloat16
    assert params["router"].dtype == jnp.float32


# --- selection bias ----------------------------------------------------------------------------


def test_update_bias(group, x):
    moe = make_nnx(group, **DEEPSEEK)
    _, stats = run_nnx(moe, x)
    before, load = moe.selection_bias[...], stats["tokens_per_expert"]
    variables = to_linen(moe)
    moe.update_bias(rate=0.25)
    want = jax_ep.update_bias(before, load, rate=0.25)
    assert not np.array_equal(want, before)
    np.testing.assert_array_equal(moe.selection_bias[...], want)

    layer = ep_linen.MoE(group, FFN, **DEEPSEEK)
    _, state = layer.apply(variables, x, mutable=[ep_linen.STATS])
    biases = {"a": {"b": variables[ep_linen.BIAS]}}
    stats = {"a": {"b": state[ep_linen.STATS], "c": {}}}
    updated = ep_linen.update_bias(biases, stats, rate=0.25)
    np.testing.assert_array_equal(updated["a"]["b"]["selection_bias"], want)
    with pytest.raises(ValueError, match=r"stats has no 'tokens_per_expert'.*'moe_stats'"):
        ep_linen.update_bias(biases, {}, rate=0.25)
    with pytest.raises(ValueError, match="selection_bias is False"):
        make_nnx(group).update_bias(rate=0.25)


def test_the_bias_is_no_parameter(group, x):
    moe = make_nnx(group, selection_bias=True)
    assert "selection_bias" not in nnx.state(moe, nnx.Param)
    # A bias large enough to send every token to experts 3 and 5.
    moe.selection_bias.set_value(jnp.zeros((EXPERTS,)).at[jnp.array([3, 5])].set(10.0))
    _, stats = run_nnx(moe, x)
    assert stats["tokens_per_expert"].tolist() == [0, 0, 0, 48, 0, 48, 0, 0]
    layer = ep_linen.MoE(group, FFN, selection_bias=True)
    variables = layer.init(jax.random.key(0), x)
    assert variables.keys() == {"params", ep_linen.BIAS}
    assert variables[ep_linen.BIAS]["selection_bias"].tolist() == [0.0] * EXPERTS


# --- one expert a token --------------------------------------------------------------------------


def test_layers_warn_once_that_a_normalized_single_weight_trains_no_router(x):
    with make_group(num_topk=1) as group:
        with warnings.catch_warnings(record=True) as shown:
            warnings.simplefilter("default")
            for seed in range(2):
                moe = make_nnx(group, seed)
                jax.block_until_ready(moe(x))
            params = to_linen(moe)
            jax.block_until_ready(ep_linen.MoE(group, FFN).apply(params, x))
        assert ["num_topk is 1 and normalize is True" in str(w.message) for w in shown] == [True]

        def router_gradient(layer):
            def loss(router):
                variables = {"params": {**params["params"], "router": router}}
                return jnp.square(layer.apply(variables, x)).sum()

            return np.abs(jax.grad(loss)(params["params"]["router"])).max()

        unnormalized = ep_linen.MoE(group, FFN, normalize=False)  # and no warning
        with pytest.warns(UserWarning, match="num_topk is 1 and normalize is True"):
            normalized = router_gradient(ep_linen.MoE(group, FFN))
        # w / w is 1 up to a rounding or two, and so is the sum that its gradient is the rest of.
        assert normalized < 1e-5 * router_gradient(unnormalized)


# --- arguments -----------------------------------------------------------------------------------


def test_integers_of_numpy_and_boxed_arrays(group, x):
    options = {"num_shared_experts": 2, "num_groups": 4, "num_topk_groups": 2}
    want = make_nnx(group, **options)(x)
    options = {name: np.int64(value) for name, value in options.items()}
    moe = ep_nnx.MoE(group, np.int64(FFN), rngs=nnx.Rngs(0), **options)
    np.testing.assert_array_equal(moe(nnx.Variable(x)), want)
    layer = ep_linen.MoE(group, np.int64(FFN), **options)
    np.testing.assert_array_equal(layer.apply(to_linen(moe), nnx.Variable(x)), want)
    assert all(type(size) is int for p in moe.spec.params().values() for size in p.shape)


# --- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group": None}, "group is a NoneType; allowed: an EpGroup"),
        ({"ffn": 0}, "ffn is 0; allowed: an int, at least 1"),
        ({"num_shared_experts": -1}, "num_shared_experts is -1; allowed: an int, at least 0"),
        ({"num_shared_experts": True}, "num_shared_experts is True; allowed: an int"),
        ({"score": "tanh"}, "score is 'tanh'; allowed: 'softmax', 'sigmoid'"),
        ({"num_groups": 3, "num_topk_groups": 1}, "num_groups is 3 and .*; allowed"),
        ({"data_axes": ("expert",)}, r"data_axes is .*; allowed: None, or .*: \('data',\)"),
        ({"param_dtype": jnp.int32}, "param_dtype is 'int32'; allowed: a floating point type"),
    ],
)
def test_bad_options(options, message, group, x):
    options = {"group": group, "ffn": FFN} | options
    with pytest.raises(ValueError, match=message):
        ep_nnx.MoE(**options, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=message):
        ep_linen.MoE(**options).init(jax.random.key(0), x)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (jnp.ones((8, HIDDEN + 1)), r"x is float32\[8, 17\]; allowed: .* \[..., 16\]"),
        (jnp.ones((8, HIDDEN), jnp.int32), r"x is int32\[8, 16\]; allowed: floating point"),
        (
            jnp.ones((8, HIDDEN), jnp.float8_e4m3fn),
            r"x is float8_e4m3fn\[8, 16\]; allowed: floating point of 16 bits or more",
        ),
        ([1.0], "x is a list; allowed: an array"),
        (
            jnp.ones((8, 17, HIDDEN)),
            "136 tokens, 17 on each of 8 devices .*; allowed: up to EpConfig.max_tokens_per_rank",
        ),
    ],
)
def test_bad_inputs(x, message, group):
    with pytest.raises(ValueError, match=message):
        make_nnx(group)(x)


def test_layout_rank_and_closed_groups(x):
    group = make_group(layout="rank")
    with group, pytest.raises(ValueError, match="layout 'rank'; allowed for MoE: 'expert'"):
        make_nnx(group)
    with make_group() as group:
        moe = make_nnx(group)
        jax.block_until_ready(moe(x))
    with pytest.raises(jax_ep.EpGroupClosed):
        moe(x)
