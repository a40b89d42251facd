# SPDX-License-Identifier: Apache-2.0
"""Exchanges in halves: numbers, derivatives and transformations are those of one piece."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jax_ep
from ep_testing import problems
from ep_testing.halves import (
    PROBLEM,
    arguments,
    assert_same_bits,
    block,
    in_halves,
    num_open,
    one_piece,
    pipeline,
    rows_of,
    value_and_grads,
)
from ep_testing.problems import PROBLEMS
from ep_testing.programs import make_group, make_mesh, over_ranks

BACKENDS = pytest.mark.parametrize("backend", ["ffi", "xla"])


# --- numbers -----------------------------------------------------------------------------------


@BACKENDS
@pytest.mark.parametrize(
    "problem",
    problems.params(
        "tiny", "tiny_by_rank", "no_tokens", "no_tokens_by_rank", "one_rank", "six_ranks",
        "eight_ranks_by_rank", "all_masked", "masked_half", "masked_half_by_rank",
        "capacity_one_short", "capacity_factor_small_by_rank", "alignment_8_drops", "hidden_7",
        "float16", "fp8", "fp8_by_rank", "fp8_rows", "fp8_rows_by_rank", "fp8_rows_no_tokens",
        "deepseek",
    ),
)  # fmt: skip
def test_all_bits_are_those_of_one_piece(problem, backend):
    with make_group(problem, backend) as group:
        got = over_ranks(group, functools.partial(in_halves, group, problem))(*arguments(problem))
        want = over_ranks(group, functools.partial(one_piece, group, problem))(*arguments(problem))
    assert_same_bits(got, want)


@BACKENDS
def test_without_weights(backend):
    def run(f):
        return over_ranks(group, lambda x, idx: f(group, PROBLEM, x, idx, None))

    with make_group(PROBLEM, backend) as group:
        got = run(in_halves)(PROBLEM.x, PROBLEM.topk_idx)
        assert got[0].weights is None
        assert_same_bits(got, run(one_piece)(PROBLEM.x, PROBLEM.topk_idx))


@BACKENDS
@pytest.mark.parametrize("name", ["fp8", "fp8_rows", "fp8_rows_by_rank"])
def test_rows_that_are_quantized_travel_as_they_are(backend, name):
    problem = PROBLEMS[name]

    def run(f, x, idx, w):
        return f(group, problem, jax_ep.quantize(x), idx, w)

    with make_group(problem, backend) as group:
        got = over_ranks(group, functools.partial(run, in_halves))(*arguments(problem))
        want = over_ranks(group, functools.partial(run, one_piece))(*arguments(problem))
    assert_same_bits(got, want)


@pytest.mark.parametrize("jit", [True, False])
def test_a_tuple_of_axes_and_no_jit(jit):
    mesh = make_mesh((2, 2), ("node", "gpu"))
    with make_group(PROBLEM, "ffi", mesh=mesh, axis_name=("node", "gpu")) as group:
        got = over_ranks(group, functools.partial(block, group, halves=True), jit=jit)
        want = over_ranks(group, functools.partial(block, group, halves=False), jit=jit)
        assert_same_bits(got(*arguments(PROBLEM)), want(*arguments(PROBLEM)))


@BACKENDS
def test_the_plan_varies_over_the_axes_that_the_routing_does(backend):
    """As that of `dispatch`: along an axis over which only rows vary, counts are one array."""
    mesh = make_mesh((2, 4), ("data", "expert"))
    x = np.stack([PROBLEM.x.reshape(-1, PROBLEM.hidden), 3 * PROBLEM.x.reshape(-1, PROBLEM.hidden)])
    idx = PROBLEM.topk_idx.reshape(-1, PROBLEM.num_topk)

    def run(start_and_done, x, idx):
        received = start_and_done(x[0], idx)
        return received.x[None], received.group_sizes

    def two_halves(x, idx):
        return jax_ep.dispatch_done(jax_ep.dispatch_start(x, idx, group=group), group=group)

    with make_group(PROBLEM, backend, mesh=mesh) as group:
        programs = [
            jax.jit(
                jax.shard_map(
                    functools.partial(run, f),
                    mesh=mesh,
                    in_specs=(P("data", "expert"), P("expert")),
                    out_specs=(P("data", "expert"), P("expert")),
                )
            )
            for f in (two_halves, functools.partial(jax_ep.dispatch, group=group))
        ]
        got, want = (program(x, idx) for program in programs)
        assert_same_bits(got, want)


# --- derivatives -------------------------------------------------------------------------------


@BACKENDS
@pytest.mark.parametrize("name", ["masked_half", "masked_half_by_rank", "capacity_exact", "fp8"])
def test_gradients_are_those_of_one_piece(backend, name):
    problem = PROBLEMS[name]
    with make_group(problem, backend) as group:
        got, want = (
            over_ranks(group, value_and_grads(functools.partial(block, group, halves=halves)))(
                *arguments(problem)
            )
            for halves in (True, False)
        )
    assert_same_bits(got, want)


@BACKENDS
def test_forward_mode_and_second_derivatives(backend):
    def second(f, x, idx, w):
        def first(x, w):
            return jax.jvp(lambda x, w: f(x, idx, w), (x, w), (jnp.cos(x), jnp.sin(w)))[1]

        return jax.grad(lambda x, w: jnp.sum(first(x, w) ** 2), argnums=(0, 1))(x, w)

    with make_group(PROBLEM, backend) as group:
        got, want = (
            over_ranks(
                group,
                functools.partial(second, functools.partial(block, group, halves=halves)),
            )(*arguments(PROBLEM))
            for halves in (True, False)
        )
    if backend == "ffi":
        assert_same_bits(got, want)
    else:  # XLA sums as it likes: it fuses one program otherwise than the other
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@BACKENDS
def test_rows_in_fp8_have_no_gradient(backend):
    problem = PROBLEMS["fp8_rows"]
    with make_group(problem, backend) as group:

        def loss(x, idx):
            flight = jax_ep.dispatch_start(x, idx, group=group)
            return jnp.sum(rows_of(jax_ep.dispatch_done(flight, group=group), problem))

        with pytest.raises(ValueError, match="rows that go in or come out in FP8 have no gradient"):
            over_ranks(group, jax.grad(loss))(problem.x, problem.topk_idx)


def test_what_a_half_comes_after_has_no_gradient():
    with make_group(PROBLEM, "ffi") as group:

        def loss(shared, x, idx):
            flight = jax_ep.dispatch_start(x, idx, group=group)
            received = jax_ep.dispatch_done(flight, after=shared, group=group)
            return jnp.sum(received.x) + jnp.sum(shared)

        bar = over_ranks(group, jax.grad(loss))(PROBLEM.x, PROBLEM.x, PROBLEM.topk_idx)
    np.testing.assert_array_equal(bar, np.ones_like(bar))


def test_a_half_is_not_transposed_alone():
    with make_group(PROBLEM, "ffi") as group:

        def transposed(x, idx):
            def send(x):
                flight = jax_ep.dispatch_start(x, idx, group=group)
                return jax_ep.dispatch_done(flight, group=group).x

            rows = send(x)
            return jax.linear_transpose(send, x)(rows)[0]

        with pytest.raises(ValueError, match=r"jax.linear_transpose; allowed: the exchange in one"):
            over_ranks(group, transposed)(PROBLEM.x, PROBLEM.topk_idx)


# --- transformations ---------------------------------------------------------------------------

POLICIES = {
    "nothing": jax.checkpoint_policies.nothing_saveable,
    "everything": jax.checkpoint_policies.everything_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
    "tickets": lambda prim, *_, **__: prim.name.endswith("_start"),
    "received": lambda prim, *_, **__: prim.name == "jax_ep_dispatch_done",
    "sums": lambda prim, *_, **__: prim.name == "jax_ep_combine_done",
}


@pytest.mark.parametrize("in_a_scan", [False, True])
@pytest.mark.parametrize("policy", POLICIES)
def test_no_policy_of_rematerialization_uses_a_flight_twice(policy, in_a_scan):
    def layers(f, x, idx, w):
        f = jax.checkpoint(f, policy=POLICIES[policy])
        if not in_a_scan:
            return f(x, idx, w)
        return jax.lax.scan(lambda x, _: (jnp.tanh(f(x, idx, w)), None), x, None, length=3)[0]

    with make_group(PROBLEM, "ffi", timeout=20.0) as group:
        got, want = (
            over_ranks(
                group,
                value_and_grads(
                    functools.partial(layers, functools.partial(block, group, halves=halves))
                ),
            )(*arguments(PROBLEM))
            for halves in (True, False)
        )
        assert_same_bits(got, want)
        assert num_open(group) == 0


@BACKENDS
@pytest.mark.parametrize("differentiated", [False, True])
def test_a_scan_carries_a_flight(backend, differentiated):
    with make_group(PROBLEM, backend, timeout=20.0) as group:
        programs = [functools.partial(pipeline, group, halves=halves) for halves in (True, False)]
        if differentiated:
            programs = [value_and_grads(f) for f in programs]
        got, want = (over_ranks(group, f)(*arguments(PROBLEM)) for f in programs)
        # XLA may fuse what is around the exchanges in another way.
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5), got, want)


def test_starts_that_are_alike_are_not_one():
    """XLA may merge calls of equal operands, and move one out of a loop; not those."""

    def f(x, idx, w):
        def turn(total, _):
            flights = [jax_ep.dispatch_start(x, idx, w, group=group) for _ in range(2)]
            first = jax_ep.dispatch_done(flights[0], after=total, group=group)
            second = jax_ep.dispatch_done(flights[1], after=first.x, group=group)
            return total + jnp.sum(first.x) * jnp.sum(second.x), None

        return jax.lax.scan(turn, jnp.sum(x), None, length=3)[0]

    with make_group(PROBLEM, "ffi", timeout=20.0) as group:
        jax.block_until_ready(over_ranks(group, f)(*arguments(PROBLEM)))
        assert num_open(group) == 0


@BACKENDS
@pytest.mark.parametrize("one_routing", [False, True])
@pytest.mark.parametrize("differentiated", [False, True])
def test_vmap(backend, differentiated, one_routing):
    def batched(f, x, idx, w):
        if differentiated:
            f = value_and_grads(f)
        xs = jnp.stack([x, 2 * x, 3 * x])
        if one_routing:
            return jax.vmap(f, in_axes=(0, None, None))(xs, idx, w)
        return jax.vmap(f)(xs, jnp.stack([idx, idx[::-1], idx]), jnp.stack([w, w[::-1], w]))

    with make_group(PROBLEM, backend, timeout=20.0) as group:
        got, want = (
            over_ranks(
                group,
                functools.partial(batched, functools.partial(block, group, halves=halves)),
            )(*arguments(PROBLEM))
            for halves in (True, False)
        )
        assert_same_bits(got, want)


def test_vmap_around_the_second_half_alone_makes_one_exchange():
    def f(x, idx, w):
        flight = jax_ep.dispatch_start(x, idx, w, group=group)

        def done(shared):
            received = jax_ep.dispatch_done(flight, after=shared, group=group)
            return jnp.sum(received.x) * shared

        return jax.vmap(done)(jnp.arange(3.0))

    with make_group(PROBLEM, "ffi") as group:
        total = PROBLEM.dispatched.x.astype(np.float64).sum(axis=(1, 2))
        got = over_ranks(group, f)(*arguments(PROBLEM))
        np.testing.assert_allclose(got, total[:, None] * np.arange(3.0), rtol=1e-5)
        assert num_open(group) == 0


@pytest.mark.parametrize("halves", [True, False])
def test_axes_that_shard_map_leaves_to_the_compiler(halves):
    mesh = make_mesh((2, 4), ("data", "expert"))
    with make_group(PROBLEM, "ffi", mesh=mesh) as group:

        def f(x, idx, w):
            return jax.vmap(functools.partial(block, group, halves=halves))(x, idx, w)

        spec = P(None, "expert")
        program = jax.jit(
            jax.shard_map(f, mesh=mesh, in_specs=spec, out_specs=spec, axis_names={"expert"})
        )
        x, idx, w = (a.reshape(1, -1, a.shape[-1]) for a in arguments(PROBLEM))
        with pytest.warns(UserWarning, match="leaves the axes"):
            got = program(x, idx, w)[0].reshape(PROBLEM.x.shape)
        mapped = jax.shard_map(
            functools.partial(block, group, halves=halves),
            mesh=mesh,
            in_specs=P("expert"),
            out_specs=P("expert"),
            axis_names={"expert"},
        )
        with pytest.warns(UserWarning, match="leaves the axes"):
            alone = jax.jit(mapped)(x[0], idx[0], w[0])
    with make_group(PROBLEM, "ffi") as group:
        want = over_ranks(group, functools.partial(block, group, halves=False))(*arguments(PROBLEM))
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(alone.reshape(want.shape), want)
