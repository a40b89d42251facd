# SPDX-License-Identifier: Apache-2.0
"""`EpConfig.drop` "even" in programs: halves, gradients, transformations, meshes, and errors."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jax_ep
from ep_testing import assertions
from ep_testing.even_drops import PROBLEMS
from ep_testing.moe_layers import by_rank, weights_of
from ep_testing.programs import make_group, make_mesh, over_ranks


def _text(problem, backend, f=jax_ep.dispatch):
    with make_group(problem, backend) as group:
        program = over_ranks(group, lambda x, idx, w: f(x, idx, w, group=group))
        arguments = problem.x, problem.topk_idx, problem.topk_weights
        text = jax.jit(lambda *a: program(*a)).lower(*arguments).as_text()
        return re.sub(r"group_id = -?\d+", "", text)


@pytest.mark.parametrize("f", [jax_ep.dispatch, jax_ep.dispatch_start])
@pytest.mark.parametrize(
    ("name", "gathers"),
    [("uniform", 1), ("cut", 1), ("no_share", 0), ("ample", 0), ("unlimited", 0)],
)
def test_counts_are_gathered_where_rows_can_be_dropped(name, gathers, f):
    problem = PROBLEMS[name]
    text = _text(problem, "ffi", f)
    assert text.count("stablehlo.all_gather") == gathers
    in_row_order = problem.replace(drop="rows")
    if gathers:
        assert f"tensor<1x{problem.num_experts}xi32>" in text
        assert "all_gather" not in _text(in_row_order, "ffi", f)
    else:
        assert text == _text(in_row_order, "ffi", f)


def _block(group, x, idx, w, *, halves=False):
    if halves:
        flight = jax_ep.dispatch_start(x, idx, w, group=group)
        received = jax_ep.dispatch_done(flight, after=jnp.sin(x), group=group)
    else:
        received = jax_ep.dispatch(x, idx, w, group=group)
    if isinstance(received.x, jax_ep.QuantizedRows):
        rows = received.x.dequantize(group.config.dtype)
    else:
        rows = received.x
    y = rows * (1 + received.local_expert).astype(rows.dtype)[:, None]
    return jax_ep.combine(y, received.handle, received.weights, group=group), received


def _dense(problem, x, w):
    """What `_block` computes in float32, without an exchange: by the oracle's plan."""
    plan = problem.plan
    local = 1 + np.maximum(problem.topk_idx, 0) % plan.num_local_experts
    factor = jnp.sum(jnp.where(plan.slot >= 0, w * local.astype(np.float32), 0.0), axis=-1)
    return x * factor[..., None]


@pytest.mark.parametrize("name", ["zipf", "fp8_rows", "no_tokens"])
def test_halves_give_the_bits_of_one_piece(name, backend):
    problem = PROBLEMS[name]
    arguments = problem.x, problem.topk_idx, problem.topk_weights
    with make_group(problem, backend) as group:
        whole = over_ranks(group, functools.partial(_block, group))(*arguments)
        halves = over_ranks(group, functools.partial(_block, group, halves=True))(*arguments)
    leaves = zip(jax.tree.leaves(whole), jax.tree.leaves(halves), strict=True)
    for one, two in leaves:
        np.testing.assert_array_equal(assertions.bits(np.asarray(one)), assertions.bits(two))


@pytest.mark.parametrize(
    ("check_vma", "jit", "halves"),
    [(True, True, False), (True, True, True), (True, False, False), (False, True, True)],
)
def test_gradients(check_vma, jit, halves, backend):
    problem = PROBLEMS["zipf"]
    x, bar = problem.random(problem.x.shape, salt=1), problem.random(problem.x.shape, salt=2)
    with make_group(problem, backend) as group:

        def on_rank(x, idx, w, bar):
            out, vjp = jax.vjp(lambda x, w: _block(group, x, idx, w, halves=halves)[0], x, w)
            return out, vjp(bar)

        program = over_ranks(group, on_rank, jit=jit, check_vma=check_vma)
        got = program(x, problem.topk_idx, problem.topk_weights, bar)
    out, vjp = jax.vjp(functools.partial(_dense, problem), x, problem.topk_weights)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves((out, vjp(bar))), strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-5)


def test_a_moe_block_drops_as_the_oracle_does(backend):
    """Outputs and gradients of `moe` with rows that are received in FP8, and with halves."""
    problem = PROBLEMS["fp8_rows"].replace(dtype="float32")
    weights = by_rank(problem, weights_of(problem))
    with make_group(problem, backend) as group:

        def on_rank(x, idx, w, *weights, overlap):
            def loss(x, w, *weights):
                out = jax_ep.moe(x, idx, w, *weights, group=group, overlap=overlap)
                return jnp.sum(out**2), out

            return jax.grad(loss, (0, 1, 2, 3, 4), has_aux=True)(x, w, *weights)

        arguments = problem.x, problem.topk_idx, problem.topk_weights, *weights
        plain = functools.partial(on_rank, overlap=None)
        overlapped = functools.partial(on_rank, overlap=jnp.zeros_like)
        got = over_ranks(group, plain)(*arguments)
        again = over_ranks(group, overlapped)(*arguments)
        # As if what is dropped had not been selected.
        masked = np.where(problem.plan.slot >= 0, problem.topk_idx, -1)
        want = over_ranks(group, plain)(problem.x, masked, *arguments[2:])
    for g, a, w in zip(*map(jax.tree.leaves, (got, again, want)), strict=True):
        np.testing.assert_array_equal(g, w)
        np.testing.assert_array_equal(a, w)


def test_rows_that_come_quantized(backend):
    problem = PROBLEMS["fp8_rows"]
    with make_group(problem, backend) as group:

        def on_rank(x, idx, w):
            return jax_ep.dispatch(jax_ep.quantize(x), idx, w, group=group)

        got = over_ranks(group, on_rank)(problem.x, problem.topk_idx, problem.topk_weights)
    want = problem.dispatched
    np.testing.assert_array_equal(got.num_dropped, want.num_dropped)
    assertions.assert_received_rows_equal(got.x, want.x, problem)


@pytest.mark.parametrize("halves", [False, True])
def test_vmap_and_scan(halves, backend):
    problems = [PROBLEMS["zipf"].replace(seed=seed) for seed in range(3)]
    arguments = [
        np.stack(arrays, axis=1)  # [R, batch, ...]
        for arrays in zip(*((p.x, p.topk_idx, p.topk_weights) for p in problems), strict=True)
    ]
    with make_group(problems[0], backend) as group:
        block = functools.partial(_block, group, halves=halves)

        def scanned(*arrays):
            return jax.lax.scan(lambda _, a: (None, block(*a)), None, arrays)[1]

        outs = [over_ranks(group, f)(*arguments) for f in (jax.vmap(block), scanned)]
        _, x_alone = over_ranks(group, jax.vmap(block, in_axes=(0, None, None)))(
            arguments[0], *(a[:, 1] for a in arguments[1:])
        )
    for out, received in outs:
        for i, problem in enumerate(problems):
            np.testing.assert_array_equal(received.handle.slot[:, i], problem.plan.slot)
            np.testing.assert_array_equal(received.num_dropped[:, i], problem.plan.num_dropped)
            want = _dense(problem, problem.x, problem.topk_weights)
            np.testing.assert_allclose(out[:, i], want, rtol=1e-5)
    for i in range(3):
        np.testing.assert_array_equal(x_alone.handle.slot[:, i], problems[1].plan.slot)


def test_remat_and_a_carried_flight(backend):
    """In a scan whose turns receive what the turn before has sent."""
    problem = PROBLEMS["zipf"]
    with make_group(problem, backend) as group:

        def on_rank(x, idx, w):
            def turn(flight, _):
                received = jax_ep.dispatch_done(flight, group=group)
                return jax_ep.dispatch_start(x, idx, w, group=group), received.num_dropped

            first = jax_ep.dispatch_start(x, idx, w, group=group)
            last, dropped = jax.lax.scan(turn, first, None, length=2)
            block = jax.checkpoint(lambda x: _block(group, x, idx, w)[0])
            grads = jax.grad(lambda x: jnp.sum(jnp.sin(block(x))))(x)
            return dropped, jax_ep.dispatch_done(last, group=group).num_dropped, grads

        program = over_ranks(group, on_rank)
        dropped, last, grads = program(problem.x, problem.topk_idx, problem.topk_weights)
    want = problem.plan.num_dropped
    np.testing.assert_array_equal(dropped, np.stack([want, want], axis=1))
    np.testing.assert_array_equal(last, want)
    want = jax.grad(lambda x: jnp.sum(jnp.sin(_dense(problem, x, problem.topk_weights))))(problem.x)
    np.testing.assert_allclose(grads, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("shape", "axes", "names"),
    [
        ((2, 4), ("expert",), ("data", "expert")),
        ((4, 2), ("expert",), ("expert", "data")),
        ((2, 2, 2), ("b", "a"), ("a", "data", "b")),
    ],
)
@pytest.mark.parametrize("check_vma", [False, True])
def test_meshes_with_further_axes(shape, axes, names, check_vma, backend):
    """Each coordinate of the other axis is a group of its own; several axes count row by row."""
    problems = [PROBLEMS["zipf"].replace(seed=seed) for seed in range(2)]
    mesh = make_mesh(shape, names)
    with make_group(
        problems[0], backend, mesh=mesh, axis_name=axes[0] if len(axes) == 1 else axes
    ) as group:

        def on_rank(x, idx, w):
            received = jax_ep.dispatch(x[0, 0], idx[0, 0], w[0, 0], group=group)
            results = received.x, received.num_dropped, received.tokens_per_expert
            return jax.tree.map(lambda a: a[None, None], results)

        spec = P("data", axes)
        mapped = jax.shard_map(
            on_rank, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=check_vma
        )
        stacked = [np.stack([getattr(p, n) for p in problems]) for n in ("x", "topk_idx")]
        weights = np.stack([p.topk_weights for p in problems])
        rows, dropped, asked = jax.jit(mapped)(*stacked, weights)
    for i, problem in enumerate(problems):
        np.testing.assert_array_equal(rows[i], problem.dispatched.x)
        np.testing.assert_array_equal(dropped[i], problem.plan.num_dropped)
        np.testing.assert_array_equal(asked[i], problem.plan.tokens_per_expert)


def test_an_axis_along_which_only_the_rows_vary(backend):
    """Its coordinates have the same routing, and so the same plan."""
    problem = PROBLEMS["zipf"]
    mesh = make_mesh((2, 4), ("data", "expert"))
    with make_group(problem, backend, mesh=mesh) as group:

        def on_rank(x, idx, w):
            received = jax_ep.dispatch(x[0, 0], idx[0], w[0], group=group)
            return received.x[None, None], received.num_dropped[None], received.handle.slot[None]

        mapped = jax.shard_map(
            on_rank,
            mesh=mesh,
            in_specs=(P("data", "expert"), P("expert"), P("expert")),
            out_specs=(P("data", "expert"), P("expert"), P("expert")),
        )
        x = np.stack([problem.x, 2 * problem.x])
        rows, dropped, slot = jax.jit(mapped)(x, problem.topk_idx, problem.topk_weights)
    np.testing.assert_array_equal(rows[1], 2 * problem.dispatched.x)
    np.testing.assert_array_equal(dropped, problem.plan.num_dropped)
    np.testing.assert_array_equal(slot, problem.plan.slot)


@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize(
    ("position", "expert", "said"),
    [
        (0, 16, "topk_idx[7, 0] is 16, but must be -1 (no selection) or an expert in [0, 16)"),
        (3, -7, "topk_idx[7, 3] is -7, but must be -1 (no selection) or an expert in [0, 16)"),
        (
            0,
            "repeated",
            "topk_idx[7, 3] is 8, and so is topk_idx[7, 0]: the experts of a token must be",
        ),
    ],
)
def test_a_bad_selection_is_the_backends_error(position, expert, said, start):
    """Of the last token of the last rank, of which "even" keeps no row."""
    problem = PROBLEMS["one_hot"]
    idx = problem.topk_idx.copy()
    assert (idx[-1, -1, 3], problem.plan.slot[-1, -1, 3]) == (8, -1)
    idx[-1, -1, position] = 8 if expert == "repeated" else expert
    with make_group(problem, "ffi") as group:

        def on_rank(x, idx, w):  # no combine, which would find it in the handle
            if not start:
                return jax_ep.dispatch(x, idx, w, group=group).x
            return jax_ep.dispatch_done(
                jax_ep.dispatch_start(x, idx, w, group=group), group=group
            ).x

        program = over_ranks(group, on_rank)
        with pytest.raises(jax.errors.JaxRuntimeError) as caught:
            jax.block_until_ready(program(problem.x, idx, problem.topk_weights))
    assert said in str(caught.value)
