# SPDX-License-Identifier: Apache-2.0
"""Routing and its losses where logits are masked, underflow, or belong to no token."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_ep
from ep_testing.flax_layers import EXPERTS, FFN, HIDDEN, TOPK, make_group, make_nnx, to_linen
from jax_ep import load_balance_loss, reference, route, router_z_loss
from jax_ep.flax import linen as ep_linen

SCORES = ["softmax", "sigmoid"]
IDX = np.array([[0, 2], [3, -1], [6, 4], [2, 7]], np.int32)


def _normal():
    return np.random.default_rng(8).standard_normal((4, 8)).astype(np.float32)


def _with_masked_experts(value):
    logits = _normal()
    logits[:, [1, 5]] += np.float32(value)
    return logits


# Every token has an expert that it may go to. Sigmoids are 0 in float32 below about -103.
LOGITS = {
    "sigmoids underflow": _normal() - 200,
    "some sigmoids underflow": 8 * _normal() - 100,
    "sigmoids are subnormal": _normal() - 90,
    "sigmoids are near epsilon": 8 * _normal() - 46,
    "experts masked by -1e9": _with_masked_experts(-1e9),
    "experts masked by the least float32": np.maximum(
        _with_masked_experts(-np.inf), np.finfo(np.float32).min
    ),
    "experts masked by -inf": _with_masked_experts(-np.inf),
}


def _losses(module, score):
    return {
        "balance": lambda v, i: module.load_balance_loss(v, i, score=score),
        "z": module.router_z_loss,
        "z of all": lambda v, i: module.router_z_loss(v),
    }


def _central_differences(f, logits, step=1e-3):
    """Of `f` in float64, whose error is about `step ** 2` relative."""
    logits = logits.astype(np.float64)
    grad = np.zeros_like(logits)
    for at in np.ndindex(logits.shape):
        up, down = logits.copy(), logits.copy()
        up[at], down[at] = logits[at] + step, logits[at] - step
        grad[at] = (f(up) - f(down)) / (2 * step)
    return grad


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("name", LOGITS)
def test_losses_and_their_gradients_are_the_oracles(name, score):
    logits = LOGITS[name]
    for loss, f in _losses(jax_ep, score).items():
        value, grad = jax.jit(jax.value_and_grad(f))(jnp.asarray(logits), IDX)
        oracle = _losses(reference, score)[loss]
        np.testing.assert_allclose(value, oracle(logits, IDX), rtol=1e-5, err_msg=loss)
        want = _central_differences(lambda v, g=oracle: g(v, IDX), logits)
        # The differences are of order 1 times step ** 2, and those of a value of 4e4 are rounded
        # by 4e4 * 2 ** -53 / step; float32 rounds the logits' distance, up to 2e2, by 2e-5.
        np.testing.assert_allclose(grad, want, rtol=1e-4, atol=1e-5, err_msg=loss)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf, -1e9, 3e38, -200.0])
def test_tokens_without_a_selection_count_for_nothing(garbage, score):
    logits, idx = _normal(), IDX.copy()
    idx[[0, 3]] = -1
    dirty = logits.copy()
    dirty[0], dirty[3, 2] = garbage, garbage
    for loss in ("balance", "z"):
        f = _losses(jax_ep, score)[loss]
        value, grad = jax.value_and_grad(f)(jnp.asarray(dirty), idx)
        want_value, want_grad = jax.value_and_grad(f)(jnp.asarray(logits), idx)
        assert value == want_value
        np.testing.assert_array_equal(grad, want_grad)
        assert not grad[jnp.array([0, 3])].any()
        np.testing.assert_allclose(value, _losses(reference, score)[loss](dirty, idx), rtol=1e-5)


@pytest.mark.parametrize("score", SCORES)
def test_tokens_that_may_go_nowhere_count_for_nothing(score):
    """All logits of a token are -inf: it has no share in a loss, even where it has a selection."""
    logits = _normal()
    logits[2] = -np.inf
    others, idx = np.delete(logits, 2, axis=0), np.delete(IDX, 2, axis=0)
    for loss, f in _losses(jax_ep, score).items():
        value, grad = jax.value_and_grad(f)(jnp.asarray(logits), IDX)
        np.testing.assert_allclose(value, f(others, idx), rtol=1e-6)
        np.testing.assert_allclose(value, _losses(reference, score)[loss](logits, IDX), rtol=1e-5)
        assert not grad[2].any()
        assert np.isfinite(grad).all()


@pytest.mark.parametrize("score", SCORES)
def test_nan_of_a_token_that_counts_is_not_hidden(score):
    logits = _normal()
    logits[1, 3] = np.nan
    for f in _losses(jax_ep, score).values():
        assert np.isnan(f(jnp.asarray(logits), IDX))


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("mask", [-1e9, -np.inf])
def test_an_additive_mask_of_padding_leaves_the_routers_gradient_finite(mask, score):
    rng = np.random.default_rng(0)
    x, router = rng.normal(size=(32, 16)), rng.normal(size=(16, 8))
    is_token = np.arange(32) < 28

    def objective(router, x, is_token):
        masked = jnp.where(is_token, 0.0, mask).astype(jnp.float32)[:, None]
        logits = x @ router + masked
        idx, weights = route(logits, num_topk=2, score=score)
        idx = jnp.where(is_token[:, None], idx, -1)
        used = (jnp.where(idx >= 0, weights, 0.0) * jnp.arange(2.0)[None]).sum()
        return load_balance_loss(logits, idx, score=score) + router_z_loss(logits, idx) + used

    x, router = x.astype(np.float32), router.astype(np.float32)
    got = jax.jit(jax.value_and_grad(objective))(router, x, is_token)
    want = jax.jit(jax.value_and_grad(objective))(router, x[:28], is_token[:28])
    # The same terms; sums over 32 instead of 28 tokens may be rounded in another order.
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-5), got, want)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("name", LOGITS)
def test_route_has_the_oracles_weights_and_finite_gradients(name, score, normalize):
    logits = LOGITS[name]
    options = {"num_topk": 3, "score": score, "normalize": normalize}
    idx, weights = route(jnp.asarray(logits), **options)
    want_idx, want = reference.route(logits, **options)
    # Sigmoids below 2 ** -126 are rounded to 0, and with them the choice between their experts.
    tiny = 3 * 2.0**-126 / (1e-20 if normalize else 1)
    np.testing.assert_allclose(weights, want, rtol=1e-5, atol=tiny)
    exact = want.min(axis=1) > 100 * tiny
    np.testing.assert_array_equal(idx[exact], want_idx[exact])

    cotangent = jnp.asarray(np.random.default_rng(2).standard_normal((4, 3)), jnp.float32)
    grad = jax.jit(jax.grad(lambda v: (route(v, **options)[1] * cotangent).sum()))(logits)
    if not exact.all():  # other experts
        assert np.isfinite(grad).all()
        return
    differences = _central_differences(
        lambda v: (reference.route(v, **options)[1] * np.asarray(cotangent)).sum(), logits
    )
    np.testing.assert_allclose(grad, differences, rtol=1e-4, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("score", SCORES)
def test_masked_experts_are_chosen_last_and_weigh_nothing(score):
    for mask, num_topk in itertools.product((-1e9, -np.inf), (6, 8)):
        logits = jnp.asarray(_with_masked_experts(mask))
        idx, weights = route(logits, num_topk=num_topk, score=score)
        is_masked = np.isin(idx, [1, 5])
        assert is_masked.sum() == 4 * (num_topk - 6)
        assert not weights[is_masked].any()
        grad = jax.grad(lambda v, k=num_topk: route(v, num_topk=k, score=score)[1][:, 0].sum())
        assert np.isfinite(grad(logits)).all()
        assert not grad(logits)[:, [1, 5]].any()


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("score", SCORES)
def test_a_token_that_may_go_nowhere_weighs_nothing(score, normalize):
    logits = _normal()
    logits[2] = -np.inf
    options = {"num_topk": 2, "score": score, "normalize": normalize}
    idx, weights = route(jnp.asarray(logits), **options)
    want_idx, want = reference.route(logits, **options)
    assert idx.tolist() == want_idx.tolist()
    assert idx[2].tolist() == [0, 1]
    np.testing.assert_allclose(weights, want, rtol=1e-5)
    assert weights[2].tolist() == [0, 0]
    for transform in (jax.grad, jax.jacfwd):
        grad = transform(lambda v: (route(v, **options)[1] * jnp.arange(2.0)[None]).sum())(logits)
        assert np.isfinite(grad).all()
        assert not grad[2].any()


def test_a_layer_whose_sigmoids_underflow_learns_from_its_losses():
    with make_group() as group:
        params = to_linen(make_nnx(group))["params"]
        layer = ep_linen.MoE(group, FFN, score="sigmoid")
        # All logits are below -128: sigmoids and weights are 0, and so is the output.
        router = -8.0 - jax.random.uniform(jax.random.key(0), (HIDDEN, EXPERTS))
        x = 1.0 + jax.random.uniform(jax.random.key(1), (8, 6, HIDDEN))

        def objective(router):
            variables = {"params": {**params, "router": router}}
            out, stats = layer.apply(variables, x, method="with_stats")
            return out.sum() + stats.load_balance_loss, (out, stats)

        (_, (out, stats)), grad = jax.jit(jax.value_and_grad(objective, has_aux=True))(router)
    assert not out.any()
    logits = np.asarray(x, np.float64).reshape(-1, HIDDEN) @ np.asarray(router, np.float64)
    idx, _ = route(jnp.asarray(logits, jnp.float32), num_topk=TOPK, score="sigmoid")
    want = reference.load_balance_loss(logits, idx, score="sigmoid")
    np.testing.assert_allclose(stats.load_balance_loss, want, rtol=1e-5)
    assert np.isfinite(grad).all()
    assert np.abs(grad).max() > 1e-3  # it is led back
