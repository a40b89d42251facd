# SPDX-License-Identifier: Apache-2.0
"""The layers under the transformations of Flax and of JAX, and where they cannot be called."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_ep
from ep_testing.flax_layers import (
    EXPERTS,
    FFN,
    HIDDEN,
    TOPK,
    make_group,
    make_nnx,
    run_linen,
    to_linen,
)
from ep_testing.programs import make_mesh
from jax_ep.flax import linen as ep_linen
from jax_ep.flax import nnx as ep_nnx


@pytest.fixture(scope="module")
def group():
    with make_group() as group:
        yield group


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(7), (8, 6, HIDDEN))


class NnxBlock(nnx.Module):
    def __init__(self, group, rngs):
        self.moe = ep_nnx.MoE(group, FFN, selection_bias=True, rngs=rngs)

    def __call__(self, x):
        return x + self.moe(x)


class LinenBlock(nn.Module):
    group: jax_ep.EpGroup

    @nn.compact
    def __call__(self, x, _):
        return x + ep_linen.MoE(self.group, FFN, selection_bias=True, name="moe")(x), None


class LinenStack(nn.Module):
    group: jax_ep.EpGroup
    partition_name: str | None = None

    @nn.compact
    def __call__(self, x):
        stack = nn.scan(
            nn.remat(LinenBlock),
            variable_axes={"params": 0, ep_linen.STATS: 0, ep_linen.BIAS: 0},
            split_rngs={"params": True},
            length=3,
            metadata_params={nn.PARTITION_NAME: self.partition_name},
        )
        return stack(self.group, name="blocks")(x, None)[0]


UNPARTITIONED = {nnx.PARTITION_NAME: None}


def _stacked_nnx_blocks(group):
    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=0, out_axes=0, transform_metadata=UNPARTITIONED)
    def make_blocks(rngs):
        return NnxBlock(group, rngs)

    return make_blocks(nnx.Rngs(0))


@nnx.jit
@nnx.value_and_grad
def _gradient_of_nnx_scan(blocks, x):
    body = nnx.remat(lambda block, x: block(x))
    axes = {"in_axes": (0, nnx.Carry), "out_axes": nnx.Carry}
    out = nnx.scan(body, transform_metadata=UNPARTITIONED, **axes)(blocks, x)
    return jnp.square(out).mean() + blocks.moe.load_balance_loss[...].sum()


def _loss_one_by_one(group, stacked, x):
    """Of three Linen layers with the stacked parameters, each called by itself."""
    losses = []
    for i in range(3):
        variables = {"params": {name: value[i] for name, value in stacked.items()}}
        out, stat = run_linen(ep_linen.MoE(group, FFN), variables, x)
        x = x + out
        losses.append(stat["load_balance_loss"])
    return jnp.square(x).mean() + sum(losses)


def test_scan_and_remat_over_stacked_layers(x, backend):
    """Three layers in one scan, rematerialized, in both flavors; against the same one by one."""
    with make_group(backend=backend) as group:
        blocks = _stacked_nnx_blocks(group)
        assert blocks.moe.w_up[...].sharding.spec == P(None, "expert")
        value, grads = _gradient_of_nnx_scan(blocks, x)
        assert blocks.moe.tokens_per_expert[...].sum(axis=1).tolist() == [TOPK * 48] * 3

        stacked = {p[-1]: v[...] for p, v in nnx.to_flat_state(nnx.state(blocks, nnx.Param))}
        biases = {"blocks": {"moe": {"selection_bias": jnp.zeros((3, EXPERTS))}}}
        model = LinenStack(group)

        def loss(params, x):
            variables = {"params": {"blocks": {"moe": params}}, ep_linen.BIAS: biases}
            out, state = model.apply(variables, x, mutable=[ep_linen.STATS])
            stats = state[ep_linen.STATS]
            balance = stats["blocks"]["moe"]["load_balance_loss"][0]
            return jnp.square(out).mean() + balance.sum(), stats

        (linen_value, stats), linen_grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(
            stacked, x
        )
        want = _loss_one_by_one(group, stacked, x)
    np.testing.assert_allclose(value, want, rtol=1e-5)
    np.testing.assert_allclose(linen_value, want, rtol=1e-5)
    for name, got in linen_grads.items():
        assert np.abs(got).max() > 0
        np.testing.assert_allclose(grads["moe"][name][...], got, rtol=1e-4, atol=1e-6)

    blocks.moe.update_bias(rate=0.5)
    updated = ep_linen.update_bias(biases, stats, rate=0.5)["blocks"]["moe"]["selection_bias"]
    assert set(np.unique(updated)) <= {-0.5, 0.0, 0.5}
    np.testing.assert_array_equal(blocks.moe.selection_bias[...], updated)


# --- stacked layers on a mesh along part of which all do the same --------------------------------

# Shape of the mesh, its axes, and over which of them tokens are split besides "expert".
REPLICATED = {
    "tensor": ((4, 2), ("expert", "tensor"), ()),
    "data_tensor": ((2, 2, 2), ("data", "expert", "tensor"), ("data",)),
}


def _normalized(x):
    return x * jax.lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True))


class NnxResidual(nnx.Module):
    def __init__(self, group, data_axes, rngs):
        self.moe = ep_nnx.MoE(group, FFN, data_axes=data_axes, rngs=rngs)

    def __call__(self, x):
        return x + self.moe(_normalized(x))


class LinenResidual(nn.Module):
    group: jax_ep.EpGroup
    data_axes: tuple[str, ...]

    @nn.compact
    def __call__(self, x, _):
        moe = ep_linen.MoE(self.group, FFN, data_axes=self.data_axes, name="moe")
        return x + moe(_normalized(x)), None


class LinenResiduals(nn.Module):
    group: jax_ep.EpGroup
    data_axes: tuple[str, ...]
    depth: int

    @nn.compact
    def __call__(self, x):
        stack = nn.scan(
            LinenResidual,
            variable_axes={"params": 0, ep_linen.STATS: 0},
            split_rngs={"params": True},
            length=self.depth,
            metadata_params={nn.PARTITION_NAME: None},
        )
        return stack(self.group, self.data_axes, name="blocks")(x, None)[0]


def _nnx_gradients(group, data_axes, params):
    """`params, x, weights -> output and gradients`, by nnx.scan over layers."""
    metadata = {nnx.PARTITION_NAME: None}

    @nnx.split_rngs(splits=len(params["router"]))
    @nnx.vmap(in_axes=0, out_axes=0, transform_metadata=metadata)
    def make(rngs):
        return NnxResidual(group, data_axes, rngs)

    blocks = make(nnx.Rngs(0))

    def loss(blocks, x, weights):
        axes = {"in_axes": (0, nnx.Carry), "out_axes": nnx.Carry}
        out = nnx.scan(lambda block, x: block(x), transform_metadata=metadata, **axes)(blocks, x)
        return jnp.sum(out * weights), out

    gradients = nnx.jit(nnx.grad(loss, argnums=(0, 1), has_aux=True))

    def run(params, x, weights):
        for name, value in params.items():
            getattr(blocks.moe, name).set_value(value)
        (grads, x_grad), out = gradients(blocks, x, weights)
        return {"out": out, "x": x_grad, **{name: grads["moe"][name][...] for name in params}}

    return run


def _linen_gradients(group, data_axes, params):
    """`params, x, weights -> output and gradients`, by nn.scan over layers."""
    model = LinenResiduals(group, data_axes, len(params["router"]))

    def loss(params, x, weights):
        variables = {"params": {"blocks": {"moe": params}}}
        out = model.apply(variables, x, mutable=[ep_linen.STATS])[0]
        return jnp.sum(out * weights), out

    @jax.jit
    def run(params, x, weights):
        (grads, x_grad), out = jax.grad(loss, (0, 1), has_aux=True)(params, x, weights)
        return {"out": out, "x": x_grad, **grads}

    return run


def _problem(mesh, data_axes):
    """Parameters of 12 layers, tokens, and weights of the output in the loss."""
    keys = iter(jax.random.split(jax.random.key(5), 6))
    shapes = {
        "router": (HIDDEN, EXPERTS),
        "w_gate": (EXPERTS, HIDDEN, FFN),
        "w_up": (EXPERTS, HIDDEN, FFN),
        "w_down": (EXPERTS, FFN, HIDDEN),
    }
    params = {
        name: jax.random.normal(next(keys), (12, *shape)) * shape[-2] ** -0.5
        for name, shape in shapes.items()
    }
    split = NamedSharding(mesh, P((*data_axes, "expert")))
    x, weights = (
        jax.device_put(jax.random.normal(next(keys), (8, HIDDEN)), split) for _ in range(2)
    )
    return params, x, weights


@pytest.mark.parametrize("mesh_name", REPLICATED)
def test_scan_on_a_mesh_with_an_axis_along_which_all_do_the_same(mesh_name):
    """Devices that hold the same tokens run apart in the loop, and each meets its own visit's."""
    shape, names, data_axes = REPLICATED[mesh_name]
    mesh = make_mesh(shape, names)
    params, x, weights = _problem(mesh, data_axes)
    with make_group(mesh, backend="xla") as group:
        run = _linen_gradients(group, data_axes, params)
        want = {name: np.asarray(value) for name, value in run(params, x, weights).items()}
    assert all(np.isfinite(value).all() and np.abs(value).max() > 0 for value in want.values())
    with make_group(mesh, backend="ffi") as group:
        for gradients in (_nnx_gradients, _linen_gradients):
            run = gradients(group, data_axes, params)
            for _ in range(5):
                got = run(params, x, weights)
                assert got.keys() == want.keys()
                for name, value in got.items():
                    assert len(value.addressable_shards) == 8
                    for shard in value.addressable_shards:
                        np.testing.assert_allclose(
                            shard.data,
                            want[name][shard.index],
                            rtol=1e-4,
                            atol=1e-5 * np.abs(want[name]).max(),
                            err_msg=f"{gradients.__name__}: {name} on {shard.device}",
                        )


# --- names, tables, and where they cannot be called ----------------------------------------------


@pytest.mark.parametrize("name", ["layers", None])
def test_stacked_linen_layers_under_a_name_that_is_no_axis(name, group, x):
    """A name that nn.scan adds shards nothing, unless a rule or the mesh knows it."""
    model = LinenStack(group, name)
    boxed = model.init(jax.random.key(0), x)
    kernel = boxed["params"]["blocks"]["moe"]["w_up"]
    assert kernel.names == (name, "expert", None, None)
    shardings = nn.get_sharding(boxed, group.mesh)
    unboxed = nn.unbox(boxed)
    for array, sharding in zip(*map(jax.tree.leaves, (unboxed, shardings)), strict=True):
        assert array.sharding.is_equivalent_to(sharding, array.ndim)
    kernel = unboxed["params"]["blocks"]["moe"]["w_up"]
    assert kernel.sharding.shard_shape(kernel.shape) == (3, EXPERTS // 4, HIDDEN, FFN)

    want = model.apply(boxed, x)
    for variables in (boxed, unboxed):
        np.testing.assert_allclose(jax.jit(model.apply)(variables, x), want, rtol=1e-5, atol=1e-6)
    grads = jax.jit(jax.grad(lambda v: jnp.square(model.apply(v, x)).mean()))(boxed)
    grads = nn.unbox(grads)["params"]["blocks"]["moe"]["w_up"]
    assert np.abs(grads).max(axis=(1, 2, 3)).min() > 0
    jitted = nn.unbox(jax.jit(model.init)(jax.random.key(0), x))
    # A normal number near 0 comes from 2u - 1 near 0, which XLA may round once or twice.
    close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=2.0**-24)
    jax.tree.map(close, jitted, unboxed)

    # Rules still see the name, and may give it an axis of the mesh.
    specs = nn.get_partition_spec(boxed)
    rules = [("layers", "data"), ("expert", "expert")]
    spec = nn.logical_to_mesh_sharding(specs, group.mesh, rules)["params"]["blocks"]["moe"]["w_up"]
    assert spec.spec == P(name and "data", "expert", None, None)


def test_transformations_of_jax_itself(group, x):
    """`with_stats` changes no variable, so that a function may close over the layer."""
    moe = make_nnx(group)

    @jax.jit
    @jax.grad
    def gradient(x):
        out, stats = jax.checkpoint(moe.with_stats)(x)
        return jnp.square(out).sum() + stats.router_z_loss

    assert np.isfinite(gradient(x)).all()
    assert moe.tokens_per_expert[...].sum() == 0
    layer = ep_linen.MoE(group, FFN)
    out, stats = layer.apply(to_linen(moe), x, method="with_stats")
    np.testing.assert_array_equal(out, moe(x))
    assert stats.tokens_per_expert.sum() == TOPK * 48


@pytest.mark.parametrize("depth", [None, 0, 1, 3])
def test_tabulate(depth, group, x):
    """The table of a model that has the layer in it, at Flax's default depth too."""
    options = {} if depth is None else {"depth": depth}
    table = nnx.tabulate(NnxBlock(group, nnx.Rngs(0)), x, console_kwargs={"width": 200}, **options)
    assert ("w_gate" in table) == (depth != 0)
    layer = ep_linen.MoE(group, FFN)
    assert "w_gate" in layer.tabulate(jax.random.key(0), x, depth=depth)


def _auto_or_explicit(shape, names, kind):
    devices = np.array(jax.devices()[:8]).reshape(shape)
    return Mesh(devices, names, axis_types=(kind,) * len(names))


@pytest.mark.parametrize("manual", [("data", "expert"), ("data",), ("expert",)])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_layer_inside_of_shard_map_says_what_to_call_there(kind, manual, x):
    mesh = _auto_or_explicit((2, 4), ("data", "expert"), kind)
    with make_group(mesh) as group, jax.set_mesh(mesh):
        moe = make_nnx(group)
        inside = jax.shard_map(
            lambda x: moe.with_stats(x)[0],
            mesh=mesh,
            in_specs=P(manual),
            out_specs=P(manual),
            axis_names=set(manual),
        )
        message = (
            rf"inside of jax.shard_map over the axes {re.escape(str(manual))}; allowed: outside of "
            "it, .* call jax_ep.route and jax_ep.moe"
        )
        with pytest.raises(ValueError, match=message):
            inside(jax.device_put(x, NamedSharding(mesh, P(manual))))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_layer_under_a_mesh_that_is_not_its_groups_names_both(kind, x):
    explicit, auto = (
        _auto_or_explicit((2, 4), ("data", "expert"), kind)
        for kind in (AxisType.Explicit, AxisType.Auto)
    )
    own, other = (auto, explicit) if kind == AxisType.Auto else (explicit, auto)
    with make_group(own) as group:
        with jax.set_mesh(own):
            moe = make_nnx(group)
        for mesh, shown in (
            (other, f"(data: 2 {other.axis_types[0].name}, expert: 4 {other.axis_types[1].name})"),
            (_auto_or_explicit((8,), ("model",), kind), f"(model: 8 {kind.name})"),
        ):
            message = (
                f"under a mesh (jax.set_mesh) that is {shown}; allowed: no mesh, or that of its "
                f"group, (data: 2 {kind.name}, expert: 4 {kind.name})"
            )
            with jax.set_mesh(mesh), pytest.raises(ValueError, match=re.escape(message)):
                moe(x)
