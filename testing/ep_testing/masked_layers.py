# SPDX-License-Identifier: Apache-2.0
"""Layers that are called with a `rank_mask`, and what the oracle says of them."""

import functools

import jax
import numpy as np
from flax import nnx

from ep_testing.flax_layers import (
    EXPERT_WEIGHTS,
    EXPERTS,
    FFN,
    HIDDEN,
    RANKS,
    SLOTS,
    plan_of,
    routing_of,
    to_linen,
)
from jax_ep import reference
from jax_ep.flax import linen as ep_linen
from jax_ep.flax import nnx as ep_nnx

ROWS, TOKENS = 2, 3  # Of the mesh, `("data", "expert")`; tokens of a device.
MASKS = {"one": [1, 1, 0, 1], "two": [0, 1, 1, 0], "nobody": [0] * 4, "all": [1] * 4}
MASKS = {name: np.array(mask, bool) for name, mask in MASKS.items()}
ONE_OUT = MASKS["one"]
X = np.random.default_rng(7).standard_normal((ROWS * RANKS * TOKENS, HIDDEN)).astype(np.float32)


def make_layer(group, has_copies, **options):
    """Copies of an expert have weights of their own here, so that outputs tell them apart."""
    placement = plan_of().layer(0) if has_copies else None
    moe = ep_nnx.MoE(group, FFN, placement=placement, rngs=nnx.Rngs(0), **options)
    if has_copies:
        for seed, name in enumerate(EXPERT_WEIGHTS):
            param = getattr(moe, name)
            old = param.get_value()
            values = 0.3 * jax.random.normal(jax.random.key(seed), old.shape)
            param.set_value(jax.device_put(values, old.sharding))
    return moe


def sizes(has_copies):
    return {"num_experts": RANKS * SLOTS if has_copies else EXPERTS}


def of_ranks(tokens):
    """`[rows, R, T, ...]`: which device has which."""
    return np.asarray(tokens).reshape(ROWS, RANKS, -1, *np.shape(tokens)[1:])


def with_linen(moe, mutable=False):
    """`f(x, **arguments)` of the Linen layer with the same parameters."""
    options = {} if moe.placement is None else {"placement": moe.placement}
    layer = ep_linen.MoE(moe.spec.group, FFN, renormalize=moe.spec.renormalize, **options)
    variables = to_linen(moe)
    if options:
        tables = ("slot_expert", "copies", "upper")
        variables[ep_linen.PLACEMENT] = {n: getattr(moe, n).get_value() for n in tables}
    return functools.partial(layer.apply, variables, mutable=mutable)


def oracle(moe, *, mask, token_ids=None):
    """Outputs, and by the names of `LayerStats` what they count."""
    _, topk_idx, topk_weights = routing_of(moe, X, {})
    chosen, weights, x = (of_ranks(a) for a in (topk_idx, topk_weights, X))
    placement = moe.placement
    outs, left = [], []
    for row in range(ROWS):
        slots = chosen[row]
        if placement is not None:
            ids = None if token_ids is None else of_ranks(token_ids)[row]
            slots = reference.place(slots, placement.copies, placement.upper, token_ids=ids)
        matrices = [getattr(moe, name).get_value() for name in EXPERT_WEIGHTS]
        options = {"rank_mask": mask, "renormalize": moe.spec.renormalize}
        outs.append(reference.moe(x[row], slots, weights[row], *matrices, **options))
        num = len(matrices[0])
        left.append(reference.plan(slots, num_experts=num, rank_mask=mask).topk_idx)
    left = np.stack(left)
    by_slot = np.bincount(left[left >= 0], minlength=num)
    load = by_slot
    if placement is not None:
        load = np.bincount(placement.slot_expert, by_slot, minlength=EXPERTS)
    counts = {
        "tokens_per_expert": load,
        "rows_per_rank": by_slot.reshape(RANKS, -1).sum(axis=1),
        "num_tokens": (left >= 0).any(axis=-1).sum(),
        "num_lost": ((chosen >= 0) & (left < 0)).sum(),
    }
    return np.concatenate(outs).reshape(X.shape), counts, by_slot


def assert_close(got, want):
    np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-4 * max(np.abs(want).max(), 1e-3))
