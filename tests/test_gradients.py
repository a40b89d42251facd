# SPDX-License-Identifier: Apache-2.0
"""Reverse and forward mode through dispatch and combine, against the oracle's transposes."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_ep
from ep_testing import assertions, strategies
from ep_testing.problems import PROBLEMS, EpProblem
from ep_testing.programs import make_group, over_ranks
from jax_ep import reference

GRADIENT_PROBLEMS = [
    name
    for name in ("tiny", "masked_half", "capacity_one_short", "deepseek", "three_ranks", "hidden_7")
    for name in (name, f"{name}_by_rank")
] + ["all_masked", "alignment_8_drops", "one_hot_drops_by_rank", "no_zero_fill"]


# Rows of more elements than a dot product has sums, in every dtype; the last not of whole vectors.
WIDE_PROBLEMS = {
    f"{dtype}_{hidden}{layout}": PROBLEMS[f"masked_half{layout}"].replace(
        dtype=dtype, hidden=hidden, num_tokens=8
    )
    for dtype, hidden, layout in [
        ("float32", 1540, ""),
        ("bfloat16", 2048, "_by_rank"),
        ("float16", 301, ""),
    ]
}


def _combine_operands(problem: EpProblem):
    """Random rows, weights and a cotangent of the result."""
    y = problem.expert_outputs(poison=False)
    shape = y.shape[:2] if problem.layout == "expert" else (*y.shape[:2], problem.num_topk)
    weights = problem.random(shape, salt=7).astype(np.float32)
    return y, weights, problem.random(problem.x.shape, salt=10)


def _vjps(problem: EpProblem, backend: str):
    """Cotangents of dispatch and of a weighted combine for random output cotangents."""
    y, weights, out_bar = _combine_operands(problem)
    rows_bar = problem.random(y.shape, salt=8)
    weights_bar = problem.random(weights.shape, salt=9).astype(np.float32)
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


def _same_bits(got: np.ndarray, want: np.ndarray, what: str) -> None:
    np.testing.assert_array_equal(assertions.bits(got), assertions.bits(want), what)


@pytest.mark.parametrize("name", [*GRADIENT_PROBLEMS, *WIDE_PROBLEMS])
def test_vjps_of_combine_have_the_oracles_bits(name, backend):
    problem = WIDE_PROBLEMS[name] if name in WIDE_PROBLEMS else PROBLEMS[name]
    y, weights, out_bar = _combine_operands(problem)
    (_, _, (y_bar, weights_bar)), _ = _vjps(problem, backend)
    want_y, want_weights = reference.combine_vjp(
        y, problem.plan, weights, out_bar, dtype=problem.np_dtype
    )
    _same_bits(y_bar, want_y, "y_bar")
    assert weights_bar.dtype == np.float32
    if backend == "ffi":  # XLA chooses the order of its sum
        _same_bits(weights_bar, want_weights, "weights_bar")


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


def _dense_combine(problem: EpProblem, y, weights):
    """`combine` from all ranks' rows in layout "expert", without an exchange."""
    experts, slot = problem.topk_idx, problem.plan.slot
    rank = np.maximum(experts, 0) // problem.plan.num_local_experts
    terms = y[rank, slot] * weights[rank, slot][..., None]
    return jnp.sum(jnp.where((slot >= 0)[..., None], terms, 0.0), axis=2)


@pytest.mark.parametrize("name", ["masked_half", "alignment_8_drops"])
def test_second_derivatives_of_combine_in_both_of_its_factors(name, backend):
    """The gradient's own gradient, and its derivative along a direction, against a dense sum."""
    problem = PROBLEMS[name].replace(dtype="float32")
    y, weights, out_bar = _combine_operands(problem)
    directions = problem.random(y.shape, salt=11), np.ones_like(weights)
    with make_group(problem, backend) as group:

        def second(combine, out_bar, y, weights, directions):
            def gradient(y, weights):
                return jax.vjp(combine, y, weights)[1](jnp.sin(out_bar) * combine(y, weights))

            def size(y, weights):
                return sum(jnp.sum(bar**2) for bar in gradient(y, weights))

            return jax.grad(size, (0, 1))(y, weights), jax.jvp(gradient, (y, weights), directions)

        def on_rank(x, topk_idx, *operands):
            handle = jax_ep.dispatch(x, topk_idx, group=group).handle
            return second(lambda y, w: jax_ep.combine(y, handle, w, group=group), *operands)

        operands = out_bar, y, weights, directions
        got = over_ranks(group, on_rank)(problem.x, problem.topk_idx, *operands)
    want = jax.jit(functools.partial(second, functools.partial(_dense_combine, problem)))(*operands)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-4 * np.max(np.abs(w)))


@pytest.mark.parametrize("name", ["masked_half", "masked_half_by_rank"])
def test_the_backward_of_combine_can_be_transposed(name, backend):
    """It is linear in the result's cotangent, and its transpose is the tangent of combine."""
    problem = PROBLEMS[name].replace(dtype="float32")
    y, weights, out_bar = _combine_operands(problem)
    dots = problem.random(y.shape, salt=11), problem.random(weights.shape, salt=12)
    dots = (dots[0], dots[1].astype(np.float32))
    with make_group(problem, backend) as group:

        def on_rank(x, topk_idx, y, weights, out_bar, dots):
            handle = jax_ep.dispatch(x, topk_idx, group=group).handle

            def combine(y, weights):
                return jax_ep.combine(y, handle, weights, group=group)

            _, vjp = jax.vjp(combine, y, weights)
            (transposed,) = jax.linear_transpose(vjp, out_bar)(dots)
            return transposed, jax.jvp(combine, (y, weights), dots)[1]

        transposed, tangent = over_ranks(group, on_rank)(
            problem.x, problem.topk_idx, y, weights, out_bar, dots
        )
    np.testing.assert_allclose(transposed, tangent, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wanted", [0, 1])
@pytest.mark.parametrize("name", ["masked_half", "masked_half_by_rank"])
def test_the_gradient_in_one_factor_is_that_of_both(name, wanted, backend):
    problem = PROBLEMS[name]
    y, weights, out_bar = _combine_operands(problem)
    with make_group(problem, backend) as group:

        def on_rank(x, topk_idx, y, weights, out_bar):
            handle = jax_ep.dispatch(x, topk_idx, group=group).handle

            def combine(*factors):
                return jax_ep.combine(factors[0], handle, factors[1], group=group)

            def in_one(factor):
                factors = [y, weights]
                factors[wanted] = factor
                return combine(*factors)

            both = jax.vjp(combine, y, weights)[1](out_bar)
            return both[wanted], jax.vjp(in_one, (y, weights)[wanted])[1](out_bar)[0]

        both, one = over_ranks(group, on_rank)(problem.x, problem.topk_idx, y, weights, out_bar)
    _same_bits(np.asarray(one), np.asarray(both), "the gradient")


def test_forward_mode_is_straight_through_the_fp8_wire(backend):
    """As reverse mode is: tangents are sent as if the rows had not been rounded."""
    problem = PROBLEMS["fp8_float32"]
    with make_group(problem, backend) as group:

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


@pytest.mark.parametrize("jitted", [False, True])
def test_there_and_back_is_transposed(jitted, backend):
    """What is linear in x: also where the handle is made with the rows."""
    problem = PROBLEMS["eight_ranks"]
    with make_group(problem, backend) as group:

        def on_rank(x, topk_idx, bar):
            def there_and_back(x):
                received = jax_ep.dispatch(x, topk_idx, group=group)
                return jax_ep.combine(received.x, received.handle, group=group)

            f = jax.jit(there_and_back) if jitted else there_and_back
            (transposed,) = jax.linear_transpose(f, x)(bar)
            return transposed, there_and_back(bar)

        bar = problem.random(problem.x.shape, salt=3)
        got, want = over_ranks(group, on_rank)(problem.x, problem.topk_idx, bar)
    np.testing.assert_array_equal(got, want)  # it is its own transpose


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
