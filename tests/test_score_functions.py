# SPDX-License-Identifier: Apache-2.0
"""Scores by a function of one's own: routing, loss, zeros, no finite derivative, errors."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from ep_testing.programs import make_mesh
from jax_ep import load_balance_loss, reference, route

IDX = np.array([[0, 2], [3, -1], [6, 4], [2, 7]], np.int32)


def sqrt_softplus(v):
    """Of DeepSeek-V4."""
    return jnp.sqrt(jax.nn.softplus(v))


def cool_softmax(v):
    """Not element by element."""
    return jax.nn.softmax(v / 0.5, axis=-1)


# Each with the oracle's, which is written without JAX.
FUNCTIONS = {
    "sqrt_softplus": (sqrt_softplus, lambda v: np.sqrt(np.logaddexp(0.0, v))),
    "relu": (jax.nn.relu, lambda v: np.maximum(v, 0.0)),
    "cool_softmax": (
        cool_softmax,
        lambda v: np.exp(2 * v) / np.exp(2 * v).sum(axis=-1, keepdims=True),
    ),
}


def _logits(mask=None):
    logits = np.random.default_rng(8).standard_normal((4, 8)).astype(np.float32)
    if mask is not None:
        logits[:, [1, 5]] = mask
    return logits


def _central_differences(f, logits, step=1e-4):
    """Of `f` in float64."""
    logits = logits.astype(np.float64)
    grad = np.zeros_like(logits)
    for at in np.ndindex(logits.shape):
        up, down = logits.copy(), logits.copy()
        up[at], down[at] = logits[at] + step, logits[at] - step
        grad[at] = (f(up) - f(down)) / (2 * step)
    return grad


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("mask", [None, -200.0, -1e9, -np.inf])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_route_agrees_with_the_oracle(name, mask, normalize):
    function, of_oracle = FUNCTIONS[name]
    logits = _logits(mask)
    kwargs = {"num_topk": 2, "normalize": normalize, "scale": 1.5}
    run = jax.jit(lambda v: route(v, score=function, **kwargs))
    idx, weights = run(logits)
    want_idx, want = reference.route(logits, score=of_oracle, **kwargs)
    assert idx.tolist() == want_idx.tolist()
    np.testing.assert_allclose(weights, want, rtol=1e-6)

    cotangent = np.random.default_rng(2).standard_normal((4, 2))
    grad = jax.grad(lambda v: (run(v)[1] * cotangent.astype(np.float32)).sum())(logits)
    differences = _central_differences(
        lambda v: (reference.route(v, score=of_oracle, **kwargs)[1] * cotangent).sum(), logits
    )
    np.testing.assert_allclose(grad, differences, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("groups", [None, (4, 2)])
def test_route_with_bias_and_groups_agrees_with_the_oracle(groups):
    function, of_oracle = FUNCTIONS["sqrt_softplus"]
    kwargs = {
        "num_topk": 3,
        "bias": np.linspace(-1, 1, 8).astype(np.float32),
        "num_groups": groups and groups[0],
        "num_topk_groups": groups and groups[1],
        "group_score": "max",
        "epsilon": 0.5,
    }
    idx, weights = route(_logits(), score=function, **kwargs)
    want_idx, want = reference.route(_logits(), score=of_oracle, **kwargs)
    assert idx.tolist() == want_idx.tolist()
    np.testing.assert_allclose(weights, want, rtol=1e-6)


@pytest.mark.parametrize("mask", [None, -1e9, -np.inf])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_ready_made_scores_as_functions_are_the_same(score, mask):
    function = {"softmax": lambda v: jax.nn.softmax(v, axis=-1), "sigmoid": jax.nn.sigmoid}[score]
    logits = _logits(mask)
    logits[2] = -np.inf
    weigh = lambda v, s: route(v, num_topk=3, score=s)  # noqa: E731
    jax.tree.map(np.testing.assert_array_equal, weigh(logits, score), weigh(logits, function))
    for f in (
        lambda v, s: (weigh(v, s)[1] * jnp.arange(3.0)[None]).sum(),
        lambda v, s: load_balance_loss(v, IDX, score=s),
    ):
        got, want = (jax.value_and_grad(f)(logits, s) for s in (function, score))
        jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, atol=1e-6), got, want)


@pytest.mark.parametrize("mask", [None, -200.0, -1e9, -np.inf])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_loss_and_its_gradient_are_the_oracles(name, mask):
    function, of_oracle = FUNCTIONS[name]
    logits = _logits(mask)
    loss = jax.jit(lambda v: load_balance_loss(v, IDX, score=function))
    oracle = lambda v: reference.load_balance_loss(v, IDX, score=of_oracle)  # noqa: E731
    value, grad = jax.value_and_grad(loss)(logits)
    np.testing.assert_allclose(value, oracle(logits), rtol=1e-6)
    np.testing.assert_allclose(grad, _central_differences(oracle, logits), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_small_scores_keep_their_shares(name):
    """Where the square of their sum is 0 in float32."""
    function, of_oracle = FUNCTIONS[name]
    logits = _logits() - 80 if name == "sqrt_softplus" else np.abs(_logits()) * np.float32(1e-25)
    loss = lambda v: load_balance_loss(v, IDX, score=function)  # noqa: E731
    value, grad = jax.value_and_grad(loss)(logits)
    want = reference.load_balance_loss(logits, IDX, score=of_oracle)
    np.testing.assert_allclose(value, want, rtol=1e-5)
    assert np.isfinite(grad).all()
    assert grad.any()


@pytest.mark.parametrize("function", [sqrt_softplus, jax.nn.relu])
def test_a_token_whose_scores_are_all_0_has_no_shares(function):
    logits = _logits()
    logits[2] = -200.0
    loss = lambda v: load_balance_loss(v, IDX, score=function)  # noqa: E731
    value, grad = jax.value_and_grad(loss)(logits)
    oracle = {"sqrt_softplus": lambda v: np.sqrt(np.logaddexp(0, v)) * (v > -100)}
    of_oracle = oracle.get(function.__name__, lambda v: np.maximum(v, 0))
    want = reference.load_balance_loss(logits, IDX, score=of_oracle)
    np.testing.assert_allclose(value, want, rtol=1e-6)
    assert np.isfinite(grad).all()
    assert not grad[2].any()
    assert grad.any()
    _, weights = route(logits, num_topk=2, score=function, epsilon=0.0)
    assert weights[2].tolist() == [0, 0]
    for transform in (jax.grad, jax.jacfwd):
        of_weights = lambda v: route(v, num_topk=2, score=function, epsilon=0.0)[1].sum()  # noqa: E731
        assert np.isfinite(transform(of_weights)(logits)).all()


@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf, -1e9, -200.0])
@pytest.mark.parametrize(
    "function", [sqrt_softplus, cool_softmax, jnp.exp, jnp.sqrt, jnp.reciprocal]
)
def test_tokens_that_do_not_count_reach_nothing(function, garbage):
    """Also where the function is not finite at the logits that stand for theirs."""
    logits, idx = np.abs(_logits()) + np.float32(0.1), IDX.copy()
    idx[[0, 3]] = -1
    dirty = logits.copy()
    dirty[0], dirty[3, 2] = garbage, garbage
    loss = jax.value_and_grad(lambda v: load_balance_loss(v, idx, score=function))
    (value, grad), (want, want_grad) = loss(dirty), loss(logits)
    assert value == want
    np.testing.assert_array_equal(grad, want_grad)
    assert np.isfinite(grad).all()
    assert not grad[np.array([0, 3])].any()


def test_a_token_that_may_go_nowhere_weighs_nothing():
    logits = _logits()
    logits[2] = -np.inf
    for function in (sqrt_softplus, cool_softmax):
        weigh = lambda v, f=function: route(v, num_topk=2, score=f)  # noqa: E731
        idx, weights = weigh(logits)
        assert idx[2].tolist() == [0, 1]
        assert weights[2].tolist() == [0, 0]
        for transform in (jax.grad, jax.jacfwd):
            grad = transform(lambda v, w=weigh: (w(v)[1] * jnp.arange(2.0)[None]).sum())(logits)
            assert np.isfinite(grad).all()
            assert not grad[2].any()


@pytest.mark.parametrize("check_vma", [True, False])
def test_a_function_serves_inside_of_shard_map(check_vma):
    mesh = make_mesh((4,), ("expert",))
    logits = np.random.default_rng(3).standard_normal((12, 8)).astype(np.float32)
    temperature = jnp.float32(0.5)

    def losses(v):
        score = lambda v: jax.nn.sigmoid(v / temperature)  # noqa: E731
        idx, weights = route(v, num_topk=2, score=score)
        return weights, load_balance_loss(v, idx, score=score, axis_name="expert")

    mapped = jax.shard_map(
        losses, mesh=mesh, in_specs=P("expert"), out_specs=(P("expert"), P()), check_vma=check_vma
    )
    weights, loss = jax.jit(mapped)(logits)
    score = lambda v: 1 / (1 + np.exp(-2 * v))  # noqa: E731
    want_idx, want = reference.route(logits, num_topk=2, score=score)
    np.testing.assert_allclose(weights, want, rtol=1e-5)
    want_loss = reference.load_balance_loss(logits, want_idx, score=score)
    np.testing.assert_allclose(loss, want_loss, rtol=1e-5)


@pytest.mark.parametrize(
    ("function", "came"),
    [
        (lambda v: v.sum(axis=-1), "float32 of shape (4,)"),
        (lambda v: v[:, :3], "float32 of shape (4, 3)"),
        (lambda v: v.astype(jnp.bfloat16), "bfloat16 of shape (4, 8)"),
        (lambda v: v > 0, "bool of shape (4, 8)"),
        (lambda v: (v, v), "a tuple"),
        (lambda v: None, "a NoneType"),
    ],
)
def test_a_bad_function_is_named_when_traced(function, came):
    message = f"score is a function that gives {came}; allowed: float32 of shape (4, 8)"
    for f in (
        lambda v: route(v, num_topk=2, score=function),
        lambda v: load_balance_loss(v, IDX, score=function),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
            jax.eval_shape(f, _logits())


def test_what_is_no_function_is_named():
    message = "score is 3; allowed: 'softmax', 'sigmoid', or a function of [T, E] float32 logits"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        route(_logits(), num_topk=2, score=3)
