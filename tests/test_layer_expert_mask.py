# SPDX-License-Identifier: Apache-2.0
"""`expert_mask` of layers: experts that their router may not choose, against the oracle."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

from ep_testing.flax_layers import (
    EXPERT_WEIGHTS,
    EXPERTS,
    FFN,
    HIDDEN,
    RANKS,
    SLOTS,
    TOPK,
    make_group,
    make_nnx,
    plan_of,
)
from ep_testing.masked_layers import ONE_OUT, X, assert_close, with_linen
from jax_ep import reference
from jax_ep.flax import nnx as ep_nnx

MASKS = [np.arange(EXPERTS) // 2 != 2, np.arange(EXPERTS) == 6, np.zeros(EXPERTS, bool)]


def oracle(moe, mask):
    """Outputs and the experts chosen; copies are alike."""
    logits = X.astype(np.float64) @ np.asarray(moe.router.get_value(), np.float64)
    idx, weights = reference.route(logits, num_topk=TOPK, expert_mask=mask)
    matrices = [np.asarray(getattr(moe, name).get_value()) for name in EXPERT_WEIGHTS]
    if moe.placement is not None:
        first = np.asarray(moe.placement.copies)[:, 0]
        matrices = [m[first] for m in matrices]
    return reference.moe_dense(X, idx, weights, *matrices), idx


@pytest.mark.parametrize("flavor", ["nnx", "linen"])
@pytest.mark.parametrize("has_copies", [False, True])
def test_against_the_oracle(flavor, has_copies):
    """Masks that change compile nothing; of fewer experts than K, and of none."""
    options = {"placement": plan_of().layer(0)} if has_copies else {}
    sizes = {"num_experts": RANKS * SLOTS} if has_copies else {}
    with make_group(**sizes) as group:
        moe = ep_nnx.MoE(group, FFN, rngs=nnx.Rngs(0), **options)
        with_stats = moe.with_stats
        if flavor == "linen":
            with_stats = functools.partial(with_linen(moe), method="with_stats")
        run = jax.jit(functools.partial(with_stats, routing=True))
        for mask in (*MASKS, np.ones(EXPERTS, bool)):
            want, idx = oracle(moe, mask)
            out, stats = run(X, expert_mask=mask)
            assert_close(out, want)
            np.testing.assert_array_equal(stats.topk_idx, idx)
            load = np.bincount(idx[idx >= 0], minlength=EXPERTS)
            np.testing.assert_array_equal(stats.tokens_per_expert, load)
            assert int(stats.num_lost) == 0
        assert run._cache_size() == 1
        np.testing.assert_array_equal(out, moe(X))
        moe(X, expert_mask=MASKS[0])
        load = moe.tokens_per_expert.get_value()
        assert load[4:6].tolist() == [0, 0]
        assert load.sum() == len(X) * TOPK


def test_with_the_experts_of_the_ranks_nothing_is_lost_of_the_others_tokens():
    """A selection bias does not bring them back, and logits of the caller's are masked, too."""
    is_there = np.repeat(ONE_OUT, EXPERTS // RANKS)
    own_tokens = np.repeat(np.tile(ONE_OUT, 2), len(X) // 8)
    with make_group() as group:
        moe = make_nnx(group, selection_bias=True, score="sigmoid")
        logits = jnp.asarray(X @ np.asarray(moe.router.get_value()))
        for more in ({}, {"logits": logits}):
            options = {"rank_mask": ONE_OUT, **more}
            _, stats = moe.with_stats(X, **options, stats="load")
            assert int(stats.num_lost.sum()) > (~own_tokens).sum() * TOPK
            _, stats = moe.with_stats(X, **options, stats="load", expert_mask=is_there)
            assert int(stats.num_lost.sum()) == (~own_tokens).sum() * TOPK
            assert int(stats.num_lost[:, ONE_OUT].sum()) == 0


def test_explicit_axes():
    kinds = (AxisType.Explicit, AxisType.Explicit)
    mesh = jax.make_mesh((2, 4), ("data", "expert"), axis_types=kinds)
    with jax.set_mesh(mesh), make_group(mesh) as group:
        moe = make_nnx(group)
        want, _ = oracle(moe, MASKS[0])
        assert_close(moe(X, expert_mask=MASKS[0]), want)
        assert_close(nnx.jit(lambda moe, x, m: moe(x, expert_mask=m))(moe, X, MASKS[0]), want)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"expert_mask": np.ones(4, bool)},
            r"expert_mask is bool\[4\]; allowed: bool\[8\], one for each expert that the router",
        ),
        ({"expert_mask": np.ones(8)}, r"expert_mask is float64\[8\]; allowed: bool\[8\]"),
        ({"expert_mask": [True] * 8}, r"expert_mask is a list; allowed: an array, bool\[8\]"),
        (
            {
                "expert_mask": MASKS[0],
                "topk": (np.zeros((24, 2), np.int32), np.ones((24, 2), np.float32)),
            },
            "expert_mask is given, and the layer does not choose the experts: topk or a router",
        ),
    ],
)
def test_errors(arguments, message):
    with make_group() as group:
        moe = make_nnx(group)
        for run in (moe, moe.with_stats, with_linen(moe)):
            with pytest.raises(ValueError, match=message):
                jax.eval_shape(lambda x, run=run: run(x, **arguments), X)


def test_a_router_of_the_callers_takes_no_mask():
    def router(x):
        return None, jnp.zeros((len(x), TOPK), jnp.int32), jnp.ones((len(x), TOPK))

    with make_group() as group:
        moe = ep_nnx.MoE(group, FFN, router=router, rngs=nnx.Rngs(0))
        with pytest.raises(ValueError, match="expert_mask is given, and the layer does not choose"):
            moe(jnp.zeros((8, HIDDEN)), expert_mask=MASKS[0])
