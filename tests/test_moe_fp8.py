# SPDX-License-Identifier: Apache-2.0
"""`moe` on rows that are received in FP8: values and gradients are those of the FP8 wire alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jax_ep
from ep_testing.moe_layers import by_rank, inputs, weights_of
from ep_testing.problems import PROBLEMS
from ep_testing.programs import make_group, make_mesh, over_ranks
from jax_ep import reference
from jax_ep._src import moe as moe_module

FP8 = "float8_e4m3fn"
# Lengths of rows, drops, alignment, tokens that select nothing.
NAMES = [
    *("fp8_rows", "fp8_rows_float32", "fp8_rows_float16", "fp8_rows_hidden_1"),
    *("fp8_rows_no_zero_fill", "fp8_rows_alignment_8"),
]
FLOAT32 = PROBLEMS["fp8_rows_float32"]
RTOL = {"float32": 1e-5, "bfloat16": 2.0**-6, "float16": 2.0**-9}


def _assert_close(got, want, rtol):
    for g, w in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        g, w = np.asarray(g).astype(np.float64), np.asarray(w).astype(np.float64)
        size = max(1e-3, float(np.max(np.abs(w), initial=0.0)))
        np.testing.assert_allclose(g, w, rtol=rtol, atol=rtol * size)


def _arguments(problem):
    return (
        inputs(problem), problem.topk_weights, *by_rank(problem, weights_of(problem)),
        problem.topk_idx,
    )  # fmt: skip


def _run(problem, backend, transformed, **kwargs):
    """`transformed(moe)` on every rank, where `moe` takes `_arguments` but for the routing."""
    with make_group(problem, backend) as group:

        def on_rank(*args):
            *args, topk_idx = args

            def moe(x, topk_weights, *weights):
                return jax_ep.moe(x, topk_idx, topk_weights, *weights, group=group)

            return transformed(moe)(*args)

        outs = over_ranks(group, on_rank, **kwargs)(*_arguments(problem))
        return jax.tree.map(np.asarray, outs)


def _with_gradients(moe):
    def loss(*args):
        out = moe(*args)
        return jnp.sum(jnp.sin(out.astype(jnp.float32))), out

    return jax.value_and_grad(loss, argnums=range(5), has_aux=True)


@pytest.mark.parametrize("name", NAMES)
def test_values_and_gradients_are_those_of_the_wire_alone(name, backend):
    problem = PROBLEMS[name]
    got = _run(problem, backend, _with_gradients)
    want = _run(problem.replace(recv_dtype=None), backend, _with_gradients)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(got))
    _assert_close(got, want, RTOL[problem.dtype])
    (_, out), _ = got
    exact = reference.moe(
        inputs(problem),
        problem.topk_idx,
        problem.topk_weights,
        *weights_of(problem),
        wire_dtype=FP8,
        recv_capacity=problem.capacity,
        expert_alignment=problem.expert_alignment,
    )
    _assert_close(out, exact, {"float32": 1e-4, "bfloat16": 0.04, "float16": 4e-3}[problem.dtype])


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("remat", [True, False])
def test_gradients_over_a_data_axis(check_vma, remat, backend):
    """Where weights vary over fewer axes than tokens do, so that their gradients are summed."""
    mesh = make_mesh((2, 4), ("data", "expert"))
    problem = FLOAT32.replace(recv_capacity=None)
    weights = [jnp.asarray(w) for w in weights_of(problem)]
    num_tokens = 8 * problem.num_tokens
    x = jax.random.normal(jax.random.key(0), (num_tokens, problem.hidden))
    logits = jax.random.normal(jax.random.key(1), (num_tokens, problem.num_experts))
    experts, tokens = P("expert"), P(("data", "expert"))

    def gradients(problem):
        with make_group(problem, backend, mesh=mesh) as group:

            def on_rank(x, logits, *weights):
                routing = jax_ep.route(logits, num_topk=problem.num_topk)
                return jax_ep.moe(x, *routing, *weights, group=group)

            layer = jax.shard_map(
                jax.checkpoint(on_rank) if remat else on_rank,
                mesh=mesh,
                in_specs=(tokens, tokens, experts, experts, experts),
                out_specs=tokens,
                check_vma=check_vma,
            )

            def loss(*args):
                return jnp.square(layer(*args)).sum()

            return jax.jit(jax.grad(loss, argnums=range(5)))(x, logits, *weights)

    _assert_close(gradients(problem), gradients(problem.replace(recv_dtype=None)), 1e-5)


@pytest.mark.parametrize("how", ["scan", "vmap", "remat_scan", "cond", "no_jit"])
def test_gradients_under_transformations(how, backend):
    def transformed(moe):
        def layers(x, *args):
            if how == "vmap":
                return jax.vmap(lambda x: moe(x, *args))(jnp.stack([x, 0.5 * x]))
            if how == "cond":
                return jax.lax.cond(jnp.sum(args[0]) > 0, lambda x: moe(x, *args), jnp.cos, x)
            step = jax.checkpoint(moe) if how == "remat_scan" else moe
            return jax.lax.scan(lambda x, _: (x + step(x, *args), None), x, None, length=2)[0]

        return _with_gradients(layers)

    problem = FLOAT32.replace(recv_capacity=None)
    got = _run(problem, backend, transformed, jit=how != "no_jit")
    want = _run(problem.replace(recv_dtype=None), backend, transformed)
    _assert_close(got, want, 1e-5)


def test_forward_mode_and_second_derivatives(backend):
    """Straight through, too: as `xla` has them for the FP8 wire alone."""

    def derivatives(moe):
        def of(x, topk_weights, *weights):
            first = jax.grad(lambda x, w: jnp.sum(jnp.sin(moe(x, w, *weights))), (0, 1))
            tangents = jnp.cos(x), jnp.sin(topk_weights)
            return jax.jvp(lambda x, w: moe(x, w, *weights), (x, topk_weights), tangents), jax.grad(
                lambda x, w: sum(jnp.sum(g**2) for g in first(x, w)), (0, 1)
            )(x, topk_weights)

        return of

    got = _run(FLOAT32, backend, derivatives)
    want = _run(FLOAT32.replace(recv_dtype=None), "xla", derivatives)
    _assert_close(got, want, 1e-4)


@pytest.mark.parametrize("argument", [0, 1, 2])
def test_a_gradient_of_one_argument_alone(argument, backend):
    def one(moe):
        return jax.grad(lambda *args: jnp.sum(jnp.sin(moe(*args))), argument)

    got = _run(FLOAT32, backend, one)
    want = _run(FLOAT32.replace(recv_dtype=None), backend, one)
    assert np.any(want)
    _assert_close(got, want, 1e-5)


def test_the_backward_pass_keeps_the_rows_in_fp8(backend):
    """Of what stays alive between the passes, `[C, H]` are two: the rows, and the experts' outputs.

    Those are needed for the gradient of the weights in any format.
    """
    kept = []

    def residuals(moe):
        def of(*args):
            out, vjp = jax.vjp(moe, *args)
            kept.extend((leaf.shape, leaf.dtype.name) for leaf in jax.tree.leaves(vjp))
            return vjp(out)

        return of

    problem = PROBLEMS["fp8_rows"].replace(recv_capacity=40)
    rows = (40, problem.hidden)
    _run(problem, backend, residuals)
    assert sorted(dtype for shape, dtype in kept if shape == rows) == ["bfloat16", FP8]
    kept.clear()
    _run(problem.replace(recv_dtype=None), backend, residuals)
    assert [dtype for shape, dtype in kept if shape == rows] == ["bfloat16", "bfloat16"]


def test_empty_rows_leak_nothing(monkeypatch, backend):
    """With `zero_fill=False` they may hold anything: NaN changes neither outputs nor gradients."""
    problem = PROBLEMS["fp8_rows_alignment_8"].replace(zero_fill=False, recv_capacity=90)
    clean = _run(problem, backend, _with_gradients)
    poisoned = []

    def dispatch(*args, **kwargs):
        recv = jax_ep.dispatch(*args, **kwargs)
        empty = (recv.handle.row_source < 0)[:, None]
        poisoned.append(recv.x)
        nan = jax.tree.map(lambda part: jnp.where(empty, jnp.nan, part).astype(part.dtype), recv.x)
        return dataclasses.replace(recv, x=nan)

    monkeypatch.setattr(moe_module, "dispatch", dispatch)
    for got, want in zip(
        *map(jax.tree.leaves, (_run(problem, backend, _with_gradients), clean)), strict=True
    ):
        assert np.isfinite(got).all()
        np.testing.assert_allclose(got, want, rtol=1e-6)
    assert poisoned


# --- tokens that come in FP8 -------------------------------------------------------------------


def _of_quantized(moe):
    return lambda x, *args: moe(jax_ep.quantize(jax.lax.stop_gradient(x)), *args)


@pytest.mark.parametrize("recv_dtype", [None, FP8])
def test_tokens_that_come_quantized(recv_dtype, backend):
    """The same output, and the same gradients of all but the tokens."""
    problem = FLOAT32.replace(recv_dtype=recv_dtype)
    got = _run(problem, backend, lambda moe: _with_gradients(_of_quantized(moe)))
    want = _run(problem, backend, _with_gradients)
    (value, (of_x, *of_others)), (want_value, (_, *want_others)) = got, want
    assert not of_x.any()
    _assert_close((value, of_others), (want_value, want_others), 1e-5)


@pytest.mark.parametrize("recv_dtype", [None, FP8])
def test_tokens_that_come_quantized_have_no_gradient(recv_dtype, backend):
    problem = FLOAT32.replace(recv_dtype=recv_dtype)
    args = (*reference.quantize_fp8(inputs(problem)), *_arguments(problem)[1:])
    with make_group(problem, backend) as group:

        def on_rank(values, scales, topk_weights, *rest):
            *weights, topk_idx = rest
            moe = functools.partial(jax_ep.moe, group=group)

            def loss(scales):
                x = jax_ep.QuantizedRows(values, scales)
                return jnp.sum(moe(x, topk_idx, topk_weights, *weights))

            return jax.grad(loss)(scales)

        with pytest.raises(ValueError, match=r"differentiated in x.*allowed: jax_ep\.moe with"):
            over_ranks(group, on_rank)(*args)


def test_errors_name_the_argument(backend):
    with make_group(FLOAT32, backend) as group:
        run = over_ranks(group, functools.partial(jax_ep.moe, group=group))
        x, topk_weights, *weights, topk_idx = _arguments(FLOAT32)
        with pytest.raises(ValueError, match=r"x is float32\[8, 199\]; allowed: float32\[T, 200\]"):
            run(x[..., 1:], topk_idx, topk_weights, *weights)
        with pytest.raises(ValueError, match=r"topk_weights is float16.*allowed: float32"):
            run(x, topk_idx, topk_weights.astype(np.float16), *weights)
        # JAX would make float32 of this one.
        wide = np.zeros((8, 200), np.float64)
        run = over_ranks(group, lambda *rest: jax_ep.moe(wide, *rest, group=group))
        with pytest.raises(ValueError, match=r"x is float64\[8, 200\]; allowed: float32\[T, 200\]"):
            run(topk_idx, topk_weights, *weights)
