# SPDX-License-Identifier: Apache-2.0
"""Reverse and forward mode through dispatch and combine, against the oracle's transposes."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_ep
from ep_testing import strategies
from ep_testing.problems import PROBLEMS, EpProblem
from ep_testing.programs import make_group, over_ranks
from jax_ep import reference

GRADIENT_PROBLEMS = [
    name
    for name in ("tiny", "masked_half", "capacity_one_short", "deepseek", "three_ranks", "hidden_7")
    for name in (name, f"{name}_by_rank")
] + ["all_masked", "alignment_8_drops", "one_hot_drops_by_rank", "no_zero_fill"]


def _vjps(problem: EpProblem, backend: str):
    """Cotangents of dispatch and of a weighted combine for random output cotangents."""
    y = problem.expert_outputs(poison=False)
    weights_shape = y.shape[:2] if problem.layout == "expert" else (*y.shape[:2], problem.num_topk)
    weights = problem.random(weights_shape, salt=7).astype(np.float32)
    rows_bar = problem.random(y.shape, salt=8)
    weights_bar = problem.random(weights_shape, salt=9).astype(np.float32)
    out_bar = problem.random(problem.x.shape, salt=10)
    with make_group(problem, backend) as group:

        def on_rank(x, topk_idx, topk_weights, y, weights, rows_bar, weights_bar, out_bar):
            def send(x, topk_weights):
                received = jax_ep.dispatch(x, topk_idx, topk_weights, group=group)
                return (received.x, received.weights), received.handle

            _, send_vjp, handle = jax.vjp(send, x, topk_weights, has_aux=True)
            back = functools.partial(jax_ep.combine, group=group)
            _, plain_vjp = jax.vjp(lambda y: back(y, handle), y)
            _, weighted_vjp = jax.vjp(lambda y, w: back(y, handle, w), y, weights)
            return send_vjp((rows_bar, weights_bar)), plain_vjp(out_bar), weighted_vjp(out_bar)

        got = over_ranks(group, on_rank)(
            problem.x, problem.topk_idx, problem.topk_weights, y, weights, rows_bar, weights_bar,
            out_bar,
        )  # fmt: skip
    want = (
        reference.dispatch_vjp(problem.plan, rows_bar, weights_bar),
        reference.combine_vjp(y, problem.plan, None, out_bar)[:1],
        reference.combine_vjp(y, problem.plan, weights, out_bar),
    )
    return jax.tree.map(np.asarray, got), want


@pytest.mark.parametrize("name", GRADIENT_PROBLEMS)
def test_vjps_are_the_oracles(name, backend):
    problem = PROBLEMS[name]
    got, want = _vjps(problem, backend)
    # Each result is a sum of at most K terms, rounded to the dtype once or twice.
    rtol = {"float32": 1e-5, "bfloat16": 2.0**-6, "float16": 2.0**-9}[problem.dtype]
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        size = max(1.0, float(np.max(np.abs(w), initial=0.0)))
        np.testing.assert_allclose(g.astype(np.float64), w, rtol=rtol, atol=rtol * size)


# Not through _vjps: XLA does not compile a shard_map all of whose inputs have size 0. That of
# jaxlib 0.11.2 crashes on this one too; the runs on 0.10.2 and 0.12 cover it.
@pytest.mark.skipif(jax.__version_info__[:2] == (0, 11), reason="XLA crashes; runs on other JAX")
@pytest.mark.parametrize("name", ["no_tokens", "no_tokens_by_rank"])
def test_without_tokens_gradients_are_zero(name, backend):
    problem = PROBLEMS[name]
    with make_group(problem, backend) as group:

        def on_rank(x, topk_idx, topk_weights, kernel):
            def loss(x, topk_weights, kernel):
                received = jax_ep.dispatch(x, topk_idx, topk_weights, group=group)
                y = jnp.tanh(received.x @ kernel)
                out = jax_ep.combine(y, received.handle, received.weights, group=group)
                return jnp.sum(out)

            return jax.value_and_grad(loss, (0, 1, 2))(x, topk_weights, kernel)

        kernel = problem.random((problem.num_ranks, problem.hidden, problem.hidden), salt=1)
        value, (x_bar, weights_bar, kernel_bar) = over_ranks(group, on_rank)(
            problem.x, problem.topk_idx, problem.topk_weights, kernel
        )
    assert x_bar.shape == problem.x.shape
    assert weights_bar.shape == problem.topk_idx.shape
    np.testing.assert_array_equal(value, 0)
    np.testing.assert_array_equal(kernel_bar, 0)


@pytest.mark.parametrize("name", ["eight_ranks", "capacity_one_short_by_rank"])
def test_the_fp8_wire_has_a_straight_through_gradient(name, backend):
    problem = PROBLEMS[name]
    plain, _ = _vjps(problem, backend)
    fp8, _ = _vjps(problem.replace(wire_dtype="float8_e4m3fn"), backend)
    for p, f in zip(jax.tree.leaves(plain), jax.tree.leaves(fp8), strict=True):
        np.testing.assert_array_equal(p, f)


def _inner(a, b) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.sum(a * b))


@functools.lru_cache(maxsize=8)
def _adjoint_program(problem: EpProblem, backend: str):
    group = make_group(problem, backend)

    def on_rank(x, topk_idx, topk_weights, rows, row_weights):
        received = jax_ep.dispatch(x, topk_idx, topk_weights, group=group)

        def send(x, w):
            sent = jax_ep.dispatch(x, topk_idx, w, group=group)
            return sent.x, sent.weights

        _, vjp = jax.vjp(send, x, topk_weights)
        combined = jax_ep.combine(rows, received.handle, group=group)
        return received.x, received.weights, combined, *vjp((rows, row_weights))

    return over_ranks(group, on_rank)


@hypothesis.given(data=hypothesis.strategies.data())
@pytest.mark.parametrize("name", ["capacity_ample", "three_ranks_by_rank", "alignment_8_drops"])
def test_dispatch_and_combine_are_adjoint(name, data):
    base = PROBLEMS[name].replace(dtype="float32")
    problem = data.draw(strategies.reroutings(base))
    for backend in ("ffi", "xla"):
        _check_adjoint(base, problem, backend)


def _check_adjoint(base: EpProblem, problem: EpProblem, backend: str) -> None:
    # Small integers: all products and sums are exact, so that the two sides are equal.
    rng = np.random.default_rng(problem.seed)
    x = rng.integers(-4, 5, problem.x.shape).astype(np.float32)
    token_weights = rng.integers(-4, 5, problem.topk_idx.shape).astype(np.float32)
    token_weights[problem.topk_idx < 0] = 0
    plan = problem.plan
    shape = (problem.num_ranks, plan.capacity, problem.hidden)
    rows = rng.integers(-4, 5, shape).astype(np.float32)
    shape = shape[:2] if problem.layout == "expert" else (*shape[:2], problem.num_topk)
    row_weights = rng.integers(-4, 5, shape).astype(np.float32)

    program = _adjoint_program(base, backend)
    sent, sent_weights, combined, x_bar, weights_bar = program(
        x, problem.topk_idx, token_weights, rows, row_weights
    )
    assert _inner(sent, rows) == _inner(x, combined)
    np.testing.assert_array_equal(combined, x_bar)
    assert _inner(sent_weights, row_weights) == _inner(token_weights, weights_bar)


@pytest.mark.parametrize("name", ["eight_ranks", "three_ranks_by_rank"])
def test_forward_mode_and_second_derivatives(name, backend):
    problem = PROBLEMS[name].replace(dtype="float32")
    with make_group(problem, backend) as group:

        def block(x, topk_idx, w):
            received = jax_ep.dispatch(x, topk_idx, w, group=group)
            y = jnp.sin(received.x)
            return jax_ep.combine(y, received.handle, received.weights, group=group)

        # In layout "rank", too, a row counts once for each of the token's experts there.
        def dense(x, w):
            used = jnp.where(problem.topk_idx >= 0, w, 0.0)
            return jnp.sin(x) * jnp.sum(used, axis=-1, keepdims=True)

        def derivatives(f, x, w):
            _, forward = jax.jvp(f, (x, w), (jnp.cos(x), w))
            hessian = jax.grad(lambda x: jnp.sum(jax.grad(lambda x: jnp.sum(f(x, w)))(x) ** 2))(x)
            return forward, hessian

        def on_rank(x, topk_idx, w):
            return derivatives(lambda x, w: block(x, topk_idx, w), x, w)

        x = problem.random(problem.x.shape, salt=1)
        got = over_ranks(group, on_rank)(x, problem.topk_idx, problem.topk_weights)
        want = derivatives(dense, x, problem.topk_weights)
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-5)


def test_forward_mode_is_straight_through_the_fp8_wire_of_xla():
    """As reverse mode is: tangents are sent as if the rows had not been rounded."""
    problem = PROBLEMS["fp8_float32"]
    with make_group(problem, "xla") as group:

        def on_rank(x, topk_idx):
            def send(x):
                return jax_ep.dispatch(x, topk_idx, group=group).x

            return jax.jvp(send, (x,), (jnp.cos(x),))

        rows, tangents = over_ranks(group, on_rank)(problem.x, problem.topk_idx)
    source = np.maximum(problem.plan.row_source, 0)
    held = (problem.plan.row_source >= 0)[..., None]
    sent = np.cos(problem.x).reshape(-1, problem.hidden)[source]
    np.testing.assert_allclose(tangents, np.where(held, sent, 0), rtol=1e-6)
    unrounded = np.where(held, problem.x.reshape(-1, problem.hidden)[source], 0)
    assert not np.array_equal(rows, unrounded)


@pytest.mark.parametrize("layout", ["expert", "rank"])
def test_rows_without_token_leak_nothing_into_gradients(layout, backend):
    problem = PROBLEMS["alignment_8" if layout == "expert" else "masked_half_by_rank"]
    problem = problem.replace(zero_fill=False)
    with make_group(problem, backend) as group:

        def on_rank(x, topk_idx, w, bad):
            def loss(x, w):
                received = jax_ep.dispatch(x, topk_idx, w, group=group)
                y = received.x + bad  # NaN where no token is
                return jnp.sum(jax_ep.combine(y, received.handle, received.weights, group=group))

            return jax.grad(loss, (0, 1))(x, w)

        bad = np.where(problem.plan.row_source < 0, np.nan, 0.0)[..., None]
        bad = np.broadcast_to(bad, (*bad.shape[:2], problem.hidden)).astype(problem.np_dtype)
        grads = over_ranks(group, on_rank)(problem.x, problem.topk_idx, problem.topk_weights, bad)
    assert all(np.isfinite(np.asarray(g)).all() for g in grads)
