# SPDX-License-Identifier: Apache-2.0
"""Layers whose experts have copies, against the same layers without."""

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jax_ep
from ep_testing.flax_layers import (
    EXPERT_WEIGHTS,
    EXPERTS,
    FFN,
    HIDDEN,
    LOAD,
    RANKS,
    SLOTS,
    TOPK,
    make_group,
    make_nnx,
    plan_of,
    run_linen,
    run_nnx,
    to_linen,
)
from ep_testing.programs import make_mesh
from jax_ep import reference
from jax_ep.flax import linen as ep_linen
from jax_ep.flax import nnx as ep_nnx
from jax_ep.flax import stored_from_logical

OPTIONS = {"num_shared_experts": 1, "selection_bias": True, "router_bias": True}


@pytest.fixture(scope="module")
def plain():
    with make_group() as group:
        yield make_nnx(group, **OPTIONS)


@pytest.fixture(scope="module")
def group():
    with make_group(num_experts=RANKS * SLOTS) as group:
        yield group


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(7), (8, 6, HIDDEN))


def make_placed(group, plain, replicas, plan=None):
    """With the plain layer's parameters."""
    arrays = (plan or plan_of()).layer(0)
    options = OPTIONS | {"placement": arrays, "replicas": replicas}
    moe = ep_nnx.MoE(group, FFN, num_logical_experts=EXPERTS, rngs=nnx.Rngs(1), **options)
    logical = {p[-1]: v[...] for p, v in nnx.to_flat_state(nnx.state(plain, nnx.Param))}
    params = stored_from_logical(logical, arrays) if replicas == "stored" else logical
    for name, value in params.items():
        param = getattr(moe, name)
        param.set_value(jax.device_put(value, param.get_value().sharding))
    bias = plain.selection_bias.get_value()
    moe.selection_bias.set_value(jax.device_put(bias, moe.selection_bias.get_value().sharding))
    return moe


def placed_linen(moe):
    """The same layer and its variables."""
    layer = ep_linen.MoE(
        moe.spec.group, FFN, num_logical_experts=EXPERTS, replicas=moe.spec.replicas, **OPTIONS
    )
    tables = {name: getattr(moe, name).get_value() for name in ("slot_expert", "copies", "upper")}
    return layer, {**to_linen(moe), ep_linen.PLACEMENT: tables}


def nnx_value_and_grad(moe, x):
    graph, params, rest = nnx.split(moe, nnx.Param, ...)

    @jax.jit
    def run(params, x):
        def loss(params, x):
            out, stats = nnx.merge(graph, params, rest, copy=True).with_stats(x)
            return jnp.square(out).mean() + 0.1 * stats.load_balance_loss, (out, stats)

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, x)

    (_, (out, stats)), (grads, of_x) = run(params, x)
    grads = {path[-1]: v.get_value() for path, v in nnx.to_flat_state(grads)}
    return out, stats, grads, of_x


def linen_value_and_grad(layer, variables, x):
    @jax.jit
    def run(params, x):
        def loss(params, x):
            own = {**variables, "params": params}
            out, stats = layer.apply(own, x, method="with_stats")
            return jnp.square(out).mean() + 0.1 * stats.load_balance_loss, (out, stats)

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, x)

    (_, (out, stats)), (grads, of_x) = run(variables["params"], x)
    return out, stats, grads, of_x


def by_expert(name, grad, replicas):
    """The gradient of each expert: where weights are of slots, the sum over its copies."""
    if replicas == "expanded" or name not in EXPERT_WEIGHTS:
        return grad
    out = np.zeros((EXPERTS, *grad.shape[1:]))
    np.add.at(out, plan_of().slot_expert[0], np.asarray(grad, np.float64))
    return out


@pytest.mark.parametrize("replicas", ["stored", "expanded"])
def test_outputs_gradients_and_statistics_are_those_without_copies(plain, group, x, replicas):
    moe = make_placed(group, plain, replicas)
    out, stats, grads, of_x = nnx_value_and_grad(plain, x)
    placed = nnx_value_and_grad(moe, x), linen_value_and_grad(*placed_linen(moe), x)
    num = EXPERTS if replicas == "expanded" else RANKS * SLOTS
    assert moe.w_up.get_value().shape == (num, HIDDEN, FFN)
    assert moe.router.get_value().shape == (HIDDEN, EXPERTS)
    for got_out, got_stats, got_grads, got_of_x in placed:
        np.testing.assert_allclose(got_out, out, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(got_of_x, of_x, rtol=1e-3, atol=1e-6)
        assert got_grads.keys() == grads.keys()
        for name, want in grads.items():
            got = by_expert(name, got_grads[name], replicas)
            np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-6, err_msg=name)
        np.testing.assert_array_equal(got_stats.tokens_per_expert, stats.tokens_per_expert)
        for name in ("load_balance_loss", "router_z_loss", "num_dropped", "num_tokens"):
            np.testing.assert_allclose(getattr(got_stats, name), getattr(stats, name), rtol=1e-6)
    # Rows went to copies: a rank has not those of its block of experts.
    assert stats.rows_per_rank.tolist() == stats.tokens_per_expert.reshape(4, 2).sum(1).tolist()
    assert placed[0][1].rows_per_rank.tolist() == placed[1][1].rows_per_rank.tolist()
    assert placed[0][1].rows_per_rank.tolist() != stats.rows_per_rank.tolist()
    assert placed[0][1].rows_per_rank.sum() == 48 * TOPK


@pytest.mark.parametrize("replicas", ["stored", "expanded"])
def test_another_placement_compiles_nothing(plain, group, x, replicas):
    moe = make_placed(group, plain, replicas)
    want = plain(x)
    traces = []

    @nnx.jit
    def run(moe, x):
        traces.append(1)
        return moe(x)

    np.testing.assert_allclose(run(moe, x), want, rtol=1e-4, atol=1e-5)
    layer, variables = placed_linen(moe)
    apply = jax.jit(layer.apply)
    apply(variables, x)
    other = plan_of(LOAD[::-1], max_copies=plan_of().max_copies)
    if replicas == "stored":
        moved = make_placed(group, plain, replicas, other)
        for name in EXPERT_WEIGHTS:
            getattr(moe, name).set_value(getattr(moved, name).get_value())
    moe.set_placement(other.layer(0))
    np.testing.assert_array_equal(moe.placement.slot_expert, other.slot_expert[0])
    out = run(moe, x)
    np.testing.assert_allclose(out, want, rtol=1e-4, atol=1e-5)
    tables = ep_linen.set_placement(variables[ep_linen.PLACEMENT], other.layer(0))
    variables = {**to_linen(moe), ep_linen.PLACEMENT: tables}
    np.testing.assert_array_equal(apply(variables, x), out)
    assert len(traces) == 1
    assert apply._cache_size() == 1
    load = plain.tokens_per_expert.get_value()
    np.testing.assert_array_equal(moe.tokens_per_expert.get_value(), load)
    bias = moe.selection_bias.get_value()
    moe.update_bias(rate=0.5)
    want = reference.update_bias(bias, load, rate=0.5)
    np.testing.assert_allclose(moe.selection_bias.get_value(), want, rtol=1e-6)


def test_copies_begin_alike_and_as_without(group):
    """The same key gives the same experts, whatever copies they have."""
    with make_group() as plain_group:
        want = {n: getattr(make_nnx(plain_group), n).get_value() for n in EXPERT_WEIGHTS}
    slots = plan_of().slot_expert[0]
    for replicas, index in (("stored", slots), ("expanded", slice(None))):
        arrays = plan_of().layer(0)
        moe = ep_nnx.MoE(group, FFN, placement=arrays, replicas=replicas, rngs=nnx.Rngs(0))
        for name, values in want.items():
            got = getattr(moe, name).get_value()
            np.testing.assert_array_equal(got, np.asarray(values)[index])
            assert got.sharding.spec == P("expert", None, None)
    layer = ep_linen.MoE(group, FFN, num_logical_experts=EXPERTS)
    variables = nn.unbox(jax.jit(layer.init)(jax.random.key(0), jnp.zeros((8, HIDDEN))))
    even = jax_ep.plan_placement(np.ones(EXPERTS), num_ranks=RANKS, slots_per_rank=SLOTS)
    tables = variables[ep_linen.PLACEMENT]
    np.testing.assert_array_equal(tables["slot_expert"], even.slot_expert[0])
    first = variables["params"]["w_up"][even.copies[0, :, 0]]
    np.testing.assert_array_equal(variables["params"]["w_up"], first[even.slot_expert[0]])


def test_checkpoints_have_the_placement(plain, group, x, tmp_path):
    moe = make_placed(group, plain, "stored", plan_of(LOAD[::-1]))
    want = moe(x)
    layer, variables = placed_linen(moe)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "nnx", nnx.to_pure_dict(nnx.state(moe)))
        checkpointer.save(tmp_path / "linen", variables)
        checkpointer.wait_until_finished()
        new = ep_nnx.MoE(group, FFN, num_logical_experts=EXPERTS, rngs=nnx.Rngs(5), **OPTIONS)
        graph, state = nnx.split(new)
        nnx.replace_by_pure_dict(
            state, checkpointer.restore(tmp_path / "nnx", nnx.to_pure_dict(state))
        )
        restored = nnx.merge(graph, state)
        again = checkpointer.restore(tmp_path / "linen", jax.tree.map(jnp.zeros_like, variables))
    np.testing.assert_array_equal(restored.placement.slot_expert, moe.placement.slot_expert)
    np.testing.assert_array_equal(restored(x), want)
    np.testing.assert_array_equal(layer.apply(again, x), want)


@pytest.mark.parametrize("names", [("data", "expert", "tensor"), ("expert", "data", "tensor")])
def test_expanded_weights_in_parts_and_biases(names):
    """Over tensor and FSDP axes, with vectors that are no whole rows of the exchange."""
    mesh = make_mesh((2, 2, 2), names)
    x = jax.random.normal(jax.random.key(1), (8, 4, HIDDEN))
    options = {
        "experts": jax_ep.experts.GptOss(),
        "tensor_axes": ("tensor",),
        "fsdp_axes": ("data",),
    }
    plan = jax_ep.plan_placement(LOAD, num_ranks=2, slots_per_rank=5)
    with make_group(mesh) as plain_group, make_group(mesh, num_experts=10) as group:
        layers = [
            ep_nnx.MoE(plain_group, FFN, rngs=nnx.Rngs(0), **options),
            ep_nnx.MoE(
                group,
                FFN,
                placement=plan.layer(0),
                replicas="expanded",
                rngs=nnx.Rngs(0),
                **options,
            ),
        ]
        for layer in layers:
            for name in ("bias_gate", "bias_up", "bias_down"):
                param = getattr(layer, name)
                values = jax.random.normal(jax.random.key(3), param.get_value().shape)
                param.set_value(jax.device_put(values, param.get_value().sharding))
        (want_out, _, want, _), (out, _, got, _) = (nnx_value_and_grad(m, x) for m in layers)
    np.testing.assert_allclose(out, want_out, rtol=1e-4, atol=1e-5)
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-3, atol=1e-6, err_msg=name)


def test_stacked_layers_have_placements_of_their_own(group, x):
    plans = plan_of(np.stack([LOAD, LOAD[::-1]]))
    stacked = jax.tree.map(lambda *tables: jnp.stack(tables), plans.layer(0), plans.layer(1))
    names = {nnx.PARTITION_NAME: None}

    @nnx.split_rngs(splits=2)
    @nnx.vmap(transform_metadata=names)
    def make_layers(rngs):
        return ep_nnx.MoE(group, FFN, num_logical_experts=EXPERTS, replicas="expanded", rngs=rngs)

    @nnx.jit
    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry, transform_metadata=names)
    def run(layer, x):
        return x + layer(x)

    layers = make_layers(nnx.Rngs(0))
    even = run(layers, x)
    layers.set_placement(stacked)
    np.testing.assert_allclose(run(layers, x), even, rtol=1e-4, atol=1e-5)
    assert layers.slot_expert.get_value().shape == (2, RANKS * SLOTS)

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            options = {"placement": plans.layer(0), "replicas": "expanded", "name": "moe"}
            return x + nn.remat(ep_linen.MoE)(group, FFN, **options)(x), None

    axes = {"params": 0, ep_linen.PLACEMENT: 0, ep_linen.STATS: 0}
    stack = nn.scan(
        Block,
        variable_axes=axes,
        split_rngs={"params": True},
        length=2,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )()
    variables = nn.unbox(stack.init(jax.random.key(0), x, None))
    before, _ = jax.jit(stack.apply)(variables, x, None)
    tables = ep_linen.set_placement(variables[ep_linen.PLACEMENT]["moe"], stacked)
    variables = {**variables, ep_linen.PLACEMENT: {"moe": tables}}
    after, _ = jax.jit(stack.apply)(variables, x, None)
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-5)


def test_explicit_axes(plain, x):
    kinds = (AxisType.Explicit, AxisType.Explicit)
    mesh = jax.make_mesh((2, 4), ("data", "expert"), axis_types=kinds)
    with jax.set_mesh(mesh), make_group(mesh, num_experts=RANKS * SLOTS) as group:
        for replicas in ("stored", "expanded"):
            moe = ep_nnx.MoE(
                group, FFN, placement=plan_of().layer(0), replicas=replicas, rngs=nnx.Rngs(0)
            )
            with make_group(mesh) as plain_group:
                want = ep_nnx.MoE(plain_group, FFN, rngs=nnx.Rngs(0))(x)
            np.testing.assert_allclose(run_nnx(moe, x)[0], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("recv_capacity", [None, 3])
def test_linen_runs_as_nnx_does(recv_capacity, plain, x):
    """To the bit, with drops, too."""
    with make_group(num_experts=RANKS * SLOTS, recv_capacity=recv_capacity) as group:
        moe = make_placed(group, plain, "stored")
        layer, variables = placed_linen(moe)
        out, stats = run_nnx(moe, x)
        linen_out, linen_stats = run_linen(layer, variables, x)
    assert (stats["num_dropped"] > 0) == (recv_capacity is not None)
    np.testing.assert_array_equal(out, linen_out)
    for name, value in stats.items():
        np.testing.assert_array_equal(value, linen_stats[name])
