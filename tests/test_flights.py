# SPDX-License-Identifier: Apache-2.0
"""What lies between the halves of an exchange: its order, and what goes wrong with it."""

import dataclasses
import functools
import re
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jax_ep
from ep_testing.halves import (
    PROBLEM,
    arguments,
    assert_same_bits,
    block,
    compiled_text,
    num_open,
    pipeline,
    value_and_grads,
)
from ep_testing.programs import make_group, make_mesh, over_ranks

BACKENDS = pytest.mark.parametrize("backend", ["ffi", "xla"])


def _error_of(f, *args) -> str:
    with pytest.raises(jax.errors.JaxRuntimeError) as caught:
        jax.block_until_ready(f(*args))
    return str(caught.value)


def _works(group) -> None:
    """An exchange in halves of `PROBLEM`, and nothing is left of it."""
    got = over_ranks(group, functools.partial(block, group, halves=True))(*arguments(PROBLEM))
    want = over_ranks(group, functools.partial(block, group, halves=False))(*arguments(PROBLEM))
    assert_same_bits(got, want)
    assert num_open(group) == 0


# --- the program -------------------------------------------------------------------------------


def _shared_in_between(group, x, idx, w):
    flight = jax_ep.dispatch_start(x, idx, w, group=group)
    shared = jnp.fft.fft(x)  # of a dtype that nothing else has
    received = jax_ep.dispatch_done(flight, after={"shared": shared}, group=group)
    flight = jax_ep.combine_start(received.x, received.handle, group=group)
    return jax_ep.combine_done(flight, after=shared, group=group)


def test_what_a_half_comes_after_is_an_operand_of_it():
    with make_group(PROBLEM, "ffi") as group:
        text = compiled_text(
            group, functools.partial(_shared_in_between, group), *arguments(PROBLEM)
        )
    calls = dict(re.findall(r'custom-call\((.*?)\), custom_call_target="(jax_ep_\w+)"', text))
    operands = {target: args for args, target in calls.items()}
    assert set(operands) == {
        "jax_ep_dispatch_start", "jax_ep_dispatch_done", "jax_ep_combine_start",
        "jax_ep_combine_done",
    }  # fmt: skip
    (fft,) = re.findall(r"(%\S+) = c64\[\S+ fft\(", text)
    for target, args in operands.items():
        comes_after = fft in args or any(
            re.search(rf"{re.escape(name)} = c64\S+ \w+\({re.escape(fft)}\)", text)
            for name in args.split(", ")
        )
        assert comes_after == target.endswith("_done"), (target, args)
    assert not re.search(r"all-(gather|reduce|to-all)|collective-permute", text)


def test_a_second_half_runs_after_what_it_is_told_to():
    order: dict[int, list[str]] = {rank: [] for rank in range(PROBLEM.num_ranks)}

    def note(what, seconds, rank, value):
        time.sleep(seconds)
        order[int(rank)].append(what)
        return value

    def f(x, idx, w):
        rank = jax.lax.axis_index("expert")
        flight = jax_ep.dispatch_start(x, idx, w, group=group)
        shared = jax.pure_callback(
            functools.partial(note, "shared", 0.2), jax.ShapeDtypeStruct((), jnp.int32), rank, rank
        )
        received = jax_ep.dispatch_done(flight, after=shared, group=group)
        done = jax.pure_callback(
            functools.partial(note, "done", 0),
            jax.ShapeDtypeStruct((), jnp.int32),
            rank,
            received.num_dropped,
        )
        return shared + done

    with make_group(PROBLEM, "ffi") as group:
        jax.block_until_ready(over_ranks(group, f, check_vma=False)(*arguments(PROBLEM)))
    assert all(noted == ["shared", "done"] for noted in order.values()), order


def test_a_first_half_waits_for_no_rank():
    """Each rank's first half returns while the last rank has not begun."""
    begun = []
    all_but_one = threading.Event()

    def before(rank, x):
        if rank == PROBLEM.num_ranks - 1:
            assert all_but_one.wait(timeout=20)
        return x

    def between(rank, ticket):
        begun.append(int(rank))
        if len(begun) == PROBLEM.num_ranks - 1:
            all_but_one.set()
        return ticket

    def f(x, idx, w):
        rank = jax.lax.axis_index("expert")
        x = jax.pure_callback(before, jax.ShapeDtypeStruct(x.shape, x.dtype), rank, x)
        flight = jax_ep.dispatch_start(x, idx, w, group=group)
        passed = jax.pure_callback(
            between, jax.ShapeDtypeStruct((2,), jnp.uint32), rank, flight.ticket
        )
        return jax_ep.dispatch_done(flight, after=passed, group=group).x

    with make_group(PROBLEM, "ffi", timeout=25.0) as group:
        got = over_ranks(group, f, check_vma=False)(*arguments(PROBLEM))
        np.testing.assert_array_equal(got, PROBLEM.dispatched.x)
    assert begun[-1] == PROBLEM.num_ranks - 1


# --- flights that are not finished as they should be ---------------------------------------------


def test_a_flight_that_is_used_twice_is_an_error_that_names_it():
    def f(x, idx, w):
        flight = jax_ep.dispatch_start(x, idx, w, group=group)
        first = jax_ep.dispatch_done(flight, group=group)
        return jax_ep.dispatch_done(flight, after=first.x, group=group).x

    with make_group(PROBLEM, "ffi") as group:
        message = _error_of(over_ranks(group, f), *arguments(PROBLEM))
        assert re.search(r"dispatch_done: flight \d+ was used before, by all ranks", message), (
            message
        )
        _works(group)


def _start_only(group, x, idx, w):
    return jax_ep.dispatch_start(x, idx, w, group=group)


def _done_only(group, flight):
    return jax_ep.dispatch_done(flight, group=group).x


def test_a_flight_crosses_programs_and_is_stale_after_its_use():
    with make_group(PROBLEM, "ffi") as group:
        flight = over_ranks(group, functools.partial(_start_only, group))(*arguments(PROBLEM))
        assert num_open(group) == 1
        done = over_ranks(group, functools.partial(_done_only, group))
        np.testing.assert_array_equal(done(flight), PROBLEM.dispatched.x)
        assert num_open(group) == 0
        message = _error_of(done, flight)
        assert re.search(r"dispatch_done: flight \d+ was used before", message), message
        unknown = dataclasses.replace(flight, ticket=jnp.zeros_like(flight.ticket))
        message = _error_of(done, unknown)
        assert "flight 0 (a number that this process has not given) is not open" in message, message
        _works(group)


def test_a_remat_that_takes_in_a_flight_is_an_error_and_no_old_data():
    """The backward pass runs the second half again, on the flight that was used before."""
    with make_group(PROBLEM, "ffi", timeout=20.0) as group:
        f = functools.partial(pipeline, group, halves=True, remat=True)
        message = _error_of(over_ranks(group, value_and_grads(f)), *arguments(PROBLEM))
        assert re.search(r"dispatch_done: flight \d+ was used before", message), message
        _works(group)


def test_ranks_that_finish_different_flights_are_named():
    def f(x, idx, w):
        a = jax_ep.dispatch_start(x, idx, w, group=group)
        b = jax_ep.dispatch_start(2 * x, idx, w, group=group)
        mine = jnp.where(jax.lax.axis_index("expert") == 2, b.ticket, a.ticket)
        return jax_ep.dispatch_done(dataclasses.replace(a, ticket=mine), group=group).x

    with make_group(PROBLEM, "ffi") as group:
        message = _error_of(over_ranks(group, f), *arguments(PROBLEM))
        pattern = r"ranks disagree: flight is flight \d+ on ranks 0,1,3 and flight \d+ on rank 2"
        assert re.search(pattern, message), message
        _works(group)


def test_a_flight_of_another_operation_is_refused():
    def f(x, idx, w):
        received = jax_ep.dispatch(x, idx, w, group=group)
        combining = jax_ep.combine_start(received.x, received.handle, group=group)
        flight = jax_ep.dispatch_start(x, idx, w, group=group)
        swapped = dataclasses.replace(flight, ticket=combining.ticket)
        return jax_ep.dispatch_done(swapped, after=flight.ticket, group=group).x

    with make_group(PROBLEM, "ffi") as group:
        message = _error_of(over_ranks(group, f), *arguments(PROBLEM))
        assert "is of combine_start; allowed: one of dispatch_start" in message, message
        _works(group)


def test_a_third_flight_waits_up_to_the_deadline():
    def f(x, idx, w):
        flights = [jax_ep.dispatch_start(i * x, idx, w, group=group) for i in range(3)]
        return [jax_ep.dispatch_done(f, after=flights, group=group).x for f in flights]

    with make_group(PROBLEM, "ffi", timeout=1.0) as group:
        start = time.monotonic()
        message = _error_of(over_ranks(group, f), *arguments(PROBLEM))
        assert time.monotonic() - start >= 1.0
        pattern = (
            r"dispatch_start: rank\(s\) 0-3 waited, and within 1 s no open flight ended: "
            r"flight \d+ \(dispatch_start, done by no rank of 4\), flight \d+ \(dispatch_start, "
            r"done by no rank of 4\); at most 2 may be open"
        )
        assert re.search(pattern, message), message
        _works(group)


def test_who_waits_to_begin_is_in_the_groups_health():
    with make_group(PROBLEM, "ffi", timeout=5.0) as group:
        begin = over_ranks(group, functools.partial(_start_only, group))
        for _ in range(2):
            jax.block_until_ready(begin(*arguments(PROBLEM)))
        third = threading.Thread(target=_error_of, args=(begin, *arguments(PROBLEM)))
        third.start()
        deadline = time.monotonic() + 4
        while (health := group.health()).ok and time.monotonic() < deadline:
            time.sleep(0.01)
        assert health.operation == "dispatch_start"
        assert health.waiting_for == (0, 1, 2, 3)
        third.join()
        assert group.health().ok
        _works(group)


def test_closing_the_group_ends_what_was_never_finished():
    with make_group(PROBLEM, "ffi") as group:
        begin = over_ranks(group, functools.partial(_start_only, group))
        flight = jax.block_until_ready(begin(*arguments(PROBLEM)))
        done = over_ranks(group, functools.partial(_done_only, group))
        assert num_open(group) == 1
        compiled = jax.jit(done).lower(flight).compile()
    assert num_open(group) == 0
    message = _error_of(compiled, flight)
    assert "of this dispatch_done has been closed" in message, message
    with make_group(PROBLEM, "ffi") as group:
        _works(group)
        message = _error_of(over_ranks(group, functools.partial(_done_only, group)), flight)
        assert "is of another group, program or process" in message, message


def test_an_error_of_the_second_half_ends_the_flight():
    idx = PROBLEM.topk_idx.copy()
    idx[2, 1, 1] = 8
    with make_group(PROBLEM, "ffi") as group:
        program = over_ranks(group, functools.partial(block, group, halves=True))
        message = _error_of(program, PROBLEM.x, idx, PROBLEM.topk_weights)
        assert "dispatch_done: rank 2: topk_idx[1, 1] is 8" in message, message
        _works(group)


def test_an_error_elsewhere_in_the_program_ends_its_flights():
    """Else each failed program would keep a flight open that nobody can finish."""
    idx = PROBLEM.topk_idx.copy()
    idx[0, 0, 0] = 99

    def f(x, idx, bad, w):
        flight = jax_ep.dispatch_start(x, idx, w, group=group)
        fails = jax_ep.dispatch(x + flight.ticket[0].astype(x.dtype), bad, w, group=group)
        return jax_ep.dispatch_done(flight, after=fails, group=group).x

    with make_group(PROBLEM, "ffi") as group:
        for _ in range(3):
            message = _error_of(
                over_ranks(group, f), PROBLEM.x, PROBLEM.topk_idx, idx, PROBLEM.topk_weights
            )
            assert "topk_idx[0, 0] is 99" in message, message
        _works(group)


# --- several at once ---------------------------------------------------------------------------


def test_two_groups_interleave():
    other = PROBLEM.replace(hidden=20, seed=3, layout="rank")

    def f(first, second):
        a = jax_ep.dispatch_start(*first, group=group)
        b = jax_ep.dispatch_start(*second, group=other_group)
        c = jax_ep.dispatch_start(*first, group=group)
        got_b = jax_ep.dispatch_done(b, after=(a, c), group=other_group)
        got_a = jax_ep.dispatch_done(a, after=got_b.x, group=group)
        return got_a.x, got_b.x, jax_ep.dispatch_done(c, group=group).x

    with make_group(PROBLEM, "ffi") as group, make_group(other, "ffi") as other_group:
        a, b, c = over_ranks(group, f)(arguments(PROBLEM), arguments(other))
    np.testing.assert_array_equal(a, PROBLEM.dispatched.x)
    np.testing.assert_array_equal(b, other.dispatched.x)
    np.testing.assert_array_equal(c, PROBLEM.dispatched.x)


def test_many_threads_and_launches():
    """Four threads, which keep 28 launches unfinished: XLA takes 32 on a device at a time."""
    errors = []
    mesh = make_mesh((2, 4), ("data", "expert"))

    def f(scale, x, idx, w):
        return block(group, x * scale[0, 0], idx, w, halves=True)

    def launch(thread):
        scales = [np.full((8, 1), thread * 7 + i, np.float32) for i in range(7)]
        outs = [program(scale, *args) for scale in scales]
        for scale, out in zip(scales, outs, strict=True):
            if not np.array_equal(out, plain(scale, *args)):
                errors.append(scale[0])

    spec = P(("data", "expert"))
    args = [np.concatenate([a, a]).reshape(-1, a.shape[-1]) for a in arguments(PROBLEM)]
    with make_group(PROBLEM, "ffi", mesh=mesh, timeout=25.0) as group:

        def g(scale, x, idx, w):
            return block(group, x * scale[0, 0], idx, w, halves=False)

        program, plain = (
            jax.jit(jax.shard_map(h, mesh=mesh, in_specs=spec, out_specs=spec)) for h in (f, g)
        )
        threads = [threading.Thread(target=launch, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors
        assert num_open(group) == 0


# --- arguments ---------------------------------------------------------------------------------


def _on_ranks(group, f):
    return lambda: over_ranks(group, f)(*arguments(PROBLEM))


@BACKENDS
def test_bad_arguments_are_named(backend):
    other = PROBLEM.replace(num_experts=12)
    with make_group(PROBLEM, backend) as group, make_group(other, backend) as other_group:

        def done(flight_of, after=None, done_group=group):
            def f(x, idx, w):
                flight = flight_of(x, idx, w)
                return jax_ep.dispatch_done(flight, after=after, group=done_group).x

            return _on_ranks(group, f)

        def start(x, idx, w):
            return jax_ep.dispatch_start(x, idx, w, group=group)

        cases = {
            "flight is a tuple; allowed: the DispatchFlight that dispatch_start": done(
                lambda x, idx, w: (x, idx)
            ),
            "flight is of a dispatch_start with 4 ranks": done(start, done_group=other_group),
            r"after\['f'\] is a function; allowed: a pytree of arrays": done(
                start, after={"f": lambda x: x}
            ),
            "x is float16.*; allowed: float32": done(
                lambda x, idx, w: start(x.astype(jnp.float16), idx, w)
            ),
        }
        for message, program in cases.items():
            with pytest.raises(ValueError, match=message):
                program()

        def combine(x, idx, w):
            received = jax_ep.dispatch(x, idx, w, group=group)
            flight = jax_ep.combine_start(received.x[1:], received.handle, group=group)
            return jax_ep.combine_done(flight, group=group)

        with pytest.raises(ValueError, match=r"y is float32.*; allowed: float32"):
            _on_ranks(group, combine)()
        with pytest.raises(ValueError, match=r"dispatch_start must be called inside jax.shard_map"):
            start(*(a[0] for a in arguments(PROBLEM)))
        with pytest.raises(ValueError, match=r"combine_done must be called inside jax.shard_map"):
            jax_ep.combine_done(None, group=group)
    with pytest.raises(jax_ep.EpGroupClosed):
        start(*(a[0] for a in arguments(PROBLEM)))


def test_a_flight_of_another_backend_is_refused():
    with make_group(PROBLEM, "ffi") as ffi, make_group(PROBLEM, "xla") as xla:

        def f(x, idx, w):
            flight = jax_ep.dispatch_start(x, idx, w, group=ffi)
            return jax_ep.dispatch_done(flight, group=xla).x

        with pytest.raises(ValueError, match="by another backend; this group's is 'xla'"):
            over_ranks(ffi, f)(*arguments(PROBLEM))
