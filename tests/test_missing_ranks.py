# SPDX-License-Identifier: Apache-2.0
"""`EpGroup(on_timeout="mask")`: ranks that do not come, against the oracle."""

import logging
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_ep
from ep_testing import assertions, halves
from ep_testing.missing_ranks import (
    NEVER,
    PROBLEM,
    SOON,
    came,
    check,
    expert_outputs,
    masking_group,
    missing_of,
    only_if,
    round_trip,
    run_without,
)
from ep_testing.problems import PROBLEMS
from ep_testing.programs import make_mesh, over_ranks
from jax_ep import reference
from jax_ep._src.groups import native

CASES = {
    "expert": PROBLEM,
    "rank": PROBLEM.replace(layout="rank"),
    "drops": PROBLEM.replace(recv_capacity=6, expert_alignment=2),
    "fp8_rows": PROBLEMS["fp8_rows"],
    "domains": PROBLEM.replace(domain_size=2, dtype="bfloat16"),
    "padded": PROBLEM.replace(num_experts=15, pad_experts=True),
}


@pytest.mark.parametrize("case", CASES)
def test_one_rank_is_missing(case):
    problem = CASES[case]
    here = came(problem, 1)
    outs, took = run_without(problem, here)
    assert took > SOON
    check(problem, outs, here)


def test_two_ranks_are_missing():
    here = came(PROBLEM, 2, 7)
    outs, _ = run_without(PROBLEM, here)
    check(PROBLEM, outs, here)
    received = outs[0]
    assert received.missing_ranks[0].tolist() == [r in (2, 7) for r in range(8)]
    # Rows are whole or zero.
    for rank in np.flatnonzero(here):
        is_empty = np.asarray(received.handle.row_source[rank]) < 0
        assert not np.asarray(received.x)[rank][is_empty].any()
        assert not np.asarray(received.weights)[rank][is_empty].any()


def test_all_ranks_are_there():
    here = came(PROBLEM)
    outs, took = run_without(PROBLEM, here, timeout=NEVER)
    assert took < 60
    check(PROBLEM, outs, here)
    assert not outs[0].missing_ranks.any()


@pytest.mark.parametrize("absent", [(1,), (3, 5)])
def test_ranks_that_are_left_out_are_not_missing(absent):
    """With a mask that leaves out rank 5, which makes the call or does not."""
    mask = came(PROBLEM, 5)
    here = came(PROBLEM, *absent)
    outs, _ = run_without(PROBLEM, here, mask)
    met = here & mask
    check(PROBLEM, outs, met, mask)
    if here[5]:  # alone, with nothing
        assert not np.asarray(outs[0].x)[5].any()
        assert not outs[0].missing_ranks[5].any()
        assert not np.asarray(outs[1][0])[5].any()


def test_a_late_rank_has_what_it_brings_itself():
    """It comes while the others are in a second exchange, which is left alone."""
    problem = PROBLEM.replace(num_ranks=4, num_experts=8)
    with masking_group(problem) as group:
        first_is_over = threading.Event()

        def wait(x, rank):
            if rank == 2:
                assert first_is_over.wait(60)
            return x

        def note(x, rank):
            if rank == 0:
                first_is_over.set()
            return x

        def on_rank(x, idx, w, y):
            rank, shape = jax.lax.axis_index("expert"), jax.ShapeDtypeStruct(x.shape, x.dtype)
            x = jax.pure_callback(wait, shape, x, rank)
            first = round_trip(group, x, idx, w, y)
            again = jax.pure_callback(note, shape, x + 0 * first[1][0], rank)
            return first, round_trip(group, again, idx, w, y)

        args = (*halves.arguments(problem), expert_outputs(problem))
        first, second = jax.tree.map(np.asarray, over_ranks(group, on_rank, check_vma=False)(*args))
    here = came(problem, 2)
    check(problem, first, here)
    missing = missing_of(here)
    assert first[0].missing_ranks[2].tolist() == [True, True, False, True]
    want = reference.dispatch(
        problem.x, problem.topk_idx, problem.topk_weights, **problem.dispatch_kwargs(),
        missing=missing,
    )  # fmt: skip
    np.testing.assert_array_equal(first[0].x[2], want.x[2])
    # Whoever was in time for the second exchange has all of it.
    check(problem, second, ~second[0].missing_ranks[0])


def test_a_rank_that_was_there_is_missing_in_combine():
    here = came(PROBLEM, 4)
    missing = missing_of(here)
    with masking_group(PROBLEM) as group:

        def on_rank(here, x, idx, w, y):
            recv = jax_ep.dispatch(x, idx, w, group=group)

            def combine(y, handle, weights):
                return jax_ep.combine_with_status(y, handle, weights, group=group)

            return recv, only_if(here, combine, y, recv.handle, recv.weights)

        y = expert_outputs(PROBLEM)
        received, (out, lost) = jax.tree.map(
            np.asarray,
            over_ranks(group, on_rank, check_vma=False)(here, *halves.arguments(PROBLEM), y),
        )
    want = reference.dispatch(
        PROBLEM.x, PROBLEM.topk_idx, PROBLEM.topk_weights, **PROBLEM.dispatch_kwargs()
    )
    assert not received.missing_ranks.any()
    np.testing.assert_array_equal(received.handle.slot, want.plan.slot)
    np.testing.assert_array_equal(lost[here], missing[here])
    sums = reference.combine(y, want.plan, want.weights, dtype=np.float32, missing=missing)
    np.testing.assert_array_equal(assertions.bits(out[here]), assertions.bits(sums[here]))
    whole = reference.combine(y, want.plan, want.weights, dtype=np.float32)
    assert (sums[here] != whole[here]).any()


def test_later_calls_are_right():
    with masking_group(PROBLEM) as group:

        def on_rank(here, *args):
            return only_if(here, lambda *args: round_trip(group, *args), *args)

        program = over_ranks(group, on_rank, check_vma=False)
        args = (*halves.arguments(PROBLEM), expert_outputs(PROBLEM))
        for absent in [(), (4,), (), (0, 1), ()]:
            here = came(PROBLEM, *absent)
            check(PROBLEM, jax.tree.map(np.asarray, program(here, *args)), here)
        assert native.load().num_pending() == 0


def test_masks_are_carried_through_layers():
    """A rank that goes missing in the first layer costs one timeout, and not one a layer."""
    here = came(PROBLEM, 3)
    timeout = 3.0
    with masking_group(PROBLEM, timeout=timeout) as group:

        def on_rank(here, x, idx, w):
            def layers(x, idx, w):
                alive, lost, outs = jnp.ones(8, bool), [], []
                for _ in range(3):
                    recv = jax_ep.dispatch(x, idx, w, group=group, rank_mask=alive)
                    out, missing = jax_ep.combine_with_status(
                        jnp.sin(recv.x), recv.handle, recv.weights, group=group
                    )
                    lost.append(recv.missing_ranks | missing)
                    alive = alive & ~recv.missing_ranks & ~missing
                    outs.append(out)
                    x = jnp.cos(out)
                return jnp.stack(lost), jnp.stack(outs), alive

            return only_if(here, layers, x, idx, w)

        program = over_ranks(group, on_rank, check_vma=False)
        jax.block_until_ready(program(came(PROBLEM), *halves.arguments(PROBLEM)))  # compiled
        began = time.monotonic()
        lost, outs, alive = jax.tree.map(np.asarray, program(here, *halves.arguments(PROBLEM)))
        assert timeout <= time.monotonic() - began < 2 * timeout
    np.testing.assert_array_equal(alive[here], np.broadcast_to(here, (7, 8)))
    np.testing.assert_array_equal(lost[here, 0], np.broadcast_to(~here, (7, 8)))
    assert not lost[here, 1:].any()
    x = PROBLEM.x
    for layer in range(3):
        want = reference.dispatch(
            x, PROBLEM.topk_idx, PROBLEM.topk_weights, **PROBLEM.dispatch_kwargs(), rank_mask=here
        )
        sums = reference.combine(np.sin(want.x), want.plan, want.weights, dtype=np.float32)
        got = outs[:, layer]
        np.testing.assert_allclose(got[here], sums[here], rtol=1e-5, atol=1e-5)
        x = np.cos(got)


def test_nobody_waits_for_a_rank_that_is_given_up(caplog):
    """Against a timeout that never comes; and the next call does not wait at all."""
    here = came(PROBLEM, 6)
    with masking_group(PROBLEM, timeout=NEVER) as group:

        def on_rank(here, *args):
            return only_if(here, lambda *args: round_trip(group, *args), *args)

        program = over_ranks(group, on_rank, check_vma=False)
        args = (*halves.arguments(PROBLEM), expert_outputs(PROBLEM))
        outs = program(here, *args)
        while group.health().waiting_for != (6,):
            time.sleep(0.01)
        assert group.health().operation == "plan_dispatch"
        time.sleep(0.2)
        assert group.health().waiting_for == (6,)
        began = time.monotonic()
        with caplog.at_level(logging.WARNING, logger="jax_ep"):
            group.give_up_on([6])
        outs = jax.tree.map(np.asarray, outs)
        assert time.monotonic() - began < 10
        assert "given up on rank(s) 6" in caplog.text
        check(PROBLEM, outs, here)
        assert group.health().ok
        began = time.monotonic()
        check(PROBLEM, jax.tree.map(np.asarray, program(here, *args)), here)
        assert time.monotonic() - began < 10


def test_a_rank_is_given_up_while_its_group_is_being_closed():
    """Closing waits for results that somebody holds, and they for a rank that does not come."""
    here = came(PROBLEM, 6)
    with masking_group(PROBLEM, timeout=NEVER) as group:

        def on_rank(here, *args):
            return only_if(here, lambda *args: round_trip(group, *args), *args)

        program = over_ranks(group, on_rank, check_vma=False)
        outs = program(here, *halves.arguments(PROBLEM), expert_outputs(PROBLEM))
        closing = threading.Thread(target=group.close)
        closing.start()
        while not group.closed or group.health().waiting_for != (6,):
            time.sleep(0.01)
        group.give_up_on([6])
        closing.join(timeout=60)
        assert not closing.is_alive()
        check(PROBLEM, jax.tree.map(np.asarray, outs), here)
        assert group.health().ok
        with pytest.raises(jax_ep.EpGroupClosed):
            group.give_up_on([6])


def test_a_rank_is_given_up_in_one_of_several_groups():
    problem = PROBLEM.replace(num_ranks=4, num_experts=8)
    mesh = make_mesh((2, 4), ("data", "expert"))
    with masking_group(problem, mesh=mesh, timeout=NEVER) as group:
        assert not native.load().num_pending()
        group.give_up_on([2], group_index=1)
        group.give_up_on((np.int64(3),), group_index=0)

        def on_rank(x, idx):
            data, rank = jax.lax.axis_index("data"), jax.lax.axis_index("expert")

            def exchange(x, idx):
                return jax_ep.dispatch(x, idx, group=group).missing_ranks

            is_here = rank != jnp.where(data == 0, 3, 2)
            return only_if(is_here, exchange, x[0, 0], idx[0, 0])[None, None]

        spec = jax.sharding.PartitionSpec("data", "expert")
        program = jax.shard_map(on_rank, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
        both = [np.stack([a, a]) for a in (problem.x, problem.topk_idx)]
        missing = np.asarray(jax.jit(program)(*both))
    assert missing[0, :3].tolist() == [[False, False, False, True]] * 3
    assert missing[1, [0, 1, 3]].tolist() == [[False, False, True, False]] * 3
