# SPDX-License-Identifier: Apache-2.0
"""Experts whose number the ranks do not divide: the last ones of the last ranks only pad."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_ep
from ep_testing import assertions
from ep_testing.moe_layers import FFN
from ep_testing.oracle_checks import assert_matches_oracle
from ep_testing.problems import EpProblem
from ep_testing.programs import exchange, make_group, over_ranks
from jax_ep import reference
from jax_ep._src.groups import cuda
from jax_ep._src.ranges import check_num_ranks, why_not_on_gpus
from jax_ep._src.spec import OpSpec

# 60 experts on 8 ranks are Qwen1.5-MoE; 4 on 8, a mesh with more devices than experts.
BASE = EpProblem(name="padded", num_ranks=8, num_experts=60, num_topk=4, pad_experts=True)
PROBLEMS = {
    problem.name: problem
    for problem in (
        BASE.replace(name="sixty"),
        BASE.replace(name="sixty_by_rank", layout="rank"),
        BASE.replace(name="sixty_zipf", routing="zipf", capacity_factor=1.0, expert_alignment=4),
        BASE.replace(name="sixty_even", routing="zipf", capacity_factor=1.0, drop="even"),
        BASE.replace(name="few", num_experts=4, num_topk=2),
        BASE.replace(name="few_by_rank", num_experts=4, num_topk=2, layout="rank"),
        BASE.replace(name="few_drops", num_experts=4, num_topk=2, recv_capacity=3),
        BASE.replace(name="one", num_experts=1, num_topk=1),
        BASE.replace(name="ten_on_four", num_ranks=4, num_experts=10, routing="masked_half"),
        BASE.replace(name="empty", num_ranks=4, num_experts=6, num_tokens=0, recv_capacity=5),
        BASE.replace(name="last", num_ranks=4, num_experts=6, routing="last_expert_only"),
        BASE.replace(
            name="fp8", num_ranks=4, num_experts=7, hidden=144, dtype="bfloat16",
            wire_dtype="float8_e4m3fn", recv_dtype="float8_e4m3fn",
        ),
    )
}  # fmt: skip
ALL = pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)


@ALL
def test_a_backend_gives_the_oracles_bits(problem, backend):
    assert_matches_oracle(problem, exchange(problem, backend), backend)


@ALL
def test_the_shapes_are_those_of_the_padded_experts(problem):
    num_local = {60: 8, 4: 1, 1: 1, 10: 3, 6: 2, 7: 2}[problem.num_experts]
    with make_group(problem, "xla") as group:
        assert group.num_local_experts == num_local
        assert OpSpec.of(group, num_tokens=1).num_experts == num_local * problem.num_ranks
        heap = cuda._heap_shape(group.config, problem.num_ranks)
        assert heap["num_experts"] == num_local * problem.num_ranks
        assert group.config.num_experts == problem.num_experts
    assert problem.plan.tokens_per_expert.shape == (problem.num_ranks, num_local)
    assert not problem.plan.tokens_per_expert.reshape(-1)[problem.num_experts :].any()


def test_padding_is_as_experts_that_nobody_selects():
    """All bits of 64 experts, of which four are not selected."""
    problem = PROBLEMS["sixty_zipf"]
    table = tuple(map(tuple, (map(tuple, rank) for rank in problem.topk_idx.tolist())))
    whole = problem.replace(num_experts=64, pad_experts=False, routing="table", table=table)
    got, want = exchange(problem, "ffi"), exchange(whole, "ffi")
    for g, w in zip(jax.tree.leaves(got.received), jax.tree.leaves(want.received), strict=True):
        np.testing.assert_array_equal(assertions.bits(g), assertions.bits(w))
    np.testing.assert_array_equal(got.weighted, want.weighted)


def _weights(problem):
    """Of `R * L` experts."""
    padded, hidden = problem.num_ranks * problem.plan.num_local_experts, problem.hidden
    sizes = (padded, hidden, FFN), (padded, hidden, FFN), (padded, FFN, hidden)
    return [problem.random(size, salt=20 + i) / size[1] ** 0.5 for i, size in enumerate(sizes)]


@pytest.mark.parametrize("name", ["sixty", "few", "ten_on_four", "one"])
def test_a_block_and_its_gradients_are_the_dense_ones(name, backend):
    problem = PROBLEMS[name]
    weights, w = _weights(problem), problem.topk_weights
    x, bar = problem.random(problem.x.shape, salt=1), problem.random(problem.x.shape, salt=2)

    def dense(x, w, *weights):
        out = jnp.zeros_like(x)
        for expert in range(problem.num_experts):
            gate, up, down = (m[expert] for m in weights)
            factor = jnp.sum(jnp.where(problem.topk_idx == expert, w, 0.0), axis=-1, keepdims=True)
            out += factor * ((jax.nn.silu(x @ gate) * (x @ up)) @ down)
        return out

    with make_group(problem, backend) as group:

        def on_rank(x, idx, w, bar, *weights):
            def block(x, w, *weights):
                return jax_ep.moe(x, idx, w, *weights, group=group)

            out, vjp = jax.vjp(block, x, w, *weights)
            return out, vjp(bar)

        by_rank = [m.reshape(problem.num_ranks, -1, *m.shape[1:]) for m in weights]
        got, got_bars = over_ranks(group, on_rank)(x, problem.topk_idx, w, bar, *by_rank)
    want, vjp = jax.vjp(dense, x, w, *weights)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    want_bars = vjp(bar)
    for g, b in zip(got_bars, want_bars, strict=True):
        size = float(np.abs(b).max())
        np.testing.assert_allclose(np.reshape(g, b.shape), b, rtol=1e-4, atol=1e-4 * size)
    for g, b in zip(got_bars[2:], want_bars[2:], strict=True):
        assert not np.reshape(g, b.shape)[problem.num_experts :].any()


@pytest.mark.parametrize("name", ["few_drops", "sixty_even"])
def test_vjps_of_dispatch_are_the_oracles(name, backend):
    problem = PROBLEMS[name]
    assert problem.plan.num_dropped.any()
    rows_bar = problem.random(problem.dispatched.x.shape, salt=8)
    weights_bar = problem.random(problem.dispatched.weights.shape, salt=9)
    with make_group(problem, backend) as group:

        def on_rank(x, idx, w, rows_bar, weights_bar):
            def send(x, w):
                received = jax_ep.dispatch(x, idx, w, group=group)
                return received.x, received.weights

            return jax.vjp(send, x, w)[1]((rows_bar, weights_bar))

        arguments = problem.x, problem.topk_idx, problem.topk_weights, rows_bar, weights_bar
        got = over_ranks(group, on_rank)(*arguments)
    want = reference.dispatch_vjp(problem.plan, rows_bar, weights_bar)
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize(
    ("name", "expert", "said"),
    [
        ("sixty", 60, "1000060, but must be -1 (no selection) or an expert in [0, 64)"),
        ("sixty_even", 63, "1000063, but must be -1 (no selection) or an expert in [0, 64)"),
        ("sixty_even", 64, "64, but must be -1 (no selection) or an expert in [0, 64)"),
        ("sixty", -2, "-2, but must be -1 (no selection) or an expert in [0, 64)"),
        ("one", 1, "1000001, but must be -1 (no selection) or an expert in [0, 8)"),
    ],
)
def test_an_expert_that_only_pads_is_an_error(name, expert, said, start):
    problem = PROBLEMS[name]
    idx = problem.topk_idx.copy()
    idx[1, 2, 0] = expert
    with make_group(problem, "ffi") as group:

        def on_rank(x, idx):
            if not start:
                return jax_ep.dispatch(x, idx, group=group).x
            flight = jax_ep.dispatch_start(x, idx, group=group)
            return jax_ep.dispatch_done(flight, group=group).x

        with pytest.raises(jax.errors.JaxRuntimeError) as caught:
            jax.block_until_ready(over_ranks(group, on_rank)(problem.x, idx))
    assert f"rank 1: topk_idx[2, 0] is {said}" in str(caught.value)


@pytest.mark.parametrize("name", ["sixty_even", "few", "few_by_rank"])
def test_backend_xla_takes_it_for_no_selection(name):
    problem = PROBLEMS[name]
    idx = problem.topk_idx.copy()
    idx[1, 2, 0] = problem.num_ranks * problem.plan.num_local_experts - 1
    without = idx.copy()
    without[1, 2, 0] = -1
    with make_group(problem, "xla") as group:
        f = over_ranks(group, lambda x, idx: jax_ep.dispatch(x, idx, group=group))
        got, want = f(problem.x, idx), f(problem.x, without)
    np.testing.assert_array_equal(got.handle.topk_idx, idx)
    handle = dataclasses.replace(got.handle, topk_idx=want.handle.topk_idx)
    got = dataclasses.replace(got, handle=handle)
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize("num_experts", [60, 4])
def test_without_it_a_group_refuses(num_experts, backend):
    message = (
        f"EpConfig.num_experts is {num_experts}; it must be a multiple of the group's 8 ranks "
        "(axis 'expert' of the mesh), or EpConfig.pad_experts be True"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make_group(BASE.replace(num_experts=num_experts, pad_experts=False), backend)


def test_limits_are_of_the_padded_experts():
    sizes = {"num_topk": 1, "hidden": 1, "max_tokens_per_rank": 4, "pad_experts": True}
    make = functools.partial(jax_ep.EpConfig, **sizes)
    assert why_not_on_gpus(make(num_experts=4095), 2) is None
    message = "EpConfig.num_experts is 4096, 4098 with pad_experts; on GPUs it may be at most 4096"
    assert why_not_on_gpus(make(num_experts=4096), 3) == message
    check_num_ranks(make(num_experts=1087, low_latency_tokens=1), 8, "expert")
    with pytest.raises(ValueError, match="num_experts 1089 at most 0 are supported"):
        check_num_ranks(make(num_experts=1089, low_latency_tokens=1), 8, "expert")


def test_a_number_that_divides_is_not_padded(backend):
    """All bits are those without it."""
    problem = BASE.replace(num_experts=64)
    got, want = (
        exchange(problem.replace(pad_experts=pad), backend).received for pad in (True, False)
    )
    assert got.tokens_per_expert.shape == (8, 8)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(g, w)
