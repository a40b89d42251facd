# SPDX-License-Identifier: Apache-2.0
"""The NNX layer on meshes with explicit axes: tokens stay on the devices where `x` has them."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ep_testing.flax_layers import (
    EXPERTS,
    FFN,
    HIDDEN,
    TOPK,
    dense,
    make_group,
    make_nnx,
    routing_of,
)
from ep_testing.hlo import COLLECTIVE
from jax_ep import reference
from jax_ep.flax import linen as ep_linen


def _mesh(shape=(2, 4), names=("data", "expert"), kind=AxisType.Explicit):
    devices = np.array(jax.devices()[: math.prod(shape)]).reshape(shape)
    return Mesh(devices, names, axis_types=(kind,) * len(names))


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(7), (8, 6, HIDDEN))


def test_explicit_axes(x):
    """A mesh as `jax.make_mesh` makes it: NNX works and keeps the sharding of `x`."""
    mesh = _mesh()
    with make_group(mesh) as group, jax.set_mesh(mesh):
        moe = make_nnx(group, num_shared_experts=1)
        x = jax.sharding.reshard(x, P("data"))
        out = nnx.jit(lambda moe, x: x + moe(x))(moe, x)
        assert jax.typeof(out).sharding.spec == P("data", None, None)
        odd = moe(jnp.ones((5, HIDDEN)))
        with pytest.raises(ValueError, match=r"axis_types .*; allowed in Linen: AxisType.Auto"):
            ep_linen.MoE(group, FFN).init(jax.random.key(0), x)
    want = dense(moe, x, {"num_shared_experts": 1})
    np.testing.assert_allclose(out, np.asarray(x) + want, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        odd, dense(moe, np.ones((5, HIDDEN)), {"num_shared_experts": 1}), rtol=1e-4, atol=1e-5
    )


# shape, spec, and how many tokens a collective may give to a device; 0: there is none.
SPLITS = [
    ((4, 8), P("data", "expert"), 0),
    ((4, 8), P("expert", "data"), 0),
    ((4, 8), P(None, ("data", "expert")), 0),
    ((8, 8), P("data", "expert"), 0),
    ((8, 3), P(("expert", "data")), 0),
    ((2, 4, 3), P("data", "expert"), 0),
    # The result is to be on all devices along "expert", or everywhere.
    ((4, 8), P("data"), 16),
    ((2, 3), P("data"), 4),
    ((8, 3), P("expert"), 6),
    ((4, 8), P(), 32),
    ((4, 8), P("data", None, "expert"), 16),  # and so are the tokens, for the router
]


def _gathered(text):
    """Elements of the largest array that a collective makes in a compiled program."""
    made = COLLECTIVE.findall(text)
    shapes = [dims for arrays, _ in made for dims in re.findall(r"\w\[([\d,]*)\]", arrays)]
    return max((math.prod(int(d) for d in dims.split(",") if d) for dims in shapes), default=0)


@pytest.mark.parametrize(("shape", "spec", "most"), SPLITS)
def test_no_more_is_gathered_than_the_sharding_of_x_asks_for(shape, spec, most):
    mesh = _mesh()
    x = jax.random.normal(jax.random.key(1), (*shape, HIDDEN))
    with make_group(mesh, backend="ffi") as group, jax.set_mesh(mesh):
        moe = make_nnx(group, num_shared_experts=1, selection_bias=True)
        x = jax.device_put(x, NamedSharding(mesh, spec))
        run = jax.jit(lambda x: moe.with_stats(x))
        text = run.lower(x).compile().as_text()
        out, stats = run(x)
    sums = EXPERTS  # the statistics
    assert (_gathered(text) <= sums) if most == 0 else (_gathered(text) == most * HIDDEN)
    assert out.sharding.is_equivalent_to(x.sharding, x.ndim)
    want = dense(moe, x, {"num_shared_experts": 1})
    np.testing.assert_allclose(out, want, rtol=1e-4, atol=1e-5)
    logits, topk_idx, _ = routing_of(moe, x, {})
    load = np.bincount(topk_idx.ravel(), minlength=EXPERTS)
    np.testing.assert_array_equal(stats.tokens_per_expert, load)
    want = reference.load_balance_loss(logits, topk_idx)
    np.testing.assert_allclose(stats.load_balance_loss, want, rtol=1e-5)


@pytest.mark.parametrize("shape", [(), (0,), (8, 0), (5,), (3, 7)])
def test_any_number_of_tokens(shape):
    mesh = _mesh()
    x = jax.random.normal(jax.random.key(1), (*shape, HIDDEN))
    with make_group(mesh) as group:
        with jax.set_mesh(mesh):
            moe = make_nnx(group)
            out = moe(x)
        alone = moe.with_stats(x)[0]  # and without the mesh set
    assert out.shape == alone.shape == x.shape
    np.testing.assert_allclose(out, dense(moe, x, {}), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(out, alone)
    assert moe.tokens_per_expert[...].sum() == TOPK * math.prod(shape)


@pytest.mark.parametrize(
    ("spec", "most"),
    [(P(("data", "expert"), "tensor"), 8), (P("data", "expert", "tensor"), 8), (P("tensor"), 32)],
)
def test_axes_that_split_no_tokens_are_gathered(spec, most):
    """Devices along "tensor" do the same work, and need the same tokens."""
    mesh = _mesh((2, 2, 2), ("data", "expert", "tensor"))
    x = jax.random.normal(jax.random.key(1), (4, 8, HIDDEN))
    with make_group(mesh, backend="ffi") as group, jax.set_mesh(mesh):
        moe = make_nnx(group, data_axes=("data",))
        x = jax.device_put(x, NamedSharding(mesh, spec))
        run = jax.jit(lambda x: moe.with_stats(x)[0])
        text = run.lower(x).compile().as_text()
        out = run(x)
    assert _gathered(text) == most * HIDDEN
    assert out.sharding.is_equivalent_to(x.sharding, x.ndim)
    np.testing.assert_allclose(out, dense(moe, x, {}), rtol=1e-4, atol=1e-5)


def test_drops_are_those_of_the_tokens_where_they_are():
    mesh = _mesh()
    x = jax.random.normal(jax.random.key(3), (4, 24, HIDDEN))
    with make_group(mesh, capacity_factor=0.5, max_tokens_per_rank=12) as group:
        with jax.set_mesh(mesh):
            moe = make_nnx(group)
            out, stats = moe.with_stats(jax.device_put(x, NamedSharding(mesh, P("data", "expert"))))
        assert group.config.capacity(num_ranks=4, num_tokens=12) == 12
    _, topk_idx, topk_weights = routing_of(moe, x, {})

    def by_rank(array, data):
        """Of one group: the tokens of each rank, two sequences and six positions, in order."""
        array = np.asarray(array).reshape(2, 2, 4, 6, -1)[data]
        return array.swapaxes(0, 1).reshape(4, 12, -1)

    experts = [moe.w_gate[...], moe.w_up[...], moe.w_down[...]]
    dropped = 0
    for data in range(2):
        idx, weights = by_rank(topk_idx, data), by_rank(topk_weights, data)
        want = reference.moe(by_rank(x, data), idx, weights, *experts, recv_capacity=12)
        np.testing.assert_allclose(by_rank(out, data), want, rtol=1e-4, atol=1e-5)
        dropped += reference.plan(idx, num_experts=EXPERTS, recv_capacity=12).num_dropped.sum()
    assert stats.num_dropped == dropped > 40


@pytest.mark.parametrize("spec", [P("data", "expert"), P("data"), P()])
def test_gradients_are_those_on_automatic_axes(spec):
    x = jax.random.normal(jax.random.key(1), (2, 12, HIDDEN))
    gradients = []
    for kind in (AxisType.Explicit, AxisType.Auto):
        mesh = _mesh(kind=kind)
        with make_group(mesh) as group, jax.set_mesh(mesh):
            moe = make_nnx(group, num_shared_experts=1)

            @nnx.jit
            def gradient(moe, x):
                def loss(moe, x):
                    out = moe(x)
                    return jnp.square(out).mean() + moe.load_balance_loss.get_value()

                return nnx.grad(loss, argnums=(0, 1))(moe, x)

            of_moe, of_x = gradient(moe, jax.device_put(x, NamedSharding(mesh, spec)))
            gradients.append({**nnx.to_pure_dict(nnx.state(of_moe, nnx.Param)), "x": of_x})
    got, want = gradients
    assert got.keys() == want.keys()
    for name, array in want.items():
        np.testing.assert_allclose(got[name], array, rtol=1e-3, atol=1e-6, err_msg=name)


def test_a_batch_of_vmap():
    mesh = _mesh()
    xs = jax.random.normal(jax.random.key(1), (3, 4, 8, HIDDEN))
    with make_group(mesh) as group, jax.set_mesh(mesh):
        moe = make_nnx(group)
        sharded = jax.device_put(xs, NamedSharding(mesh, P(None, "data", "expert")))
        out = jax.jit(jax.vmap(lambda x: moe.with_stats(x)[0]))(sharded)
        want = jnp.stack([np.asarray(moe(x)) for x in xs])
    assert jax.typeof(out).sharding.spec[:3] == (None, "data", "expert")
    np.testing.assert_allclose(out, want, rtol=1e-4, atol=1e-5)
