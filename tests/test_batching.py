# SPDX-License-Identifier: Apache-2.0
"""`vmap` of `moe` and of the layers, and what is made of it: one exchange for each element."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import jax_ep
from ep_testing.flax_layers import FFN, HIDDEN, make_group, make_nnx, to_linen
from ep_testing.programs import make_mesh
from jax_ep._src.grouped_dot import grouped_dot
from jax_ep.flax import linen as ep_linen

BATCH, TOKENS = 3, 16
FLOAT32 = 2.0**-24


@pytest.fixture(scope="module", params=["ffi", "xla"])
def group(request):
    with make_group(backend=request.param) as group:
        yield group


def _close(got, want):
    """Two evaluations of the same few matrix products, sums of at most a few hundred terms each."""

    def compare(g, w):
        bound = 2000 * FLOAT32 * max(1e-3, np.max(np.abs(w), initial=0.0))
        np.testing.assert_allclose(g, w, rtol=0, atol=bound)

    jax.tree.map(compare, got, want)


# --- the product of rows and their groups' matrices ----------------------------------------------

SIZES = np.array([3, 0, 4, 2], np.int32)  # of 12 rows: three are of no group


def _operands(dtype=jnp.float32, batch=()):
    rng = np.random.default_rng(1)
    shapes = (*batch, 12, 5), (*batch, 4, 5, 6)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def _scalar(product, rows, matrices):
    out = product(rows, matrices, jnp.asarray(SIZES)).astype(jnp.float32)
    return (jnp.sin(out) * jnp.arange(6.0)[None]).sum()


def ragged_dot(rows, matrices, sizes):
    return jax.lax.ragged_dot(rows, matrices, sizes)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_product_and_its_gradients_are_those_of_ragged_dot(dtype):
    def everything(product):
        f = functools.partial(_scalar, product)
        jvp = jax.jvp(f, _operands(dtype), _operands(dtype))
        return product(*_operands(dtype), SIZES), jax.grad(f, (0, 1))(*_operands(dtype)), jvp

    got, want = (jax.jit(functools.partial(everything, f))() for f in (grouped_dot, ragged_dot))
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert jax.tree.map(lambda a: a.dtype, got) == jax.tree.map(lambda a: a.dtype, want)


@pytest.mark.parametrize("mode", ["forward over reverse", "reverse over reverse"])
def test_second_derivatives_of_the_product(mode):
    """Each of its transposes is differentiated and transposed again, which ragged_dot is not."""
    rows, matrices = _operands()
    direction = jnp.flip(rows), jnp.flip(matrices)

    def second(product):
        gradient = jax.grad(functools.partial(_scalar, product), (0, 1))
        if mode == "forward over reverse":
            return jax.jvp(gradient, (rows, matrices), direction)[1]
        return jax.vjp(gradient, rows, matrices)[1](direction)

    def dense(rows, matrices, sizes):
        group = (jnp.arange(12)[:, None] >= jnp.cumsum(sizes)[None]).sum(axis=1)
        return jnp.einsum("cl,ch,lhf->cf", jax.nn.one_hot(group, 4), rows, matrices)

    got, want = (jax.jit(functools.partial(second, f))() for f in (grouped_dot, dense))
    assert all(np.abs(w).max() > 0 for w in want)
    _close(got, want)


@pytest.mark.parametrize("in_axes", [(0, None, None), (None, 1, None), (2, 0, 0), (None, None, 0)])
def test_the_product_in_batches(in_axes):
    """Whatever is batched, and along whichever axis."""
    rows, matrices = _operands(batch=(BATCH,))
    sizes = jnp.stack([jnp.roll(SIZES, i) for i in range(BATCH)])
    args = [
        array[0] if axis is None else jnp.moveaxis(array, 0, axis)
        for array, axis in zip((rows, matrices, sizes), in_axes, strict=True)
    ]

    def gradients(rows, matrices, sizes):
        value = lambda r, m: jnp.sin(grouped_dot(r, m, sizes)).sum()  # noqa: E731
        return jax.value_and_grad(value, (0, 1))(rows, matrices)

    got = jax.jit(jax.vmap(gradients, in_axes=in_axes))(*args)
    one_by_one = [
        gradients(
            *(
                array[0 if axis is None else i]
                for array, axis in zip((rows, matrices, sizes), in_axes, strict=True)
            )
        )
        for i in range(BATCH)
    ]
    _close(got, jax.tree.map(lambda *parts: jnp.stack(parts), *one_by_one))


def test_the_product_has_the_precision_of_where_it_is_traced():
    def f(rows, matrices):
        with jax.default_matmul_precision("highest"):
            return grouped_dot(rows, matrices, jnp.asarray(SIZES))

    for function in (f, jax.grad(lambda r, m: f(r, m).sum(), (0, 1))):
        assert "HIGHEST" in jax.jit(function).lower(*_operands()).as_text()
    assert "HIGHEST" not in jax.jit(grouped_dot).lower(*_operands(), SIZES).as_text()
    with jax.default_matmul_precision("highest"):
        assert "HIGHEST" in jax.jit(grouped_dot).lower(*_operands(), SIZES).as_text()


# --- moe -----------------------------------------------------------------------------------------


def _moe_inputs(num_copies):
    keys = iter(jax.random.split(jax.random.key(2), 6))
    normal = lambda *shape: jax.random.normal(next(keys), shape)  # noqa: E731
    x, logits = normal(num_copies, TOKENS, HIDDEN), normal(num_copies, TOKENS, 8)
    w = [normal(num_copies, 8, *s) / 4 for s in ((HIDDEN, FFN), (HIDDEN, FFN), (FFN, HIDDEN))]
    return x, logits, *w


def _moe(group):
    spec = P(("data", "expert"))
    specs = spec, spec, P("expert"), P("expert"), P("expert")

    @functools.partial(jax.shard_map, mesh=group.mesh, in_specs=specs, out_specs=spec)
    def moe(x, logits, *w):
        return jax_ep.moe(x, *jax_ep.route(logits, num_topk=2), *w, group=group)

    return moe


def _dense(x, logits, w_gate, w_up, w_down):
    topk_idx, topk_weights = jax_ep.route(logits, num_topk=2)
    weight = (jax.nn.one_hot(topk_idx, 8) * topk_weights[..., None]).sum(axis=1)
    gate = jax.nn.silu(jnp.einsum("th,ehf->tef", x, w_gate))
    y = gate * jnp.einsum("th,ehf->tef", x, w_up)
    return jnp.einsum("tef,efh,te->th", y, w_down, weight)


def _square(f):
    return lambda *args: jnp.square(f(*args)).sum()


TRANSFORMS = {
    "values": lambda f, axes: jax.vmap(f, in_axes=axes),
    "gradients of vmap": lambda f, axes: jax.grad(_square(jax.vmap(f, in_axes=axes)), range(5)),
    "vmap of gradients": lambda f, axes: jax.vmap(jax.grad(_square(f), range(5)), in_axes=axes),
    "vmap of vmap": lambda f, axes: (
        lambda *args: jax.vmap(jax.vmap(f, in_axes=axes), in_axes=[0] + [None] * 4)(
            jnp.stack([args[0], 2 * args[0]]), *args[1:]
        )
    ),
}
BATCHED = {
    "tokens": (0, 0, None, None, None),
    "routing": (None, 0, None, None, None),
    "experts": (None, None, 0, 0, 0),
    "all": (0,) * 5,
}


@pytest.mark.parametrize("batched", BATCHED)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_moe_in_batches_is_the_dense_layer(transform, batched, group):
    axes = BATCHED[batched]
    inputs = zip(_moe_inputs(BATCH), axes, strict=True)
    args = [array if axis == 0 else array[0] for array, axis in inputs]
    got, want = (jax.jit(TRANSFORMS[transform](f, axes))(*args) for f in (_moe(group), _dense))
    _close(got, want)


def test_jacobians_of_moe(group):
    x, *rest = [array[0] for array in _moe_inputs(1)]

    def along(f):
        """Two outputs of two inputs, that a whole Jacobian stays small."""
        return lambda s: f(x * s[0] + s[1], *rest).reshape(2, -1).sum(axis=1)

    at = jnp.array([0.7, 0.1])
    want = jax.jacrev(along(_dense))(at)
    for mode in (jax.jacrev, jax.jacfwd):
        _close(jax.jit(mode(along(_moe(group))))(at), want)
    _close(*(jax.jit(jax.hessian(along(f)))(at) for f in (_moe(group), _dense)))


def test_map_in_batches(group):
    x, logits, *w = _moe_inputs(5)
    w = [array[0] for array in w]

    def run(f):
        return jax.lax.map(lambda args: f(*args, *w), (x, logits), batch_size=2)

    _close(*(jax.jit(functools.partial(run, f))() for f in (_moe(group), _dense)))


def test_a_batch_is_one_exchange_for_each_element_in_loops():
    with make_group(backend="ffi") as group:
        x, logits, *w = _moe_inputs(BATCH)
        batched = jax.vmap(_moe(group), in_axes=BATCHED["tokens"])
        text = jax.jit(batched).lower(x, logits, *(a[0] for a in w)).compile().as_text()
    calls = re.findall(r'custom_call_target="(jax_ep_\w+)"', text)
    assert sorted(calls) == ["jax_ep_combine", "jax_ep_plan_dispatch"]


@pytest.mark.parametrize("check_vma", [True, False])
def test_moe_spread_over_a_mesh_axis(check_vma, backend):
    """As pipelines run their stages."""
    mesh = make_mesh((2, 4), ("stage", "expert"))
    x, logits, *w = _moe_inputs(2)
    logits, w = logits[0], [array[0] for array in w]
    with make_group(mesh, backend=backend) as group:

        @functools.partial(
            jax.shard_map, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"),
            check_vma=check_vma,
        )  # fmt: skip
        def moe(x, logits, *w):
            return jax_ep.moe(x, *jax_ep.route(logits, num_topk=2), *w, group=group)

        spread, alone = (
            jax.vmap(f, in_axes=BATCHED["tokens"][:1] + (None,) * 4, spmd_axis_name=name)
            for f, name in ((moe, "stage"), (_dense, None))
        )
        _close(jax.jit(spread)(x, logits, *w), alone(x, logits, *w))
        got = jax.jit(jax.grad(_square(spread), range(5)))(x, logits, *w)
    _close(got, jax.grad(_square(alone), range(5))(x, logits, *w))


# --- layers --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def xs():
    return jax.random.normal(jax.random.key(7), (BATCH, 8, 2, HIDDEN))


def test_layers_in_batches(group, xs):
    moe = make_nnx(group, num_shared_experts=1, selection_bias=True)
    layer, variables = ep_linen.MoE(group, FFN, 1, selection_bias=True), to_linen(moe)

    def nnx_layer(x):
        return moe.with_stats(x)

    def linen_layer(x):
        return layer.apply(variables, x, method="with_stats")

    want = jax.tree.map(lambda *parts: jnp.stack(parts), *[nnx_layer(x) for x in xs])
    # 5 tokens do not divide, and are padded.
    odd = xs.reshape(-1, HIDDEN)[:15].reshape(3, 5, HIDDEN)
    want_odd = jnp.stack([nnx_layer(x)[0] for x in odd])
    for f in (nnx_layer, linen_layer):
        _close(jax.vmap(f)(xs), want)
        _close(jax.jit(jax.vmap(f))(xs), want)
        _close(jax.lax.map(f, xs, batch_size=2), want)
        _close(jax.vmap(f)(odd)[0], want_odd)
    _close(nnx.vmap(lambda moe, x: moe.with_stats(x), in_axes=(None, 0))(moe, xs), want)


def test_gradients_of_layers_in_batches(group, xs):
    layer, variables = ep_linen.MoE(group, FFN, 1), to_linen(make_nnx(group, num_shared_experts=1))

    def loss(params, x):
        out, stats = layer.apply({"params": params}, x, method="with_stats")
        return jnp.square(out).sum() + stats.load_balance_loss + stats.router_z_loss

    params = variables["params"]
    each = [jax.jit(jax.grad(loss, (0, 1)))(params, x) for x in xs]
    want = jax.tree.map(lambda *parts: jnp.stack(parts), *each)
    grads = jax.jit(jax.vmap(jax.grad(loss, (0, 1)), in_axes=(None, 0)))(params, xs)
    _close(grads, want)
    total = lambda params, xs: jax.vmap(loss, in_axes=(None, 0))(params, xs).sum()  # noqa: E731
    summed = jax.tree.map(lambda a: a.sum(axis=0), want[0])
    _close(jax.jit(jax.grad(total, (0, 1)))(params, xs), (summed, want[1]))


def test_an_ensemble_of_layers(group, xs):
    """Each element has its own parameters."""
    layer = ep_linen.MoE(group, FFN)
    members = [to_linen(make_nnx(group, seed))["params"] for seed in range(BATCH)]
    stacked = jax.tree.map(lambda *parts: jnp.stack(parts), *members)
    run = lambda params, x: layer.apply({"params": params}, x)  # noqa: E731
    want = jnp.stack([run(params, x) for params, x in zip(members, xs, strict=True)])
    _close(jax.jit(jax.vmap(run))(stacked, xs), want)


def test_jacobians_of_a_layer(group, xs):
    moe = make_nnx(group)

    def along(s):
        return moe.with_stats(xs[0] * s[0] + s[1])[0].reshape(2, -1).sum(axis=1)

    at = jnp.array([0.7, 0.1])
    rows = [jax.grad(lambda s, i=i: along(s)[i])(at) for i in range(2)]
    _close(jax.jacrev(along)(at), jnp.stack(rows))
    _close(jax.jacfwd(along)(at), jnp.stack(rows))


def test_a_layer_spread_over_a_mesh_axis(xs, backend):
    mesh = make_mesh((2, 4), ("stage", "expert"))
    with make_group(mesh, backend=backend) as group:
        moe = make_nnx(group, data_axes=())
        run = lambda x: moe.with_stats(x)[0]  # noqa: E731
        results = [
            jax.jit(jax.value_and_grad(_square(jax.vmap(run, spmd_axis_name=name))))(xs[:2])
            for name in ("stage", None)
        ]
    _close(*results)
