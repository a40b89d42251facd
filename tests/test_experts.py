# SPDX-License-Identifier: Apache-2.0
"""`moe_with_experts` and `jax_ep.experts` against dense blocks: kinds, formats, errors."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import print_saved_residuals
from jax.sharding import PartitionSpec as P

import jax_ep
from ep_testing import dense_experts as dense
from ep_testing.dense_experts import E, F, H, assert_trees_close
from jax_ep import experts

RANKS = 4
WEIGHTS = dense.random_weights()
X, IDX, W = dense.random_tokens((RANKS * 6,))
UP, DOWN = ("experts", "hidden", "ffn"), ("experts", "ffn", "hidden")


def make_group(backend="ffi", **config):
    return dense.make_group((RANKS,), ("expert",), backend=backend, **config)


def over_ranks(group, make_experts, **kwargs):
    """A function of tokens and of a pytree of weights, of which every rank has its part."""

    def on_rank(x, idx, w, weights):
        moe = functools.partial(jax_ep.moe_with_experts, group=group, **kwargs)
        return moe(x, idx, w, make_experts(weights))

    return jax.jit(
        jax.shard_map(on_rank, mesh=group.mesh, in_specs=P("expert"), out_specs=P("expert"))
    )


def value_and_grads(f, *args):
    target = jnp.cos(jnp.arange(X.size, dtype=jnp.float32)).reshape(X.shape)
    return jax.value_and_grad(lambda *a: (f(*a) * target).sum(), argnums=range(len(args)))(*args)


def assert_equals_dense(make_experts, of_each, weights=WEIGHTS, backend="ffi", **kwargs):
    with make_group(backend) as group:
        run = over_ranks(group, make_experts, **kwargs)
        got = value_and_grads(lambda x, w, p: run(x, IDX, w, p), X, W, weights)
    want = value_and_grads(lambda x, w, p: dense.block(x, IDX, w, p, of_each), X, W, weights)
    assert_trees_close(got, want)


def _relu2(x):
    return jnp.square(jax.nn.relu(x))


def _dense_gpt_oss(x, weights):
    gate = dense.plus(dense.product(x, weights["w_gate"]), weights["bias_gate"])
    up = dense.plus(dense.product(x, weights["w_up"]), weights["bias_up"])
    gate, up = jnp.minimum(gate, 0.5), jnp.clip(up, -0.5, 0.5)
    return dense.down((up + 1) * gate * jax.nn.sigmoid(1.5 * gate), weights)


def _dense_ungated(x, weights):
    up = dense.plus(dense.product(x, weights["w_up"]), weights.get("bias_up"))
    return dense.down(_relu2(up), weights)


def test_gated_with_biases(backend):
    assert_equals_dense(lambda p: experts.gated(**p), dense.gated, backend=backend)


def test_gated_with_one_bias():
    weights = {n: w for n, w in WEIGHTS.items() if n not in ("bias_gate", "bias_down")}
    assert_equals_dense(lambda p: experts.gated(**p), dense.gated, weights)


def test_ungated():
    weights = {n: w for n, w in WEIGHTS.items() if "gate" not in n}
    ungated = functools.partial(experts.ungated, activation=_relu2)
    assert_equals_dense(lambda p: ungated(**p), _dense_ungated, weights)


def test_gpt_oss():
    gpt_oss = functools.partial(experts.gpt_oss, limit=0.5, alpha=1.5)
    assert_equals_dense(lambda p: gpt_oss(**p), _dense_gpt_oss)


def test_any_function_of_what_was_received():
    def experts_of(weights):
        def per_row(recv):
            # By each row's expert, in the place of a grouped product.
            expert = recv.local_expert
            at = jnp.maximum(expert, 0)
            up = jnp.einsum("ch,chf->cf", recv.x, weights["w_up"][at], precision="highest")
            y = jnp.einsum("cf,cfh->ch", _relu2(up), weights["w_down"][at], precision="highest")
            return jnp.where((expert >= 0)[:, None], y, jnp.nan)

        return per_row

    weights = {name: WEIGHTS[name] for name in ("w_up", "w_down")}
    assert_equals_dense(experts_of, _dense_ungated, weights)


def test_weights_on_the_input():
    def block(x, idx, w, p):
        rows = x[..., None, :] * w[..., None]  # [T, K, H]
        y = jax.vmap(dense.gated, (-2, None), -3)(rows, p)  # [T, K, E, H]
        return dense.weighted_sum(
            y.reshape(*idx.shape, E, H), idx[..., None], 1.0 + 0 * w[..., None]
        )

    with make_group() as group:
        run = over_ranks(group, lambda p: experts.gated(**p), weigh="input")
        got = value_and_grads(lambda x, w, p: run(x, IDX, w, p), X, W, WEIGHTS)

    def want_of(x, w, p):
        return block(x, IDX, w, p).sum(-2)

    assert_trees_close(got, value_and_grads(want_of, X, W, WEIGHTS))


@pytest.mark.parametrize("scales", [(E, 1, 1), (E, 1, F), (E, H // 4, F // 8)])
@pytest.mark.parametrize("dtype", [jnp.int8, jnp.float8_e4m3fn])
def test_quantized_matrices(dtype, scales):
    rng = np.random.default_rng(0)
    values = jnp.asarray(rng.integers(-100, 100, (E, H, F)), jnp.float32).astype(dtype)
    parts = rng.random(scales).astype(np.float32) / 100
    whole = np.kron(parts, np.ones((1, H // scales[1], F // scales[2]), np.float32))
    restored = np.asarray(values, np.float32) * whole
    quantized = experts.QuantizedMatrices(values, jnp.asarray(parts))
    np.testing.assert_array_equal(quantized.dequantize(jnp.float32), restored)
    rest = {n: w for n, w in WEIGHTS.items() if n != "w_up"}
    with make_group() as group:
        run = over_ranks(group, lambda p: experts.gated(w_up=p[0], **p[1]))
        got = value_and_grads(lambda x, p: run(x, IDX, W, (quantized, p)), X, rest)
    want = value_and_grads(
        lambda x, p: dense.block(x, IDX, W, {**p, "w_up": jnp.asarray(restored)}), X, rest
    )
    assert_trees_close(got, want)


@pytest.mark.parametrize("quantized", [False, True])
def test_low_rank_updates(quantized):
    rng = np.random.default_rng(0)
    ab = [jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((E, H, 3), (E, 3, F))]
    base = WEIGHTS["w_up"]
    if quantized:
        values = jnp.round(base * 100).astype(jnp.int8)
        base = experts.QuantizedMatrices(values, jnp.full((E, 1, 1), 0.01, jnp.float32))
    rest = {n: w for n, w in WEIGHTS.items() if n != "w_up"}

    def lora(p):
        return experts.gated(w_up=experts.LowRank(p[0], *p[1], scale=0.5), **rest_of(p))

    def rest_of(p):
        return p[2]

    with make_group() as group:
        run = over_ranks(group, lora)
        got = value_and_grads(lambda x, ab: run(x, IDX, W, (base, ab, rest)), X, ab)

    def of_dense(x, ab):
        matrices = base.dequantize(jnp.float32) if quantized else base
        update = jnp.einsum("xhr,xrf->xhf", *ab, precision="highest")
        return dense.block(x, IDX, W, {**rest, "w_up": matrices + 0.5 * update})

    assert_trees_close(got, value_and_grads(of_dense, X, ab))


def test_another_grouped_product():
    calls = []

    def product(rows, matrices, group_sizes):
        calls.append(matrices.shape)
        ends = jnp.cumsum(group_sizes)
        group = jnp.searchsorted(ends, jnp.arange(rows.shape[0]), side="right")
        one_hot = jax.nn.one_hot(group, matrices.shape[0])
        return jnp.einsum("ca,cl,lab->cb", rows, one_hot, matrices, precision="highest")

    assert_equals_dense(lambda p: experts.gated(**p, product=product), dense.gated)
    num_local = E // RANKS
    assert set(calls) == {(num_local, H, F), (num_local, F, H)}


def test_custom_experts_compute_what_their_function_does():
    def function(recv, weights):
        up = jax.lax.ragged_dot(recv.x, weights["w_up"], recv.group_sizes)
        return jax.lax.ragged_dot(_relu2(up), weights["w_down"], recv.group_sizes)

    def custom(p):
        return experts.custom(function, p, {"w_up": UP, "w_down": DOWN})

    weights = {name: WEIGHTS[name] for name in ("w_up", "w_down")}
    assert_equals_dense(custom, _dense_ungated, weights)


def test_rows_received_in_fp8_are_restored_for_any_experts():
    fp8 = {"wire_dtype": jnp.float8_e4m3fn, "recv_dtype": jnp.float8_e4m3fn}
    rounded = jax_ep.quantize(X).dequantize(jnp.float32)
    want = dense.block(rounded, IDX, W, WEIGHTS)
    with make_group(**fp8) as group:
        for make in (lambda p: experts.gated(**p), lambda p: lambda recv: experts.gated(**p)(recv)):
            got = over_ranks(group, make)(X, IDX, W, WEIGHTS)
            assert_trees_close(got, want)


def test_experts_see_zeros_where_a_row_holds_no_token():
    def sums(recv):
        return jnp.where((recv.local_expert < 0)[:, None], recv.x + 1, 0)

    def on_rank(x, idx, w):
        return jax_ep.moe_with_experts(x, idx, w, lambda recv: seen(recv), group=group)

    def seen(recv):
        rows.append(sums(recv))
        return recv.x

    rows = []
    with make_group(zero_fill=False, expert_alignment=8) as group:

        def run(x, idx, w):
            rows.clear()
            out = on_rank(x, idx, w)
            return out, rows[0]

        spec = P("expert")
        f = jax.jit(jax.shard_map(run, mesh=group.mesh, in_specs=spec, out_specs=spec))
        _, empty = f(X, IDX, W)
    values = set(np.unique(np.asarray(empty)))
    assert values == {0.0, 1.0}


def test_local_expert_of_each_row():
    with make_group(expert_alignment=4) as group:

        def run(x, idx):
            recv = jax_ep.dispatch(x, idx, group=group)
            return recv.local_expert, recv.handle.row_source, recv.group_sizes

        spec = P("expert")
        f = jax.jit(jax.shard_map(run, mesh=group.mesh, in_specs=spec, out_specs=spec))
        expert, source, sizes = (np.asarray(a).reshape(RANKS, -1) for a in f(X, IDX))
    for rank in range(RANKS):
        want = np.repeat(np.arange(E // RANKS), sizes[rank])
        want = np.append(want, np.full(expert.shape[1] - len(want), -1))
        want[source[rank] < 0] = -1
        np.testing.assert_array_equal(expert[rank], want)


def test_local_expert_is_refused_in_layout_rank():
    with make_group(layout="rank") as group:

        def run(x, idx):
            return jax_ep.dispatch(x, idx, group=group).local_expert

        f = jax.shard_map(run, mesh=group.mesh, in_specs=P("expert"), out_specs=P("expert"))
        with pytest.raises(ValueError, match=r"layout 'rank'.*allowed: Dispatched\.topk_idx"):
            jax.jit(f)(X, IDX)


NAMES = ("jax_ep.recv", "jax_ep.gate", "jax_ep.up", "jax_ep.experts", "jax_ep.out")


def test_what_is_saved_by_name_is_not_exchanged_again():
    def exchanges(*names):
        policy = jax.checkpoint_policies.save_only_these_names(*names)

        def on_rank(x, w, p):
            moe = functools.partial(jax_ep.moe_with_experts, group=group)
            out = moe(x, IDX_OF_RANK, w, experts.gated(**p))
            return jnp.sin(out)

        remat = jax.checkpoint(on_rank, policy=policy)
        f = jax.shard_map(remat, mesh=group.mesh, in_specs=P("expert"), out_specs=P("expert"))
        text = str(
            jax.make_jaxpr(jax.grad(lambda x, w, p: f(x, w, p).sum(), (0, 1, 2)))(X, W, WEIGHTS)
        )
        return len(re.findall(r"jax_ep_plan_dispatch\b|jax_ep_plan\b", text))

    with make_group() as group:
        assert exchanges() == 2  # forward, and again
        assert exchanges(*NAMES) == 1


@pytest.mark.parametrize("name", NAMES)
def test_values_have_names_for_checkpoint_policies(name, capsys):
    """What a policy saves by name is saved, and computed once."""
    policy = jax.checkpoint_policies.save_only_these_names(name)
    with make_group() as group:

        @functools.partial(jax.checkpoint, policy=policy)
        def on_rank(x, w, p):
            out = jax_ep.moe_with_experts(x, IDX_OF_RANK, w, experts.gated(**p), group=group)
            return jnp.sin(out)

        f = jax.shard_map(on_rank, mesh=group.mesh, in_specs=P("expert"), out_specs=P("expert"))
        print_saved_residuals(f, X, W, WEIGHTS)
        jaxpr = str(jax.make_jaxpr(f)(X, W, WEIGHTS))
    assert f"name={name}" in jaxpr
    assert re.search(r"f32\[", capsys.readouterr().out)


IDX_OF_RANK = np.asarray(IDX[:6])


ERRORS = [
    ({"experts": 3}, "experts is a int; allowed: a function of a Dispatched"),
    ({"weigh": "both"}, "weigh is 'both'; allowed: 'output', 'input'"),
    (
        {"experts": lambda recv: recv.x[:3]},
        r"experts\(recv\) is float32\[3, 16\]; allowed: float32\[48, 16\], the rows",
    ),
    (
        {"experts": experts.gated(jnp.ones((2, F, H)), jnp.ones((2, H, F)), jnp.ones((2, F, H)))},
        r"w_gate is float32\[2, 24, 16\]; allowed: float32\[2, 16, F\], of the 2 experts on each .*"
        "transposed would fit: jax_ep.flax.load_experts",
    ),
    (
        {"experts": experts.ungated(jnp.ones((2, H, F)), jnp.ones((2, F, H)), bias_up=jnp.ones(F))},
        r"bias_up is float32\[24\]; allowed: float32\[2, 24\]",
    ),
    (
        {
            "experts": experts.ungated(
                experts.QuantizedMatrices(jnp.ones((2, H, F)), jnp.ones((2, 1, 1))),
                jnp.ones((2, F, H)),
            )
        },
        "w_up.values is float32; allowed: int8, float8_e4m3fn",
    ),
    (
        {
            "experts": experts.ungated(
                experts.QuantizedMatrices(jnp.ones((2, H, F), jnp.int8), jnp.ones((2, 3, 1))),
                jnp.ones((2, F, H)),
            )
        },
        r"w_up.scales is float32\[2, 3, 1\]; allowed: float32\[2, a, b\], where a divides 16",
    ),
    (
        {
            "experts": experts.ungated(
                experts.LowRank(jnp.ones((2, H, F)), jnp.ones((2, H, 3)), jnp.ones((2, 4, F))),
                jnp.ones((2, F, H)),
            )
        },
        r"w_up.b is float32\[2, 4, 24\]; allowed: float32\[2, 3, 24\]",
    ),
]


@pytest.mark.parametrize(("changed", "message"), ERRORS)
def test_errors_say_what_is_allowed(changed, message):
    with make_group() as group:
        arguments = {"experts": lambda recv: recv.x, "group": group} | changed

        def on_rank(x, idx, w):
            return jax_ep.moe_with_experts(x, idx, w, **arguments)

        f = jax.shard_map(on_rank, mesh=group.mesh, in_specs=P("expert"), out_specs=P("expert"))
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(f, X, IDX, W)


def test_custom_checks_names_and_dimensions():
    with pytest.raises(ValueError, match=r"output_biases has \['b'\]; allowed: .*\['a'\]"):
        experts.custom(lambda recv, w: recv.x, {"a": X}, {"a": (None, None)}, output_biases=("b",))
    with pytest.raises(ValueError, match=r"dims has the names \['b'\]; allowed: .*\['a'\]"):
        experts.custom(lambda recv, w: recv.x, {"a": WEIGHTS["w_up"]}, {"b": UP})
    with pytest.raises(ValueError, match="allowed in it: experts, hidden, ffn"):
        experts.custom(lambda recv, w: recv.x, {"a": WEIGHTS["w_up"]}, {"a": ("expert",)})
