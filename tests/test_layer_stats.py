# SPDX-License-Identifier: Apache-2.0
"""`LayerStats` of layers: with collectives and without, with copies, drops, masks and padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jax_ep
from ep_testing.flax_layers import EXPERTS, FFN, HIDDEN, TOPK, make_group, plan_of
from ep_testing.hlo import collectives
from ep_testing.programs import make_mesh
from jax_ep.flax import linen as ep_linen
from jax_ep.flax import nnx as ep_nnx


def chosen_of(stats):
    return np.asarray(stats.topk_idx).reshape(-1, TOPK)


def summed(stats, num_ranks, slot_expert=None):
    """What `stats="load"` says, added up as its documentation says."""
    by_slot = np.asarray(stats.tokens_per_expert).sum(axis=0)
    load = by_slot
    if slot_expert is not None:
        load = np.bincount(slot_expert + 1, by_slot, minlength=EXPERTS + 1)[1:]
    per_rank = (np.asarray(a).sum(axis=0) for a in (stats.rows_per_rank, stats.dropped_per_rank))
    totals = (int(a.sum()) for a in (stats.num_tokens, stats.num_lost))
    assert by_slot.size % num_ranks == 0
    return load, *per_rank, *totals


@pytest.mark.parametrize(
    ("shape", "names", "options"),
    [
        ((2, 4), ("data", "expert"), {}),
        ((2, 2, 2), ("data", "expert", "tensor"), {"tensor_axes": ("tensor",)}),
        (
            (2, 2, 2),
            ("tensor", "data", "expert"),
            {"tensor_axes": ("tensor",), "fsdp_axes": "data"},
        ),
        # Along "other" every device does the same.
        ((2, 2, 2), ("other", "data", "expert"), {"data_axes": ("data",)}),
    ],
)
@pytest.mark.parametrize("has_copies", [False, True])
def test_counts_are_those_of_the_chosen_experts(shape, names, options, has_copies):
    num_ranks = dict(zip(names, shape, strict=True))["expert"]
    slots = 12 // num_ranks if has_copies else EXPERTS // num_ranks
    plan = plan_of(num_ranks=num_ranks, slots_per_rank=slots) if has_copies else None
    more = {"placement": plan.layer(0)} if has_copies else {}
    mesh = make_mesh(shape, names)
    # Tokens that do not divide, some of them masked; room for fewer rows than come.
    x = jax.random.normal(jax.random.key(1), (13, HIDDEN))
    mask = jnp.arange(13) % 4 != 1
    with make_group(mesh, num_experts=num_ranks * slots, recv_capacity=3) as group:
        moe = ep_nnx.MoE(group, FFN, rngs=nnx.Rngs(0), **options, **more)
        _, stats = moe.with_stats(x, mask=mask, routing=True)
        _, load = moe.with_stats(x, mask=mask, stats="load")
    chosen = chosen_of(stats)
    want = np.bincount(chosen[chosen >= 0], minlength=EXPERTS)
    slot_expert = plan.slot_expert[0] if has_copies else None
    by_expert, rows, dropped, num_tokens, num_lost = summed(load, num_ranks, slot_expert)
    np.testing.assert_array_equal(stats.tokens_per_expert, want)
    np.testing.assert_array_equal(by_expert, want)
    for got in (rows, stats.rows_per_rank):
        assert got.shape == (num_ranks,)
        assert got.sum() == want.sum()
    np.testing.assert_array_equal(rows, stats.rows_per_rank)
    if not has_copies:
        np.testing.assert_array_equal(rows, want.reshape(num_ranks, -1).sum(axis=1))
    np.testing.assert_array_equal(dropped, stats.dropped_per_rank)
    assert dropped.sum() == stats.num_dropped > 0
    assert num_tokens == stats.num_tokens == int(mask.sum())
    assert num_lost == stats.num_lost == 0
    for name in ("num_dropped", "load_balance_loss", "router_z_loss", "logits", "topk_idx"):
        assert getattr(load, name) is None


def test_selections_of_experts_without_a_copy_are_lost():
    plan = plan_of()
    slots = plan.slot_expert.copy()
    slots[slots == 5] = -1
    tables = (np.where(np.arange(8)[:, None] == 5, -1, t[0]) for t in (plan.copies, plan.upper))
    arrays = jax_ep.PlacementArrays(*map(jnp.asarray, (slots[0], *tables)))
    x = jax.random.normal(jax.random.key(1), (16, HIDDEN))
    with make_group(num_experts=12) as group:
        moe = ep_nnx.MoE(group, FFN, placement=arrays, rngs=nnx.Rngs(0))
        _, stats = moe.with_stats(x, routing=True)
        _, load = moe.with_stats(x, stats="load")
    chosen = chosen_of(stats)
    assert stats.num_lost == load.num_lost.sum() == (chosen == 5).sum() > 0
    assert stats.num_tokens == load.num_tokens.sum() == 16
    assert stats.tokens_per_expert[5] == 0
    assert stats.tokens_per_expert.sum() == 16 * TOPK - stats.num_lost


def test_load_takes_no_collective():
    """With copies that are stored, and with those that are expanded."""
    x = jnp.zeros((8, HIDDEN))
    plan = plan_of()
    found = {}
    with make_group(num_experts=12) as group:
        for replicas in ("stored", "expanded"):
            moe = ep_nnx.MoE(
                group, FFN, placement=plan.layer(0), replicas=replicas, rngs=nnx.Rngs(0)
            )
            layer = ep_linen.MoE(group, FFN, placement=plan.layer(0), replicas=replicas)
            graph, state = nnx.split(moe)
            variables = layer.init(jax.random.key(0), x)
            for stats in ("all", "load", None):

                def run(state, x, stats=stats, graph=graph):
                    return nnx.merge(graph, state).with_stats(x, stats=stats)

                def run_linen(variables, x, stats=stats, layer=layer):
                    return layer.apply(variables, x, stats=stats, method="with_stats")

                rows = jax.sharding.NamedSharding(
                    group.mesh, jax.sharding.PartitionSpec(("data", "expert"))
                )
                own = jax.device_put(x, rows)
                texts = [
                    jax.jit(f).lower(v, own).compile().as_text()
                    for f, v in ((run, state), (run_linen, variables))
                ]
                found[replicas, stats] = [collectives(text).total() for text in texts]
    for (_, stats), counts in found.items():
        assert all(n > 0 for n in counts) if stats == "all" else counts == [0, 0], found


def test_errors():
    x = jnp.zeros((8, HIDDEN))
    with make_group() as group:
        moe = ep_nnx.MoE(group, FFN, rngs=nnx.Rngs(0))
        with pytest.raises(ValueError, match="stats is 'some'; allowed: 'all', 'load', None"):
            moe.with_stats(x, stats="some")
        with pytest.raises(ValueError, match="routing is True, and stats None; allowed: 'all'"):
            moe.with_stats(x, stats=None, routing=True)
        assert moe.with_stats(x, stats=None)[1] is None
