# SPDX-License-Identifier: Apache-2.0
"""The balancing losses and update_bias: by hand, against the oracle, over ranks, by gradient."""

import re

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from jax_ep import load_balance_loss, reference, route, router_z_loss, update_bias


def logit(p):
    return (np.log(p) - np.log1p(-np.asarray(p))).astype(np.float32)


def test_load_balance_loss_by_hand():
    logits = np.log([[1.0, 3.0], [1.0, 1.0], [3.0, 1.0]]).astype(np.float32)
    idx = np.array([[-1], [-1], [0]], np.int32)
    np.testing.assert_allclose(load_balance_loss(logits, idx), 1.5, rtol=1e-6)
    loss = load_balance_loss(logit([[0.75, 0.5]]), np.array([[0]]), score="sigmoid")
    np.testing.assert_allclose(loss, 1.2, rtol=1e-6)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_losses_agree_with_the_oracle(score):
    logits = np.random.default_rng(3).standard_normal((30, 8)).astype(np.float32)
    idx = np.array(route(logits, num_topk=3, score=score)[0])
    idx[np.random.default_rng(4).random(idx.shape) < 0.4] = -1
    idx[:5] = -1
    for chosen in (idx, np.full_like(idx, -1)):
        got = load_balance_loss(logits, chosen, score=score)
        want = reference.load_balance_loss(logits, chosen, score=score)
        np.testing.assert_allclose(got, want, rtol=1e-5)
        np.testing.assert_allclose(
            router_z_loss(logits, chosen), reference.router_z_loss(logits, chosen), rtol=1e-5
        )
    np.testing.assert_allclose(router_z_loss(logits), reference.router_z_loss(logits), rtol=1e-5)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_gradients_of_the_losses(score):
    logits = jnp.asarray(np.random.default_rng(5).standard_normal((6, 4)), jnp.float32)
    idx = jnp.array([[0, 1], [0, -1], [2, 0], [-1, -1], [1, 3], [0, 2]])
    losses = (
        lambda v: load_balance_loss(v, idx, score=score),
        lambda v: router_z_loss(v, idx),
        router_z_loss,
    )
    for loss in losses:
        check_grads(jax.jit(loss), (logits,), order=1, modes=("rev",), atol=1e-2, rtol=1e-2)
    assert not jax.grad(losses[0])(logits)[3].any()
    assert not jax.grad(losses[1])(logits)[3].any()
    # A step against the gradient makes the load more even.
    assert losses[0](logits - jax.grad(losses[0])(logits)) < losses[0](logits)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize(
    ("axis_name", "spec"),
    [
        ("expert", P("expert")),
        (("data", "expert"), P(("data", "expert"))),
        (["data", "expert"], P("expert")),  # with copies along "data"
    ],
)
def test_losses_over_ranks_are_those_of_all_tokens(axis_name, spec, check_vma):
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("data", "expert"))
    logits = np.random.default_rng(6).standard_normal((40, 8)).astype(np.float32)
    idx = np.array(route(logits, num_topk=2)[0])
    idx[::3, 1] = -1
    idx[:7] = -1  # one rank has no token at all, another fewer than the rest

    def losses(logits, idx):
        return (
            load_balance_loss(logits, idx, axis_name=axis_name),
            router_z_loss(logits, idx, axis_name=axis_name),
            router_z_loss(logits, axis_name=axis_name),
        )

    over_ranks = jax.shard_map(
        losses, mesh=mesh, in_specs=(spec, spec), out_specs=(P(),) * 3, check_vma=check_vma
    )

    def alone(logits, idx):
        return (
            load_balance_loss(logits, idx),
            router_z_loss(logits, idx),
            router_z_loss(logits),
        )

    want = (
        reference.load_balance_loss(logits, idx),
        reference.router_z_loss(logits, idx),
        reference.router_z_loss(logits),
    )
    values_and_gradients = [
        jax.jit(lambda v, i, f=f: (f(v, i), jax.jacrev(f)(v, i)))(logits, idx)
        for f in (over_ranks, alone)
    ]
    for values, _ in values_and_gradients:
        np.testing.assert_allclose(values, want, rtol=1e-5)
    for got, expected in zip(*[gradients for _, gradients in values_and_gradients], strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-7)


def test_losses_over_a_vmapped_axis():
    logits = np.random.default_rng(7).standard_normal((4, 5, 8)).astype(np.float32)
    idx = np.array([[[0, 1]], [[2, -1]], [[-1, -1]], [[3, 2]]]).repeat(5, axis=1)
    both = jax.vmap(
        lambda v, i: (
            load_balance_loss(v, i, axis_name="batch"),
            router_z_loss(v, i, axis_name="batch"),
        ),
        axis_name="batch",
    )
    balance, z = jax.jit(both)(logits, idx)
    np.testing.assert_allclose(balance, [reference.load_balance_loss(logits, idx)] * 4, rtol=1e-5)
    np.testing.assert_allclose(z, [reference.router_z_loss(logits, idx)] * 4, rtol=1e-5)


def test_update_bias_by_hand():
    # The mean is 4.
    bias = jnp.array([0.0, 1.0, 2.0, 3.0])
    got = update_bias(bias, jnp.array([1, 4, 5, 6]), rate=0.5)
    assert got.tolist() == [0.5, 1.0, 1.5, 2.5]
    assert update_bias(bias.astype(jnp.bfloat16), np.arange(4), rate=0.5).dtype == jnp.bfloat16


@hypothesis.given(st.lists(st.integers(0, 30) | st.integers(0, 2**28), min_size=6, max_size=6))
def test_update_bias_agrees_with_the_oracle(load):
    bias = np.arange(6, dtype=np.float32)
    got = jax.jit(update_bias, static_argnames="rate")(bias, np.array(load, np.int32), rate=0.25)
    assert got.tolist() == reference.update_bias(bias, load, rate=0.25).tolist()


def test_update_bias_evens_out_a_skewed_router():
    logits = jax.random.normal(jax.random.key(0), (512, 8)) + jnp.linspace(0, 2, 8)[None, :]

    def load_of(bias):
        idx, _ = route(logits, num_topk=2, score="sigmoid", bias=bias)
        return jnp.bincount(idx.reshape(-1), length=8)

    def step(bias, _):
        return update_bias(bias, load_of(bias), rate=0.01), None

    bias, _ = jax.lax.scan(step, jnp.zeros(8), length=100)
    before, after = np.asarray(load_of(jnp.zeros(8))), np.asarray(load_of(bias))
    assert before.max() > 1.5 * before.mean()
    assert after.max() < 1.2 * after.mean()


@pytest.mark.parametrize("loss", [load_balance_loss, router_z_loss])
@pytest.mark.parametrize(
    ("idx", "kind"),
    [
        (np.zeros((3, 2), np.int32), "int32 of shape (3, 2)"),
        (np.zeros(2, np.int32), "int32 of shape (2,)"),
        (np.zeros((2, 2), np.float32), "float32 of shape (2, 2)"),
        (np.zeros((2, 2), np.uint32), "uint32 of shape (2, 2)"),
    ],
)
def test_losses_name_bad_arguments(loss, idx, kind):
    message = f"topk_idx is {kind}; allowed: [2, K] as logits (2, 8), signed integers"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        loss(jnp.zeros((2, 8)), idx)
    with pytest.raises(ValueError, match=r"logits is float32 of shape \(8,\); allowed: \[T, E\]"):
        loss(jnp.zeros(8), idx)


def test_load_balance_loss_names_a_bad_score():
    with pytest.raises(ValueError, match="score is 'tanh'; allowed: 'softmax', 'sigmoid'"):
        load_balance_loss(jnp.zeros((2, 8)), jnp.zeros((2, 1), jnp.int32), score="tanh")


@pytest.mark.parametrize(
    ("bias", "load", "message"),
    [
        (
            jnp.zeros((2, 2)),
            np.arange(4),
            "bias is float32 of shape (2, 2); allowed: [E], floating",
        ),
        (jnp.arange(4), np.arange(4), "bias is int32 of shape (4,); allowed: [E], floating point"),
        (
            jnp.zeros(4),
            np.arange(3),
            "tokens_per_expert is int32 of shape (3,); allowed: [4] as bias, integers",
        ),
        (
            jnp.zeros(4),
            np.zeros(4, np.float32),
            "tokens_per_expert is float32 of shape (4,); allowed: [4] as bias, integers",
        ),
    ],
)
def test_update_bias_names_bad_arguments(bias, load, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        update_bias(bias, load, rate=0.1)
