# SPDX-License-Identifier: Apache-2.0
"""Layers that Orbax saved on 8 devices, restored on 8, 4 and 2, into new and abstract models."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ep_testing.flax_layers import EXPERTS, FFN, HIDDEN, make_group
from jax_ep.flax import linen as ep_linen
from jax_ep.flax import nnx as ep_nnx

TX = optax.adam(1e-2)
# Axes of the mesh, and whether the program runs under `jax.set_mesh`.
PLACES = {
    "auto": (AxisType.Auto, False),
    "auto_set_mesh": (AxisType.Auto, True),
    "explicit_set_mesh": (AxisType.Explicit, True),
}


def _mesh(size, kind):
    devices = np.array(jax.devices()[:size]).reshape(2 if size > 2 else 1, -1)
    return Mesh(devices, ("data", "expert"), axis_types=(kind, kind))


def _under(mesh, is_set):
    return jax.set_mesh(mesh) if is_set else contextlib.nullcontext()


@pytest.fixture(autouse=True)
def promotion():
    """Optax's Adam needs JAX's default one."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def checkpointer():
    with ocp.StandardCheckpointer() as checkpointer:
        yield checkpointer


@pytest.fixture(scope="module")
def group_on():
    """`(size, kind) -> group`: one for all tests, which so share what is compiled for it."""
    with contextlib.ExitStack() as groups:
        yield functools.cache(lambda *mesh: groups.enter_context(make_group(_mesh(*mesh))))
    _linen_step.cache_clear()


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(7), (8, 2, HIDDEN))


def _close(got, want):
    """Sums over 8, 4 or 2 ranks are rounded in another order; of at most about 100 terms."""
    size = np.max(np.abs(want))
    np.testing.assert_allclose(got, want, rtol=0, atol=200 * 2.0**-24 * size)


# --- NNX -----------------------------------------------------------------------------------------


def _build(group, *, bias, optimizer, seed):
    moe = ep_nnx.MoE(group, FFN, selection_bias=bias, rngs=nnx.Rngs(seed))
    return (moe, nnx.Optimizer(moe, TX, wrt=nnx.Param)) if optimizer else (moe,)


@nnx.jit
def _train(objects, x):
    """One step; without an optimizer, the forward pass alone."""
    moe, *optimizers = objects

    def objective(moe):
        return jnp.square(moe(x)).mean() + moe.load_balance_loss.get_value()

    loss, grads = nnx.value_and_grad(objective)(moe)
    for optimizer in optimizers:
        optimizer.update(moe, grads)
    if moe.selection_bias is not None:
        moe.update_bias(rate=0.25)
    return loss


@pytest.mark.parametrize(
    ("place", "target", "bias"),
    [(place, target, True) for place in PLACES for target in ("new", "abstract")]
    + [("auto_set_mesh", "new", False)],
)
def test_nnx(place, target, bias, x, group_on, checkpointer, tmp_path):
    kind, is_set = PLACES[place]
    # Optax makes its counters on the default device, unless a mesh is set.
    options = {"bias": bias, "optimizer": is_set or target == "abstract"}
    group = group_on(8, kind)
    with _under(group.mesh, is_set):
        objects = _build(group, seed=0, **options)
        _train(objects, x)
        saved = nnx.to_pure_dict(nnx.state(objects))
        checkpointer.save(tmp_path / "state", saved)
        checkpointer.wait_until_finished()
        want = [_train(objects, x) for _ in range(2)]
    for size in (8, 4, 2):
        group = group_on(size, kind)
        with _under(group.mesh, is_set):
            build = lambda group=group: _build(group, seed=1, **options)  # noqa: E731
            if target == "new":
                graph, state = nnx.split(build())
            else:
                graph, state = nnx.get_abstract_model(build, group.mesh)
            restored = checkpointer.restore(tmp_path / "state", nnx.to_pure_dict(state))
            jax.tree.map(np.testing.assert_array_equal, restored, saved)
            for array in jax.tree.leaves(restored):
                assert array.sharding.device_set == set(group.mesh.devices.flat)
            nnx.replace_by_pure_dict(state, restored)
            objects = nnx.merge(graph, state)
            got = [_train(objects, x) for _ in range(2)]
            objects[0](x)
        _close(got, want)


def test_nnx_into_the_result_of_eval_shape(x, group_on, checkpointer, tmp_path):
    """Without a mesh set. Flax gives scalars no sharding there, so the first call is not in jit."""
    (moe,) = _build(group_on(8, AxisType.Auto), bias=True, optimizer=False, seed=0)
    _train((moe,), x)
    checkpointer.save(tmp_path / "state", nnx.state(moe))
    checkpointer.wait_until_finished()
    want = moe(x)
    for size in (8, 4, 2):
        group = group_on(size, AxisType.Auto)
        build = lambda group=group: _build(group, bias=True, optimizer=False, seed=1)[0]  # noqa: E731
        graph, state = nnx.split(nnx.eval_shape(build))
        restored = nnx.merge(graph, checkpointer.restore(tmp_path / "state", state))
        _close(restored(x), want)
        nnx.jit(lambda moe, x: moe(x))(restored, x)


@pytest.mark.parametrize("place", PLACES)
def test_all_variables_of_a_new_layer_are_on_the_mesh(place, x, group_on):
    kind, is_set = PLACES[place]
    group = group_on(8, kind)
    mesh = group.mesh
    with _under(mesh, is_set):
        (moe,) = _build(group, bias=True, optimizer=False, seed=0)
        fresh = {name: v.get_value().sharding for name, v in nnx.state(moe).items()}
        moe(x)
        used = {name: v.get_value() for name, v in nnx.state(moe).items()}
    assert fresh["selection_bias"].is_equivalent_to(NamedSharding(mesh, P()), 1)
    assert fresh["tokens_per_expert"].is_equivalent_to(NamedSharding(mesh, P("expert")), 1)
    for name, array in used.items():
        assert fresh[name].is_equivalent_to(array.sharding, array.ndim), name
    assert used["tokens_per_expert"].sum() == 32
    specs = nnx.get_partition_spec(nnx.state(moe))
    assert specs["selection_bias"].get_value() == P(None)
    assert specs["tokens_per_expert"].get_value() == P("expert")


# --- Linen ---------------------------------------------------------------------------------------


def _init(group, x, *, bias, seed):
    layer = ep_linen.MoE(group, FFN, selection_bias=bias)
    variables = layer.init(jax.random.key(seed), x)
    return {"variables": variables, "optimizer": TX.init(variables["params"])}


@functools.cache
def _linen_step(group, bias):
    layer = ep_linen.MoE(group, FFN, selection_bias=bias)

    @jax.jit
    def step(state, x):
        def objective(params):
            variables = {**state["variables"], "params": params}
            out, updated = layer.apply(variables, x, mutable=[ep_linen.STATS])
            stats = updated[ep_linen.STATS]
            return jnp.square(out).mean() + stats["load_balance_loss"][-1], stats

        params = state["variables"]["params"]
        (loss, stats), grads = jax.value_and_grad(objective, has_aux=True)(params)
        updates, optimizer = TX.update(grads, state["optimizer"], params)
        variables = {**state["variables"], "params": optax.apply_updates(params, updates)}
        if bias:
            biases = variables[ep_linen.BIAS]
            variables[ep_linen.BIAS] = ep_linen.update_bias(biases, stats, rate=0.25)
        return {"variables": variables, "optimizer": optimizer}, loss

    return step


def _two_steps(step, state, x):
    state, first = step(state, x)
    return [first, step(state, x)[1]]


@pytest.mark.parametrize(
    ("target", "bias"),
    [("new", True), ("unboxed", True), ("abstract", True), ("new", False)],
)
def test_linen(target, bias, x, group_on, checkpointer, tmp_path):
    is_set = target != "abstract"
    unbox = (lambda tree: tree) if target == "new" else nn.unbox
    group = group_on(8, AxisType.Auto)
    with _under(group.mesh, is_set):
        step = _linen_step(group, bias)
        saved, _ = step(unbox(_init(group, x, bias=bias, seed=0)), x)
        checkpointer.save(tmp_path / "state", saved)
        checkpointer.wait_until_finished()
        want = _two_steps(step, saved, x)
    for size in (8, 4, 2):
        group = group_on(size, AxisType.Auto)
        mesh = group.mesh
        with _under(mesh, is_set):
            init = lambda group=group: _init(group, x, bias=bias, seed=1)  # noqa: E731
            if target == "abstract":
                shardings = nn.get_sharding(jax.eval_shape(init), mesh)
                shapes = jax.eval_shape(lambda init=init: nn.unbox(init()))
                state = jax.tree.map(
                    lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
                    shapes,
                    shardings,
                )
            else:
                state = unbox(init())
            restored = checkpointer.restore(tmp_path / "state", state)
            for got, want_value in zip(*map(jax.tree.leaves, (restored, saved)), strict=True):
                np.testing.assert_array_equal(got, want_value)
            for array in jax.tree.leaves(restored):
                assert array.sharding.device_set == set(mesh.devices.flat)
            _close(_two_steps(_linen_step(group, bias), restored, x), want)


def test_what_linen_makes_outside_of_jit_is_on_the_mesh(x, group_on):
    group = group_on(8, AxisType.Auto)
    mesh = group.mesh
    variables = nn.unbox(_init(group, x, bias=True, seed=0)["variables"])
    bias = variables[ep_linen.BIAS]["selection_bias"]
    assert bias.shape == (EXPERTS,)
    assert bias.sharding.is_equivalent_to(NamedSharding(mesh, P()), 1)
    for name, array in variables["params"].items():
        partition = P("expert") if array.ndim == 3 else P()
        assert array.sharding.is_equivalent_to(NamedSharding(mesh, partition), array.ndim), name
