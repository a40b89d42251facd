# SPDX-License-Identifier: Apache-2.0
"""What calls of a layer take, and how its arrays are spread, in both flavors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import PartitionSpec as P

import jax_ep
from ep_testing import dense_experts as dense
from ep_testing.dense_experts import E, F, H, K, assert_trees_close
from jax_ep import experts
from jax_ep.flax import linen as linen_layers
from jax_ep.flax.nnx import MoE

FSDP = ((2, 2, 2), ("fsdp", "tensor", "expert"))
X = jnp.asarray(np.random.default_rng(0).standard_normal((4, 6, H)), jnp.float32)
LOGITS = jnp.asarray(np.random.default_rng(1).standard_normal((4, 6, E)), jnp.float32)


def make_group(shape=(2, 4), names=("data", "expert"), **options):
    return dense.make_group(shape, names, **options)


@pytest.fixture(scope="module")
def group():
    with make_group() as group:
        yield group


def make_layer(group, **options):
    return MoE(group, F, rngs=nnx.Rngs(0), **options)


def weights_of(layer):
    return {name: jax.device_get(getattr(layer, name).get_value()) for name in layer.spec.params()}


def dense_of(layer, x, logits):
    idx, w = jax_ep.route(logits.reshape(-1, E), num_topk=K)
    idx, w = idx.reshape(*x.shape[:-1], K), w.reshape(*x.shape[:-1], K)
    return dense.block(x, idx, w, weights_of(layer)), idx, w


def test_logits_in_the_place_of_the_routers(group):
    layer = make_layer(group)
    out, stats = layer.with_stats(X, logits=LOGITS, routing=True)
    want, idx, _ = dense_of(layer, X, LOGITS)
    assert_trees_close(out, want)
    np.testing.assert_array_equal(stats.topk_idx, idx)
    np.testing.assert_array_equal(stats.logits, LOGITS)
    balance = jax_ep.load_balance_loss(LOGITS.reshape(-1, E), idx.reshape(-1, K))
    np.testing.assert_allclose(stats.load_balance_loss, balance, rtol=1e-6)
    layer(X, logits=LOGITS)
    np.testing.assert_allclose(layer.load_balance_loss.get_value(), balance, rtol=1e-6)


def test_a_mask_keeps_tokens_from_experts_and_statistics(group):
    layer = make_layer(group, shared_ffn=4)
    mask = jnp.arange(24).reshape(4, 6) % 4 != 0
    out, stats = layer.with_stats(X, mask=mask, routing=True)
    whole, _ = layer.with_stats(X, routing=True)
    shared = jax.nn.silu(X @ layer.shared_gate.get_value()) * (X @ layer.shared_up.get_value())
    shared = shared @ layer.shared_down.get_value()
    want = jnp.where(mask[..., None], whole, jax.device_get(shared))
    assert_trees_close(out, jax.device_get(want))
    assert int(stats.tokens_per_expert.sum()) == K * int(mask.sum())
    assert bool(((stats.topk_idx < 0).all(-1) == ~mask).all())
    kept = (stats.logits[mask], stats.topk_idx[mask])
    np.testing.assert_allclose(stats.load_balance_loss, jax_ep.load_balance_loss(*kept), rtol=1e-6)
    np.testing.assert_allclose(stats.router_z_loss, jax_ep.router_z_loss(*kept), rtol=1e-6)


def test_experts_and_weights_from_outside(group):
    layer = make_layer(group)
    idx = jnp.tile(jnp.int32([3, 1]), (4, 6, 1))
    w = jnp.full((4, 6, K), 0.25, jnp.float32)
    out, stats = layer.with_stats(X, topk=(idx, w))
    assert_trees_close(out, dense.block(X, idx, w, weights_of(layer)))
    np.testing.assert_array_equal(stats.tokens_per_expert, [0, 24, 0, 24, 0, 0, 0, 0])


def test_replayed_experts_have_the_routers_weights_and_gradients(group):
    layer = make_layer(group, normalize=True, scale=1.5)
    _, idx, _ = dense_of(layer, X, LOGITS)
    chosen = idx.at[0, 0].set(-1)  # one token was masked

    def loss(layer, topk):
        return (layer.with_stats(X, topk=topk)[0] * X).sum()

    router = layer.router.get_value()
    logits = jnp.dot(X, router, precision="highest")
    at = jnp.take_along_axis(jax.nn.softmax(logits), jnp.maximum(chosen, 0), axis=-1)
    w = at / at.sum(-1, keepdims=True) * 1.5
    want = dense.block(X, chosen, w, weights_of(layer))
    out, _ = layer.with_stats(X, topk=(chosen, None))
    assert_trees_close(out, jax.device_get(want))
    grads = nnx.grad(loss)(layer, (chosen, None))
    assert float(jnp.abs(grads.router.get_value()).max()) > 1e-3


def test_a_router_of_ones_own(group):
    class Router(nnx.Module):
        def __init__(self):
            self.kernel = nnx.Param(jnp.asarray(np.random.default_rng(3).standard_normal((H, E))))

        def __call__(self, x):
            logits = jnp.dot(x, self.kernel.get_value().astype(x.dtype), precision="highest")
            w, idx = jax.lax.top_k(jax.nn.sigmoid(logits), K)
            return logits, idx.astype(jnp.int32), w

    layer = make_layer(group, router=Router())
    assert "router" not in layer.spec.params()
    out, stats = layer.with_stats(X)
    _logits, idx, w = layer.router(X)
    assert_trees_close(out, dense.block(X, idx, w, weights_of(layer)))
    assert float(stats.load_balance_loss) > 0
    grads = nnx.grad(lambda layer: layer.with_stats(X)[0].sum())(layer)
    assert float(jnp.abs(grads.router.kernel.get_value()).max()) > 0


def test_a_router_without_logits_has_no_losses(group):
    def router(x):
        idx = jnp.zeros((*x.shape[:-1], K), jnp.int32).at[..., 1].set(2)
        return None, idx, jnp.ones(idx.shape, jnp.float32)

    _, stats = make_layer(group, router=router).with_stats(X, routing=True)
    assert float(stats.load_balance_loss) == float(stats.router_z_loss) == 0
    assert stats.logits is None
    assert int(stats.tokens_per_expert[2]) == 24


def test_the_router_sees_another_input(group):
    layer = make_layer(group)
    other = X[..., ::-1] * 2
    out, stats = layer.with_stats(X, router_input=other, routing=True)
    logits = jnp.dot(other, layer.router.get_value(), precision="highest")
    np.testing.assert_allclose(stats.logits, logits, rtol=1e-5, atol=1e-5)
    assert_trees_close(out, jax.device_get(dense_of(layer, X, stats.logits)[0]))


def test_the_routers_bias_is_part_of_the_logits(group):
    layer = make_layer(group, router_bias=True)
    plain = layer.with_stats(X, routing=True)[1].logits
    bias = jnp.arange(E, dtype=jnp.float32)
    layer.router_bias.set_value(bias)
    got = layer.with_stats(X, routing=True)[1].logits
    np.testing.assert_allclose(got, plain + bias[None, None], rtol=1e-5, atol=1e-5)


def test_the_routers_dtype():
    with make_group(dtype=jnp.bfloat16) as group:
        x = X.astype(jnp.bfloat16)
        layer = make_layer(group, router_dtype=jnp.bfloat16)
        got = layer.with_stats(x, routing=True)[1].logits
        want = jnp.dot(x, layer.router.get_value().astype(jnp.bfloat16))
        np.testing.assert_allclose(got, want.astype(jnp.float32), rtol=2e-2, atol=1e-2)
        assert got.dtype == jnp.float32
        assert bool((got == got.astype(jnp.bfloat16).astype(jnp.float32)).all())
        with pytest.raises(ValueError, match="router_dtype is 'float16'; allowed: 'float32', or"):
            make_layer(group, router_dtype=jnp.float16)


@pytest.mark.parametrize("token_spec", [None, P("fsdp", ("expert", "tensor"))])
def test_arrays_are_spread_over_tensor_and_fsdp_axes(token_spec):
    with make_group(*FSDP) as group, make_group() as plain:
        options = {"shared_ffn": 4, "shared_gate": True, "selection_bias": True}
        want = make_layer(plain, **options)
        layer = make_layer(
            group, tensor_axes=("tensor",), fsdp_axes=("fsdp",), token_spec=token_spec, **options
        )
        specs = {n: getattr(layer, n).get_value().sharding.spec for n in layer.spec.params()}
        assert specs["w_gate"] == P("expert", "fsdp", "tensor")
        assert specs["w_down"] == P("expert", "tensor", "fsdp")
        assert specs["shared_down"] == P("tensor", "fsdp")
        x = X[:, :4]
        both = nnx.value_and_grad(lambda layer: (layer.with_stats(x)[0] * x).sum())
        got, grads = both(layer)
        expected, expected_grads = both(want)
        np.testing.assert_allclose(got, expected, rtol=1e-5)
        for name in want.spec.params():
            assert_trees_close(
                jax.device_get(getattr(grads, name).get_value()),
                jax.device_get(getattr(expected_grads, name).get_value()),
            )
        _, stats = layer.with_stats(x)
        np.testing.assert_array_equal(
            stats.tokens_per_expert, want.with_stats(x)[1].tokens_per_expert
        )


@pytest.mark.parametrize("token_spec", [None, P("fsdp", "tensor")])
def test_shared_experts_in_parts_where_an_exchange_is_not_in_halves(token_spec):
    results = []
    for axes in ({}, {"tensor_axes": ("tensor",), "token_spec": token_spec}):
        with make_group(*FSDP, backend="xla") as group:
            layer = make_layer(group, shared_ffn=4, **axes)
            both = nnx.value_and_grad(lambda layer: (layer.with_stats(X[:, :4])[0] ** 2).sum())
            value, grads = both(layer)
            results.append(jax.device_get((value, nnx.to_pure_dict(nnx.state(grads)))))
    assert_trees_close(results[1], results[0])


def test_what_padding_holds_has_no_gradient(group):
    layer = make_layer(group)
    mask = jnp.arange(24).reshape(4, 6) % 5 != 1
    x = jnp.where(mask[..., None], X, jnp.nan)

    def loss(layer, x):
        out, stats = layer.with_stats(x, mask=mask)
        return jnp.where(mask[..., None], out, 0).sum() + stats.load_balance_loss

    got = nnx.grad(loss)(layer, x)
    want = nnx.grad(loss)(layer, jnp.where(mask[..., None], X, 0))
    for name in layer.spec.params():
        a, b = (jax.device_get(getattr(g, name).get_value()) for g in (got, want))
        np.testing.assert_array_equal(a, b)


def test_logical_names_in_metadata():
    names = {"experts": "exp", "hidden": "embed", "ffn": "mlp"}
    with make_group() as group:
        layer = make_layer(group, partition_names=names)
        assert layer.w_gate.get_metadata()["out_sharding"] == ("exp", "embed", "mlp")
        assert layer.router.get_metadata()["out_sharding"] == (None, None)
        assert layer.w_gate.get_value().sharding.spec == P("expert", None, None)
        with nnx.logical_axis_rules((("embed", "data"),)):
            ruled = make_layer(group, partition_names=names)
        assert ruled.w_gate.get_value().sharding.spec == P("expert", "data", None)
        out = layer(X)
        linen = linen_layers.MoE(group, F, partition_names=names)
        boxed = linen.init(jax.random.key(0), X)["params"]
        assert nn.get_partition_spec(boxed)["w_down"] == P("exp", "mlp", "embed")
        rules = (("exp", "expert"), ("embed", None), ("mlp", None))
        specs = nn.logical_to_mesh(nn.get_partition_spec(boxed), rules)
        assert specs["w_down"] == P("expert", None, None)
        params = {n: getattr(layer, n).get_value() for n in layer.spec.params()}
        assert_trees_close(linen.apply({"params": params}, X), out)


@pytest.mark.parametrize("explicit", [False, True])
def test_experts_that_do_not_divide_by_the_ranks(explicit):
    with make_group(num_experts=6, pad_experts=True, explicit=explicit) as group:
        with jax.set_mesh(group.mesh):
            layer = make_layer(group)
            assert layer.w_up.get_value().shape == (8, H, F)
            assert layer.router.get_value().shape == (H, 6)
            out, stats = layer.with_stats(X, routing=True)
        weights = {n: w[:6] if n.startswith("w_") else w for n, w in weights_of(layer).items()}
        logits = jax.device_get(stats.logits).reshape(-1, 6)
        idx, w = (a.reshape(4, 6, K) for a in jax_ep.route(logits, num_topk=K))
        assert_trees_close(jax.device_get(out), dense.block(X, idx, w, weights))
        assert stats.tokens_per_expert.shape == (6,)
        np.testing.assert_array_equal(
            stats.tokens_per_expert, np.bincount(np.ravel(idx), minlength=6)
        )


def test_layers_are_stages_of_a_pipeline():
    x = jnp.stack([X, X * 0.5])
    with make_group((2, 4), ("stage", "expert")) as group:
        layer = linen_layers.MoE(group, F, data_axes=())
        stages = [nn.unbox(layer.init(jax.random.key(seed), X)) for seed in range(2)]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *stages)
        mapped = jax.jit(jax.vmap(layer.apply, spmd_axis_name="stage"))
        got = mapped(stacked, x)
        want = jnp.stack([layer.apply(*of_stage) for of_stage in zip(stages, x, strict=True)])
    assert_trees_close(got, want)


def test_accumulated_loads_update_the_bias(group):
    layer = make_layer(group, selection_bias=True)
    loads = jnp.int32([9, 1, 5, 5, 5, 5, 5, 5])
    layer(X)
    layer.update_bias(0.5, tokens_per_expert=loads)
    np.testing.assert_array_equal(layer.selection_bias.get_value(), [-0.5, 0.5, 0, 0, 0, 0, 0, 0])
    biases = {"selection_bias": jnp.zeros(E)}
    stats = {"tokens_per_expert": (loads * 10, loads * 0 + jnp.int32([0, 80, 0, 0, 0, 0, 0, 0]))}
    last = linen_layers.update_bias(biases, stats, rate=1.0)["selection_bias"]
    every = linen_layers.update_bias(biases, stats, rate=1.0, all_calls=True)["selection_bias"]
    np.testing.assert_array_equal(last, [1, -1, 1, 1, 1, 1, 1, 1])
    np.testing.assert_array_equal(every, [-1, -1, 1, 1, 1, 1, 1, 1])


def test_linen_takes_the_same_options():
    with make_group(*FSDP) as group:
        options = {
            "experts": experts.Ungated(bias=True),
            "router_bias": True,
            "shared_ffn": 4,
            "shared_gate": True,
            "tensor_axes": ("tensor",),
            "fsdp_axes": ("fsdp",),
        }
        layer = make_layer(group, **options)
        linen = linen_layers.MoE(group, F, **options)
        assert "shared_gate" not in layer.spec.params()  # ungated like the experts
        params = {n: getattr(layer, n).get_value() for n in layer.spec.params()}
        mask = jnp.arange(24).reshape(4, 6) < 20
        call = functools.partial(linen.apply, {"params": params}, X, mask=mask, routing=True)
        out, stats = call(method=linen.with_stats)
        want, want_stats = layer.with_stats(X, mask=mask, routing=True)
        assert_trees_close((out, stats), (want, want_stats))
        made = nn.meta.unbox(linen.init(jax.random.key(0), X)["params"])
        assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, params)
        assert not made["bias_up"].any()


def _custom(name, dim):
    return experts.Custom(function=lambda recv, w: recv.x, arrays=((name, ("experts", dim)),))


BAD_OPTIONS = [
    (
        {"shared_ffn": 4, "num_shared_experts": 1},
        "shared_ffn is 4 and num_shared_experts 1; allowed",
    ),
    ({"shared_gate": True}, "shared_gate is True, and there are no shared experts; allowed"),
    ({"experts": lambda recv: recv.x}, "experts is a function; allowed: None, or a kind of"),
    ({"experts": experts.Ungated(), "activation": jax.nn.relu}, "activation is given, and experts"),
    ({"weigh": "none"}, "weigh is 'none'; allowed: 'output', 'input'"),
    ({"tensor_axes": "expert"}, "tensor_axes is 'expert'; allowed: distinct axes of the mesh"),
    ({"fsdp_axes": ("expert",)}, "fsdp_axes is .*; allowed: distinct axes of the mesh out of"),
    ({"fsdp_axes": ("data",), "data_axes": ()}, "fsdp_axes is .*; allowed: axes that split the"),
    ({"token_spec": "data"}, "token_spec is 'data'; allowed: a jax.sharding.PartitionSpec"),
    (
        {"partition_names": {"expert": "e"}},
        "partition_names has the keys .*allowed: experts, hidden",
    ),
    (
        {"router": lambda x: x, "selection_bias": True},
        "selection_bias is True, and router is given",
    ),
    ({"router": "softmax"}, "router is a str; allowed: None, or a function or module"),
    (
        {"experts": _custom("shared_up", "ffn")},
        r"experts has weights \['shared_up'\]; allowed: names that a layer has not",
    ),
    (
        {"experts": _custom("w", "hidden"), "tensor_axes": ("data",)},
        "experts has no weight with a dimension 'ffn'",
    ),
    ({"group_score": "sum"}, "group_score is 'sum'; allowed: 'top2', 'max'"),
]


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS)
def test_options_that_are_not_allowed(group, options, message):
    with pytest.raises(ValueError, match=message):
        make_layer(group, **options)


BAD_CALLS = [
    ({"mask": jnp.ones((4, 6))}, r"mask is float32\[4, 6\]; allowed: bool\[4, 6\], as the tokens"),
    (
        {"logits": jnp.ones((4, 6, 3))},
        r"logits is float32\[4, 6, 3\]; allowed: floating point, \[4",
    ),
    ({"topk": jnp.ones((4, 6, K))}, r"topk is a .*; allowed: None, or \(topk_idx, topk_weights\)"),
    ({"topk": (jnp.ones((4, 6, K)), None)}, r"topk_idx is float32\[4, 6, 2\]; allowed: int32"),
    ({"router_input": X, "logits": LOGITS}, "router_input and logits are both given; allowed: one"),
    ({"router_input": X[:2]}, r"router_input is float32\[2, 6, 16\]; .* \[4, 6, 16\]"),
]


@pytest.mark.parametrize(("call", "message"), BAD_CALLS)
def test_calls_that_do_not_fit(group, call, message):
    with pytest.raises(ValueError, match=message):
        make_layer(group)(X, **call)
