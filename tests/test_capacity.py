# SPDX-License-Identifier: Apache-2.0
"""One group for calls of any number of tokens: the capacity follows the call."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jax_ep
from ep_testing.assertions import bits
from ep_testing.flax_layers import make_nnx
from ep_testing.moe_layers import by_rank, inputs, weights_of
from ep_testing.problems import EpProblem
from ep_testing.programs import exchange, exchange_program, make_group, over_ranks, run_exchange

MAX_TOKENS = 64


def assert_same_bits(got, want, what):
    np.testing.assert_array_equal(bits(np.asarray(got)), bits(np.asarray(want)), what)


PROBLEM = EpProblem(
    name="calls", num_ranks=2, num_experts=8, num_topk=3, hidden=20, max_tokens_per_rank=MAX_TOKENS
)
CAPACITIES = {
    "worst case": {},
    "factor": {"capacity_factor": 0.7},
    "aligned factor": {"capacity_factor": 1.25, "expert_alignment": 4},
    "rows": {"recv_capacity": 9},
    "rank": {"layout": "rank"},
    "rank factor": {"layout": "rank", "capacity_factor": 0.4},
}


@pytest.mark.parametrize("capacity", CAPACITIES)
def test_a_group_serves_calls_of_any_number_of_tokens(capacity, backend):
    """As groups made for just so many tokens do, and as the oracle does."""
    problem = PROBLEM.replace(**CAPACITIES[capacity])
    with make_group(problem, backend) as group:
        program = exchange_program(group)
        for num_tokens in (MAX_TOKENS, 5, 1, 0):
            call = problem.replace(num_tokens=num_tokens)
            got = run_exchange(program, call)
            assert got.received.x.shape == (2, call.plan.capacity, 20)
            np.testing.assert_array_equal(got.received.handle.slot, call.plan.slot)
            np.testing.assert_array_equal(got.received.num_dropped, call.plan.num_dropped)
            own = exchange(call.replace(max_tokens_per_rank=max(1, num_tokens)), backend)
            for name in ("x", "weights", "group_sizes", "tokens_per_expert"):
                assert_same_bits(getattr(got.received, name), getattr(own.received, name), name)
            assert_same_bits(got.weighted, own.weighted, "weighted")
            assert_same_bits(got.unweighted, own.unweighted, "unweighted")


def _moe_and_gradients(group):
    def on_rank(x, topk_idx, topk_weights, *experts):
        def loss(x, topk_weights, *experts):
            out = jax_ep.moe(x, topk_idx, topk_weights, *experts, group=group)
            return jnp.sum(out * out), out

        return jax.grad(loss, argnums=(0, 1, 2, 3, 4), has_aux=True)(x, topk_weights, *experts)

    return over_ranks(group, on_rank)


@pytest.mark.parametrize("recv_dtype", [None, "float8_e4m3fn"])
def test_a_block_and_its_gradients_do_so_too(recv_dtype, backend):
    problem = PROBLEM.replace(wire_dtype=recv_dtype, recv_dtype=recv_dtype, capacity_factor=0.9)
    weights = weights_of(problem)
    with make_group(problem, backend) as group:
        program = _moe_and_gradients(group)
        for num_tokens in (5, 1):
            call = problem.replace(num_tokens=num_tokens)
            given = inputs(call), call.topk_idx, call.topk_weights, *by_rank(call, weights)
            got = program(*given)
            with make_group(call.replace(max_tokens_per_rank=num_tokens), backend) as own_group:
                own = _moe_and_gradients(own_group)(*given)
            jax.tree.map(functools.partial(assert_same_bits, what=f"T {num_tokens}"), got, own)


def _cost(group, num_tokens):
    """Floating-point operations of a block, and bytes that it touches, as XLA counts them."""
    call = PROBLEM.replace(num_tokens=num_tokens)
    given = inputs(call), call.topk_idx, call.topk_weights, *by_rank(call, weights_of(call))
    block = over_ranks(group, functools.partial(jax_ep.moe, group=group))
    cost = jax.jit(lambda *args: block(*args)).lower(*given).compile().cost_analysis()
    return cost["flops"], cost["bytes accessed"]


def test_a_call_costs_what_its_own_tokens_cost(backend):
    """Whatever the group was made for: decode needs no group of its own."""
    costs = []
    for max_tokens in (8, 4096):
        with make_group(PROBLEM.replace(max_tokens_per_rank=max_tokens), backend) as group:
            costs.append(_cost(group, 1))
            assert _cost(group, 8) > costs[-1]
    assert costs[0] == costs[1]


def test_rows_of_another_call_are_refused(backend):
    """Of a prefill, say, with the handle of a decode."""
    few, many = (PROBLEM.replace(num_tokens=n) for n in (1, 4))

    def on_rank(x, idx, x_of_many, idx_of_many):
        rows = jax_ep.dispatch(x_of_many, idx_of_many, group=group).x
        handle = jax_ep.dispatch(x, idx, group=group).handle
        return jax_ep.combine(rows, handle, group=group)

    message = "y is float32[24, 20]; allowed: float32[6, 20], the rows of the handle's dispatch"
    with (
        make_group(PROBLEM, backend) as group,
        pytest.raises(ValueError, match=re.escape(message)),
    ):
        over_ranks(group, on_rank)(few.x, few.topk_idx, many.x, many.topk_idx)


def test_a_layer_gives_a_token_the_same_output_in_any_batch(backend):
    """Prefill and decode through one layer: token by token as all at once, but for rounding."""
    with make_group(PROBLEM.replace(num_ranks=4, dtype="float32"), backend) as group:
        layer = make_nnx(group)
        run = nnx.jit(lambda layer, x: layer(x))
        x = jax.random.normal(jax.random.key(0), (3, 16, 20))
        whole = run(layer, x)
        for position in range(16):
            step = run(layer, x[:, position : position + 1])
            np.testing.assert_allclose(step[:, 0], whole[:, position], rtol=1e-5, atol=1e-5)
