# SPDX-License-Identifier: Apache-2.0
"""Rows in FP8: made, restored, sent and received, with the oracle's bits; and what is refused."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jax_ep
from ep_testing import assertions
from ep_testing.problems import PROBLEMS, EpProblem
from ep_testing.programs import make_group, make_mesh, over_ranks
from jax_ep import reference

FP8 = "float8_e4m3fn"
DTYPES = ("float32", "bfloat16", "float16")
# In both layouts: odd lengths, drops, rows that are left alone, no tokens.
SENT = [
    name + layout
    for name in (
        *("fp8_rows", "fp8_rows_float32", "fp8_rows_float16", "fp8_rows_hidden_1"),
        *("fp8_rows_no_tokens", "fp8_rows_no_zero_fill"),
    )
    for layout in ("", "_by_rank")
] + ["fp8_rows_alignment_8"]


def _rows(shape, dtype="float32", seed=0):
    """Blocks of very different size, zeros among them."""
    rng = np.random.default_rng(seed)
    sizes = 10.0 ** rng.integers(-6, 3, (*shape[:-1], -(-shape[-1] // 128)))
    sizes = np.repeat(sizes, 128, axis=-1)[..., : shape[-1]]
    x = rng.standard_normal(shape) * sizes * (rng.random(shape) < 0.9)
    return x.astype(np.float32).astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


def _assert_same_bits(got, want):
    got, want = jax.tree.leaves(got), jax.tree.leaves(want)
    for g, w in zip(map(np.asarray, got), map(np.asarray, want), strict=True):
        assert (g.shape, g.dtype) == (w.shape, w.dtype)
        np.testing.assert_array_equal(assertions.bits(g), assertions.bits(w))


# --- quantize and dequantize -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(5, 256), (5, 1), (3, 127), (3, 129), (2, 3, 200), (0, 40), (7,)]
)
@pytest.mark.parametrize("jit", [False, True])
def test_rows_are_quantized_and_restored_as_the_oracle_does(shape, dtype, jit):
    x = _rows(shape, dtype)
    quantize, restore = jax_ep.quantize, lambda q: q.dequantize(dtype)
    if jit:
        quantize, restore = jax.jit(quantize), jax.jit(restore)
    got, want = quantize(x), reference.quantize_fp8(x)
    assert isinstance(got, jax_ep.QuantizedRows)
    assert got.scales.shape == (*shape[:-1], -(-shape[-1] // 128))
    _assert_same_bits(got, want)
    _assert_same_bits(restore(got), reference.dequantize_fp8(*want, x.dtype))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rows_that_are_made_in_the_same_program_are_rounded_first(dtype):
    # XLA would leave the rounding out: what it makes of these differs in hundreds of numbers.
    @jax.jit
    def make(x):
        return x * np.asarray(1.7, x.dtype) + x * x

    x = _rows((16, 800), dtype)
    got = jax.jit(lambda x: jax_ep.quantize(make(x)))(x)
    _assert_same_bits((got.values, got.scales), reference.quantize_fp8(np.asarray(make(x))))


def test_a_nan_or_an_infinity_makes_nans_of_its_block_alone():
    for special in (np.nan, np.inf):
        x = np.ones((1, 300), np.float32)
        x[0, 130] = special
        values = np.asarray(jax_ep.quantize(x).dequantize(jnp.float32))
        assert np.isnan(values[0, 130])
        assert not np.isnan(values[0, [*range(128), *range(256, 300)]]).any()


def test_they_batch_and_pass_through_loops():
    x = _rows((4, 3, 200))
    _assert_same_bits(jax.vmap(jax_ep.quantize)(x), reference.quantize_fp8(x))
    quantized = jax_ep.quantize(x)
    restored = jax.vmap(lambda q: q.dequantize("bfloat16"))(quantized)
    _assert_same_bits(restored, quantized.dequantize("bfloat16"))
    _, scanned = jax.lax.scan(lambda c, q: (c, q), 0, quantized)
    _assert_same_bits(scanned, quantized)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        ([1.0], "x is a list; allowed: an array [..., H]"),
        (
            np.zeros((2, 3), np.int32),
            "x is int32[2, 3]; allowed: float32, bfloat16, float16, with a dimension",
        ),
        (np.zeros((), np.float32), "x is float32[]; allowed: float32, bfloat16, float16"),
        (np.zeros((2, 3), ml_dtypes.float8_e4m3fn), "x is float8_e4m3fn[2, 3]; allowed: float32"),
    ],
)
def test_what_cannot_be_quantized_is_named(x, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        jax_ep.quantize(x)


VALUES, SCALES = np.zeros((2, 200), ml_dtypes.float8_e4m3fn), np.zeros((2, 2), np.float32)


@pytest.mark.parametrize(
    ("values", "scales", "dtype", "message"),
    [
        (VALUES, SCALES, "int8", "dtype is 'int8'; allowed: float32, bfloat16, float16"),
        (VALUES, SCALES, "nothing", "dtype is 'nothing'; allowed: float32, bfloat16, float16"),
        (
            VALUES.astype(np.float32), SCALES, "float32",
            "values is float32[2, 200]; allowed: float8_e4m3fn",
        ),
        (VALUES, SCALES.astype(np.float16), "float32", "scales is float16[2, 2]; allowed: float32"),
        (
            VALUES, SCALES[:, :1], "float32",
            "scales is float32[2, 1]; allowed with values float8_e4m3fn[2, 200]: float32[2, 2]",
        ),
        (VALUES, None, "float32", "scales is a NoneType; allowed: an array"),
    ],
)  # fmt: skip
def test_what_cannot_be_restored_is_named(values, scales, dtype, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        jax_ep.QuantizedRows(values, scales).dequantize(dtype)


# --- sent and received -------------------------------------------------------------------------


def _not_empty(problem):
    """One more input, and result: XLA compiles no shard_map all of whose inputs have size 0."""
    return np.zeros((problem.num_ranks, 1), np.float32)


@pytest.mark.parametrize("name", SENT)
@pytest.mark.parametrize("recv_dtype", [None, FP8])
def test_quantized_rows_travel_as_they_are(name, recv_dtype, backend):
    """With scales and values that quantizing would not give, so that doing it again would show."""
    problem = PROBLEMS[name].replace(recv_dtype=recv_dtype)
    sent = reference.quantize_fp8(problem.x)
    values = np.asarray(sent.values).copy()
    values[..., 0] = 1.5
    sent = reference.QuantizedRows(values, sent.scales * np.float32(3.7))
    assert (
        problem.num_tokens == 0
        or (
            reference.quantize_fp8(reference.dequantize_fp8(*sent, np.float32)).scales
            != sent.scales
        ).any()
    )
    with make_group(problem, backend) as group:

        def on_rank(values, scales, idx, w, other):
            x = jax_ep.QuantizedRows(values, scales)
            received = jax_ep.dispatch(x, idx, w, group=group)
            return received.x, received.weights, other

        args = *sent, problem.topk_idx, problem.topk_weights, _not_empty(problem)
        rows, weights, _ = over_ranks(group, on_rank)(*args)
    want = reference.dispatch(
        sent, problem.topk_idx, problem.topk_weights, **problem.dispatch_kwargs()
    )
    np.testing.assert_array_equal(weights, want.weights)
    assertions.assert_received_rows_equal(rows, want.x, problem)


@pytest.mark.parametrize("name", SENT)
def test_received_rows_stand_for_those_that_the_wire_alone_gives(name, backend):
    problem = PROBLEMS[name]

    def receive(recv_dtype, *, quantized_before=False):
        with make_group(problem.replace(recv_dtype=recv_dtype), backend) as group:

            def on_rank(x, idx, other):
                x = jax_ep.quantize(x) if quantized_before else x
                rows = jax_ep.dispatch(x, idx, group=group).x
                return (rows if recv_dtype is None else rows.dequantize(problem.dtype)), other

            run = over_ranks(group, on_rank)
            return run(problem.x, problem.topk_idx, _not_empty(problem))[0]

    want = receive(None)
    plain = problem.replace(recv_dtype=None)
    for got in (receive(FP8), receive(FP8, quantized_before=True)):
        assertions.assert_rows_equal(got, want, plain)


@pytest.mark.parametrize("name", ["fp8_rows_float32", "fp8_rows_float32_by_rank"])
def test_rows_without_a_token_are_zeros_with_scales_of_zero(name, backend):
    problem = PROBLEMS[name].replace(recv_capacity=200)
    with make_group(problem, backend) as group:
        rows = over_ranks(group, lambda x, idx: jax_ep.dispatch(x, idx, group=group).x)(
            problem.x, problem.topk_idx
        )
    empty = problem.plan.row_source < 0
    assert empty.any()
    assert not assertions.bits(np.asarray(rows.values))[empty].any()
    assert not assertions.bits(np.asarray(rows.scales))[empty].any()


def _layer(x, idx, w, group):
    """Received in FP8, restored, combined."""
    received = jax_ep.dispatch(x, idx, w, group=group)
    rows = received.x.dequantize(group.config.dtype)
    return jax_ep.combine(rows, received.handle, received.weights, group=group)


@pytest.mark.parametrize("how", ["scan", "vmap", "remat", "no_jit", "no_vma"])
@pytest.mark.parametrize("name", ["fp8_rows_float32", "fp8_rows_float32_by_rank"])
def test_transformations_that_do_not_differentiate(name, how, backend):
    problem = PROBLEMS[name]

    def on_rank(x, idx, w):
        if how == "scan":
            out = jax.lax.scan(lambda c, x: (c, _layer(x, idx, w, group)), 0, jnp.stack([x, 2 * x]))
            return out[1]
        if how == "vmap":
            return jax.vmap(lambda x: _layer(x, idx, w, group))(jnp.stack([x, 2 * x]))
        layer = jax.checkpoint(_layer, static_argnums=3) if how == "remat" else _layer
        return jnp.stack([layer(x, idx, w, group), layer(2 * x, idx, w, group)])

    with make_group(problem, backend) as group:
        run = over_ranks(group, on_rank, jit=how != "no_jit", check_vma=how != "no_vma")
        out = run(problem.x, problem.topk_idx, problem.topk_weights)
        plain = over_ranks(group, lambda x, idx, w: _layer(x, idx, w, group))
        want = [plain(f * problem.x, problem.topk_idx, problem.topk_weights) for f in (1, 2)]
    _assert_same_bits(out, np.stack(want, axis=1))


# --- what is refused ---------------------------------------------------------------------------

PROBLEM = EpProblem(name="fp8", hidden=200, dtype="bfloat16", wire_dtype=FP8)


def _tokens(values=(4, 200), scales=(4, 2), dtypes=(ml_dtypes.float8_e4m3fn, np.float32)):
    arrays = [np.zeros((2, *shape), d) for shape, d in zip((values, scales), dtypes, strict=True)]
    return jax_ep.QuantizedRows(*arrays)


@pytest.mark.parametrize(
    ("wire_dtype", "x", "message"),
    [
        (
            None, _tokens(),
            "x is a QuantizedRows, and EpConfig.wire_dtype is None; allowed: bfloat16[T, 200], or "
            "EpConfig.wire_dtype float8_e4m3fn, on which quantized rows travel",
        ),
        (
            FP8, _tokens(values=(4, 199)),
            "x.values is float8_e4m3fn[4, 199]; allowed: float8_e4m3fn[T, 200]",
        ),
        (
            FP8, _tokens(dtypes=(np.float32, np.float32)),
            "x.values is float32[4, 200]; allowed: float8_e4m3fn[T, 200]",
        ),
        (
            FP8, _tokens(scales=(4, 1)),
            "x.scales is float32[4, 1]; allowed: float32[4, 2]",
        ),
        (
            FP8, _tokens(dtypes=(ml_dtypes.float8_e4m3fn, np.float16)),
            "x.scales is float16[4, 2]; allowed: float32[4, 2]",
        ),
        (
            FP8, np.zeros((2, 4, 200), ml_dtypes.float8_e4m3fn),
            "x is float8_e4m3fn[4, 200]; allowed: bfloat16[T, 200], or a QuantizedRows of such",
        ),
        (
            FP8, _tokens(values=(5, 200), scales=(5, 2)),
            "x has 5 tokens; allowed: up to config.max_tokens_per_rank, which is 4",
        ),
    ],
)  # fmt: skip
def test_dispatch_names_what_it_cannot_send(wire_dtype, x, message, backend):
    with make_group(PROBLEM.replace(wire_dtype=wire_dtype), backend) as group:
        run = over_ranks(group, lambda x, idx: jax_ep.dispatch(x, idx, group=group).group_sizes)
        with pytest.raises(ValueError, match=re.escape(message)):
            run(x, PROBLEM.topk_idx)


def test_combine_takes_no_quantized_rows(backend):
    with make_group(PROBLEM.replace(recv_dtype=FP8), backend) as group:

        def on_rank(x, idx):
            received = jax_ep.dispatch(x, idx, group=group)
            return jax_ep.combine(received.x, received.handle, group=group)

        with pytest.raises(ValueError, match="y is a QuantizedRows; allowed: an array, bfloat16"):
            over_ranks(group, on_rank)(PROBLEM.x, PROBLEM.topk_idx)


def test_what_has_no_gradient_says_so():
    x = _rows((3, 200))
    for derivative in (jax.grad, jax.jacfwd):
        with pytest.raises(ValueError, match=r"jax_ep\.quantize is differentiated, which has no"):
            derivative(lambda x: jnp.sum(jax_ep.quantize(x).scales))(x)
        with pytest.raises(ValueError, match=r"QuantizedRows\.dequantize is differentiated"):
            derivative(
                lambda scales: jnp.sum(
                    dataclasses.replace(jax_ep.quantize(x), scales=scales).dequantize("float32")
                )
            )(jnp.ones((3, 2)))
    with pytest.raises(ValueError, match="is differentiated"):
        jax.grad(jax.checkpoint(lambda x: jnp.sum(jax_ep.quantize(x).scales)))(x)
    stopped = jax.grad(
        lambda x: jnp.sum(x) + jnp.sum(jax_ep.quantize(jax.lax.stop_gradient(x)).scales)
    )
    np.testing.assert_array_equal(stopped(x), np.ones_like(x))


@pytest.mark.parametrize("case", ["array_in", "quantized_in", "quantized_both"])
@pytest.mark.parametrize("mode", ["grad", "jvp", "remat", "scan"])
def test_dispatch_has_no_gradient_in_quantized_rows(case, mode, backend):
    problem = PROBLEM.replace(dtype="float32", recv_dtype=None if case == "quantized_in" else FP8)
    with make_group(problem, backend) as group:

        def loss(x, idx):
            if case == "array_in":
                return jnp.sum(jax_ep.dispatch(x, idx, group=group).x.scales)
            received = jax_ep.dispatch(jax_ep.QuantizedRows(*x), idx, group=group).x
            return jnp.sum(received.scales if case == "quantized_both" else received)

        def on_rank(x, idx):
            f = loss
            if mode == "remat":
                f = jax.checkpoint(loss)
            if mode == "scan":

                def f(x, idx):
                    return jax.lax.scan(
                        lambda c, _: (c + loss(x, idx), None), loss(x, idx), None, 2
                    )[0]

            if mode == "jvp":
                return jax.jvp(lambda x: f(x, idx), (x,), (x,))
            return jax.grad(f)(x, idx)

        x = problem.x if case == "array_in" else tuple(reference.quantize_fp8(problem.x))
        message = "dispatch is differentiated in x, and rows that go in or come out in FP8 have no"
        with pytest.raises(ValueError, match=message):
            over_ranks(group, on_rank)(x, problem.topk_idx)


@pytest.mark.parametrize("layout", ["expert", "rank"])
@pytest.mark.parametrize("quantized_before", [False, True])
def test_weights_of_quantized_rows_have_their_gradient(layout, quantized_before, backend):
    problem = PROBLEMS["fp8_rows_float32"].replace(layout=layout, recv_capacity=None)

    def gradient(problem):
        with make_group(problem, backend) as group:

            def on_rank(x, idx, w):
                x = jax_ep.quantize(x) if quantized_before else x

                def loss(w):
                    received = jax_ep.dispatch(x, idx, w, group=group)
                    rows = received.x
                    if isinstance(rows, jax_ep.QuantizedRows):
                        rows = rows.dequantize("float32")
                    out = jax_ep.combine(rows, received.handle, received.weights, group=group)
                    return jnp.sum(jnp.sin(out))

                return jax.grad(loss)(w)

            return over_ranks(group, on_rank)(problem.x, problem.topk_idx, problem.topk_weights)

    got, want = gradient(problem), gradient(problem.replace(recv_dtype=None))
    assert np.asarray(want).any()
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("layout", ["expert", "rank"])
def test_a_dispatch_that_receives_fp8_is_transposed_in_its_weights(layout, backend):
    problem = PROBLEMS["fp8_rows_float32"].replace(layout=layout, recv_capacity=None)

    def transposed(problem):
        with make_group(problem, backend) as group:

            def on_rank(x, idx, w):
                def weights(w):
                    return jax_ep.dispatch(x, idx, w, group=group).weights

                return jax.linear_transpose(weights, w)(jnp.ones_like(weights(w)))[0]

            return over_ranks(group, on_rank)(problem.x, problem.topk_idx, problem.topk_weights)

    got = transposed(problem)
    want = transposed(problem.replace(recv_dtype=None, wire_dtype=None))
    assert np.asarray(want).any()
    np.testing.assert_array_equal(got, want)


def test_a_dispatch_that_receives_fp8_is_not_transposed_in_x(backend):
    problem = PROBLEMS["fp8_rows_float32"]
    with make_group(problem, backend) as group:

        def on_rank(x, idx):
            def values(x):
                return jax_ep.dispatch(x, idx, group=group).x.values

            return jax.linear_transpose(values, x)(jnp.ones_like(values(x)))

        with pytest.raises(ValueError, match="rows that go in or come out in FP8 have no"):
            over_ranks(group, on_rank)(problem.x, problem.topk_idx)


@pytest.mark.parametrize("part", ["values", "scales"])
@pytest.mark.parametrize("num_experts", [4, 3])
def test_quantized_matrices_without_a_part_are_refused_by_name(part, num_experts):
    """On global arrays, with and without experts that pad."""
    parts = {"values": jnp.zeros((4, 8, 8), jnp.int8), "scales": jnp.ones((4, 1, 1)), part: None}
    matrices = jax_ep.experts.QuantizedMatrices(**parts)
    config = jax_ep.EpConfig(
        num_experts=num_experts,
        num_topk=1,
        hidden=8,
        max_tokens_per_rank=4,
        dtype=jnp.float32,
        pad_experts=True,
    )
    rows = jnp.zeros((4, 8)), jnp.zeros((4, 1), jnp.int32), jnp.ones((4, 1))
    experts = jax_ep.experts.gated(matrices, matrices, matrices)
    mesh = make_mesh((2,), ("expert",))
    with (
        jax_ep.EpGroup(mesh, "expert", config) as group,
        pytest.raises(ValueError, match=rf"w_gate\.{part} is .*None.*; allowed"),
    ):
        jax_ep.sharded_moe(*rows, experts, group=group, token_spec=P("expert"))
