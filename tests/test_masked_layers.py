# SPDX-License-Identifier: Apache-2.0
"""Layers with a `rank_mask`, `renormalize` and `token_ids`: against the oracle, and `moe`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
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
    RANKS,
    SLOTS,
    TOPK,
    make_group,
    plan_of,
    routing_of,
)
from ep_testing.hlo import collectives, operands
from ep_testing.masked_layers import (
    MASKS,
    ONE_OUT,
    ROWS,
    TOKENS,
    X,
    assert_close,
    make_layer,
    of_ranks,
    oracle,
    sizes,
    with_linen,
)
from jax_ep import reference
from jax_ep.flax import linen as ep_linen
from jax_ep.flax import nnx as ep_nnx

BOTH = pytest.mark.parametrize(
    ("flavor", "backend"), [("nnx", "ffi"), ("nnx", "xla"), ("linen", "ffi")]
)


@pytest.fixture(params=[False, True], ids=["plain", "copies"])
def has_copies(request):
    return request.param


@BOTH
@pytest.mark.parametrize("renormalize", [False, True])
def test_against_the_oracle(renormalize, flavor, has_copies, backend):
    with make_group(backend=backend, **sizes(has_copies)) as group:
        moe = make_layer(group, has_copies, renormalize=renormalize)
        with_stats = moe.with_stats
        if flavor == "linen":
            with_stats = functools.partial(with_linen(moe), method="with_stats")
        run = jax.jit(with_stats, static_argnames="stats")
        for mask in MASKS.values():
            want, counts, by_slot = oracle(moe, mask=mask)
            out, stats = run(X, rank_mask=mask)
            again, load = run(X, rank_mask=mask, stats="load")
            assert_close(out, want)
            assert (of_ranks(out)[:, ~mask] == 0).all()
            np.testing.assert_array_equal(out, again)
            for name, count in counts.items():
                np.testing.assert_array_equal(getattr(stats, name), count, err_msg=name)
            for name in ("num_tokens", "num_lost"):
                assert int(getattr(load, name).sum()) == counts[name]
            rows = np.asarray(load.rows_per_rank).sum(axis=0)
            np.testing.assert_array_equal(rows, counts["rows_per_rank"])
            np.testing.assert_array_equal(load.tokens_per_expert.sum(axis=0), by_slot)
            assert int(stats.tokens_per_expert.sum() + stats.num_lost) == len(X) * TOPK
        assert run._cache_size() == 2


def test_num_lost_is_counted_where_the_tokens_are():
    """With "load", by rank: all selections of a rank that is left out are lost."""
    with make_group() as group:
        _, load = make_layer(group, False).with_stats(X, rank_mask=ONE_OUT, stats="load")
        _, topk_idx, _ = routing_of(make_layer(group, False), X, {})
    owner = of_ranks(topk_idx) // (EXPERTS // RANKS)
    lost = (owner == 2).sum(axis=(2, 3))
    lost[:, 2] = TOKENS * TOPK
    np.testing.assert_array_equal(load.num_lost, lost)


def test_tokens_that_select_nothing_are_not_lost():
    padding = np.arange(len(X)) % 3 == 0
    with make_group() as group:
        moe = make_layer(group, False)
        _, topk_idx, _ = routing_of(moe, X, {})
        _, stats = moe.with_stats(X, mask=~padding, rank_mask=ONE_OUT)
        _, whole = moe.with_stats(X, mask=~padding)
    is_lost = (of_ranks(topk_idx) // 2 == 2) | ~ONE_OUT[:, None, None]
    lost = of_ranks(~padding)[..., None] & is_lost
    assert int(stats.num_lost) == lost.sum()
    assert int(whole.num_lost) == 0


def on_each_rank(moe, mask):
    """The layer by `jax_ep.route`, `place` and `moe` in `shard_map`: `f(params, x)`."""
    group, placement = moe.spec.group, moe.placement

    def on_rank(params, placement, mask, x):
        logits = jnp.dot(x, params["router"], precision="highest")
        slots, weights = jax_ep.route(logits, num_topk=TOPK)
        if placement is not None:
            slots = jax_ep.place(slots, placement, group=group)
        matrices = [params[name] for name in EXPERT_WEIGHTS]
        renormalize = moe.spec.renormalize
        return jax_ep.moe(
            x, slots, weights, *matrices, group=group, rank_mask=mask, renormalize=renormalize
        )

    split, whole = P(("data", "expert")), P()
    specs = {"router": whole} | dict.fromkeys(EXPERT_WEIGHTS, P("expert"))
    mapped = jax.shard_map(
        on_rank, mesh=group.mesh, in_specs=(specs, whole, whole, split), out_specs=split
    )
    return lambda params, x: mapped(params, placement, mask, x)


@BOTH
@pytest.mark.parametrize("renormalize", [False, True])
def test_values_and_gradients_are_those_of_moe(flavor, renormalize, has_copies, backend):
    with make_group(backend=backend, **sizes(has_copies)) as group:
        moe = make_layer(group, has_copies, renormalize=renormalize)
        graph, params, rest = nnx.split(moe, nnx.Param, ...)
        pure = {name: getattr(moe, name).get_value() for name in ("router", *EXPERT_WEIGHTS)}

        def with_nnx(pure, x):
            nnx.replace_by_pure_dict(params, pure)
            return nnx.merge(graph, params, rest, copy=True)(x, rank_mask=ONE_OUT)

        def with_flax_linen(pure, x):
            apply = with_linen(moe)
            variables = apply.args[0] | {"params": pure}
            return apply.func(variables, x, rank_mask=ONE_OUT)

        def value_and_grad(f):
            target = jnp.cos(jnp.arange(X.size, dtype=jnp.float32)).reshape(X.shape)

            def loss(pure, x):
                out = f(pure, x)
                return (out * target).sum(), out

            run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
            (_, out), grads = run(pure, X)
            return out, grads

        got = value_and_grad(with_nnx if flavor == "nnx" else with_flax_linen)
        want = value_and_grad(on_each_rank(moe, ONE_OUT))
        whole = value_and_grad(on_each_rank(moe, None))
    np.testing.assert_array_equal(got[0], want[0])
    assert (np.asarray(got[0]) != np.asarray(whole[0])).any()
    for grad, wanted in zip(*map(jax.tree.leaves, (got[1], want[1])), strict=True):
        np.testing.assert_allclose(grad, wanted, rtol=1e-5, atol=1e-5)


def test_another_mask_compiles_nothing(has_copies):
    traces = []
    with make_group(**sizes(has_copies)) as group:
        moe = make_layer(group, has_copies)

        @nnx.jit
        def run(moe, x, mask):
            traces.append(1)
            return moe(x, rank_mask=mask)

        linen = jax.jit(with_linen(moe, mutable=[ep_linen.STATS]))
        eager = []
        for mask in MASKS.values():
            want, counts, _ = oracle(moe, mask=mask)
            assert_close(run(moe, X, mask), want)
            load = moe.tokens_per_expert.get_value()
            np.testing.assert_array_equal(load, counts["tokens_per_expert"])
            out, state = linen(X, rank_mask=mask)
            assert_close(out, want)
            np.testing.assert_array_equal(state[ep_linen.STATS]["tokens_per_expert"][-1], load)
            eager.append(moe(X, rank_mask=mask))
        functions = [f for f in group._kept.values() if hasattr(f, "_cache_size")]
        assert len(functions) == 1
        # One for each of what calls it: nnx.jit and Linen trace it within themselves.
        before = functions[0]._cache_size()
        moe(X, rank_mask=~ONE_OUT)
        assert functions[0]._cache_size() == before
        assert linen._cache_size() == len(traces) == 1
    assert len({out.tobytes() for out in map(np.asarray, eager)}) == len(MASKS)


def test_all_true_is_the_layer_without_a_mask(has_copies):
    """To the bit, renormalized or not."""
    with make_group(**sizes(has_copies)) as group:
        for renormalize in (False, True):
            moe = make_layer(group, has_copies, renormalize=renormalize)
            np.testing.assert_array_equal(moe(X, rank_mask=MASKS["all"]), moe(X))


@pytest.mark.parametrize("renormalize", [False, True])
def test_experts_without_a_copy_are_lost_as_those_of_ranks_are(renormalize):
    """Expert 5 is in no slot, and rank 2 takes no part."""
    plan = plan_of()
    slots = np.where(plan.slot_expert[0] == 5, -1, plan.slot_expert[0])
    tables = (np.where(np.arange(8)[:, None] == 5, -1, t[0]) for t in (plan.copies, plan.upper))
    arrays = jax_ep.PlacementArrays(*map(jnp.asarray, (slots, *tables)))
    with make_group(num_experts=RANKS * SLOTS) as group:
        moe = ep_nnx.MoE(group, FFN, placement=arrays, renormalize=renormalize, rngs=nnx.Rngs(0))
        _, topk_idx, weights = routing_of(moe, X, {})
        chosen = of_ranks(topk_idx)
        matrices = [getattr(moe, name).get_value() for name in EXPERT_WEIGHTS]
        for mask in (None, ONE_OUT):
            out, stats = moe.with_stats(X, rank_mask=mask)
            rows = [reference.place(idx, arrays.copies, arrays.upper) for idx in chosen]
            options = {"num_experts": RANKS * SLOTS, "rank_mask": mask}
            left = np.stack([reference.plan(idx, **options).topk_idx for idx in rows])
            assert int(stats.num_lost) == (left < 0).sum() > (chosen == 5).sum() - (mask is None)
            own = of_ranks(weights).astype(np.float64)
            if renormalize:
                rest = np.where(left >= 0, own, 0).sum(axis=-1, keepdims=True)
                own *= own.sum(axis=-1, keepdims=True) / np.where(rest == 0, 1, rest)
            flat = (a.reshape(len(X), TOPK) for a in (left, own))
            assert_close(out, reference.moe_dense(X, *flat, *matrices))


# --- token_ids -----------------------------------------------------------------------------------


def test_with_token_ids_the_neighbors_do_not_matter():
    """Against the oracle; and tokens of a rank in another order go to the same copies."""
    rng = np.random.default_rng(2)
    ids = rng.integers(-(2**31), 2**31 - 1, len(X), np.int32)
    order = np.arange(len(X)).reshape(-1, TOKENS)[:, ::-1].ravel()
    with make_group(num_experts=RANKS * SLOTS) as group:
        moe = make_layer(group, True)
        want, counts, by_slot = oracle(moe, mask=MASKS["all"], token_ids=ids)
        for run, options in ((moe.with_stats, {}), (with_linen(moe), {"method": "with_stats"})):
            for dtype in (np.int32, np.uint32):
                out, stats = run(X, token_ids=ids.view(dtype), stats="load", **options)
                assert_close(out, want)
                np.testing.assert_array_equal(stats.tokens_per_expert.sum(axis=0), by_slot)
        moe(X, token_ids=ids)
        load = moe.tokens_per_expert.get_value()
        np.testing.assert_array_equal(load, counts["tokens_per_expert"])
        assert_close(moe(X[order], token_ids=ids[order]), want[order])
        assert np.abs(moe(X[order]) - moe(X)[order]).max() > 0.01


def test_token_ids_are_split_and_padded_as_the_tokens_are():
    """13 tokens on 8 devices, in two dimensions; and where no expert has copies."""
    x = X[:13].reshape(1, 13, HIDDEN)
    ids = np.arange(13, dtype=np.uint32)[None] * 77_777
    with make_group(num_experts=RANKS * SLOTS) as group:
        moe = make_layer(group, True)
        out = moe(x, token_ids=ids)
        padded = np.concatenate([x[0], np.zeros((3, HIDDEN), np.float32)])
        same = moe(padded, token_ids=np.append(ids, np.uint32([1, 2, 3])))
        assert_close(out[0], np.asarray(same)[:13])
        assert np.abs(out - moe(x)).max() > 0.01
    with make_group() as group:
        moe = make_layer(group, False)
        np.testing.assert_array_equal(moe(x, token_ids=ids), moe(x))


# --- where layers are called ---------------------------------------------------------------------


@pytest.mark.parametrize("replicas", ["stored", "expanded"])
def test_explicit_axes(replicas):
    kinds = (AxisType.Explicit, AxisType.Explicit)
    mesh = jax.make_mesh((ROWS, RANKS), ("data", "expert"), axis_types=kinds)
    ids = jnp.arange(len(X))
    results = []
    for explicit in (mesh, None):
        with make_group(explicit, num_experts=RANKS * SLOTS) as group, jax.set_mesh(group.mesh):
            moe = ep_nnx.MoE(
                group, FFN, placement=plan_of().layer(0), replicas=replicas,
                renormalize=True, rngs=nnx.Rngs(0),
            )  # fmt: skip
            run = nnx.jit(lambda moe, x, mask, ids: moe(x, rank_mask=mask, token_ids=ids))
            eager = moe(X, rank_mask=ONE_OUT, token_ids=ids)
            np.testing.assert_allclose(run(moe, X, ONE_OUT, ids), eager, rtol=1e-5, atol=1e-6)
            results.append((np.asarray(eager), moe.tokens_per_expert.get_value()))
    (out, load), (want, want_load) = results
    np.testing.assert_allclose(out, want, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(load, want_load)
    assert 0 < load.sum() < len(X) * TOPK


@pytest.mark.parametrize("axes", [{"tensor_axes": ("t",)}, {"fsdp_axes": ("t",)}, {}])
def test_other_axes_of_the_mesh(axes):
    """Weights in parts, along axes that split tokens, too: as on the mesh of the others."""
    mesh = jax.make_mesh((4, 2), ("expert", "t"), axis_types=(AxisType.Auto,) * 2)
    options = axes | {"token_spec": P(("expert", "t"))}
    ids = np.arange(len(X), dtype=np.int32)
    outs = []
    for on, given in ((mesh, options), (None, {})):
        with make_group(on) as group:
            moe = ep_nnx.MoE(group, FFN, renormalize=True, rngs=nnx.Rngs(0), **given)
            if on is None:  # the same tokens on each rank
                perm = X.reshape(RANKS, ROWS, TOKENS, HIDDEN).swapaxes(0, 1).reshape(X.shape)
                out, stats = moe.with_stats(perm, rank_mask=ONE_OUT)
                out = of_ranks(out).swapaxes(0, 1).reshape(X.shape)
            else:
                out, stats = moe.with_stats(X, rank_mask=ONE_OUT, token_ids=ids)
            outs.append((np.asarray(out), stats))
    (out, stats), (want, want_stats) = outs
    assert_close(out, want)
    for name in ("tokens_per_expert", "rows_per_rank", "num_tokens", "num_lost"):
        got, wanted = getattr(stats, name), getattr(want_stats, name)
        np.testing.assert_array_equal(got, wanted, err_msg=name)
    assert int(stats.num_lost) > 0


def test_stacked_and_rematerialized_layers_take_one_mask():
    names = {nnx.PARTITION_NAME: None}
    with make_group() as group:

        @nnx.split_rngs(splits=2)
        @nnx.vmap(transform_metadata=names)
        def make_layers(rngs):
            return ep_nnx.MoE(group, FFN, rngs=rngs)

        @nnx.jit
        @nnx.scan(in_axes=(0, nnx.Carry, None), out_axes=nnx.Carry, transform_metadata=names)
        def run(layer, x, mask):
            return x + nnx.remat(lambda layer, x: layer(x, rank_mask=mask))(layer, x)

        layers = make_layers(nnx.Rngs(0))
        out = run(layers, X, ONE_OUT)
        graph, state = nnx.split(layers)
        want = X
        for i in range(2):
            layer = nnx.merge(graph, jax.tree.map(lambda a, i=i: a[i], state))
            want = want + layer(want, rank_mask=ONE_OUT)
        np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-5)

        class Block(nn.Module):
            @nn.compact
            def __call__(self, x, mask):
                return x + nn.remat(ep_linen.MoE)(group, FFN, name="moe")(x, rank_mask=mask), None

        stack = nn.scan(
            Block,
            variable_axes={"params": 0, ep_linen.STATS: 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=2,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )()
        pure = {name: getattr(layers, name).get_value() for name in ("router", *EXPERT_WEIGHTS)}
        got, _ = jax.jit(stack.apply)({"params": {"moe": pure}}, X, ONE_OUT)
    np.testing.assert_allclose(got, out, rtol=1e-5, atol=1e-5)


def test_a_mask_takes_no_collective_and_nobody_waits(has_copies):
    """The mask is an operand of the exchange, too: results do not say whether anybody waits."""
    rows = jax.sharding.PartitionSpec(("data", "expert"))
    with make_group(backend="ffi", **sizes(has_copies)) as group:
        moe = make_layer(group, has_copies, renormalize=True)
        graph, state = nnx.split(moe)

        def run(state, x, mask):
            layer = nnx.merge(graph, state)
            return layer.with_stats(x, stats="load", rank_mask=mask)

        x = jax.device_put(X, jax.sharding.NamedSharding(group.mesh, rows))
        texts = [jax.jit(run).lower(state, x, m).compile().as_text() for m in (None, ONE_OUT)]
    assert not collectives(texts[1])
    assert operands(texts[0]) == {"plan_dispatch": 5, "combine": 6}
    assert operands(texts[1]) == {"plan_dispatch": 6, "combine": 7}


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank_mask": np.ones(3, bool)}, r"rank_mask is bool\[3\]; allowed: bool\[4\], or None"),
        ({"rank_mask": np.ones(4, np.int32)}, r"rank_mask is int32\[4\]; allowed: bool\[4\]"),
        ({"rank_mask": np.ones((4, 1), bool)}, r"rank_mask is bool\[4, 1\]; allowed: bool\[4\]"),
        ({"rank_mask": [True] * 4}, r"rank_mask is a list; allowed: an array, bool\[4\]"),
        ({"token_ids": np.ones(3, np.int32)}, r"token_ids is int32\[3\]; allowed: int32\[24\], or"),
        ({"token_ids": np.ones(24)}, r"token_ids is float64\[24\]; allowed: int32\[24\], or uint"),
        ({"token_ids": 3}, "token_ids is a int; allowed: an array, int32"),
    ],
)
def test_errors(arguments, message):
    with make_group() as group:
        moe = ep_nnx.MoE(group, FFN, rngs=nnx.Rngs(0))
        apply = with_linen(moe)
        for run in (moe, moe.with_stats, apply, functools.partial(apply, method="with_stats")):
            with pytest.raises(ValueError, match=message):
                run(X, **arguments)
            with pytest.raises(ValueError, match=message):  # while it is traced
                jax.eval_shape(lambda x, run=run: run(x, **arguments), X)


def test_a_group_that_cannot_leave_ranks_out(monkeypatch):
    from jax_ep._src.groups import group as groups

    with make_group() as group:
        moe = ep_nnx.MoE(group, FFN, rngs=nnx.Rngs(0))
        own = groups.backend_group(group)
        monkeypatch.setattr(own, "why_no_rank_mask", "it spans domains")
        with pytest.raises(
            ValueError, match="an MoE layer is given a rank_mask; allowed: None, because it spans"
        ):
            moe(X, rank_mask=ONE_OUT)
