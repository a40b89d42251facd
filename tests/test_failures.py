# SPDX-License-Identifier: Apache-2.0
"""What goes wrong while a program runs: everybody is told, nobody hangs, the next call works."""

import functools
import logging
import os
import pathlib
import re
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from ep_testing.problems import EpProblem
from ep_testing.programs import make_group, make_mesh
from jax_ep import EpHealth, combine, dispatch
from jax_ep._src.groups import native

PROBLEM = EpProblem(name="failures", num_ranks=4, num_tokens=3, num_topk=2, num_experts=8)


def _global(array):
    return array.reshape(-1, array.shape[-1])


def _mapped(f, group):
    spec = P(group.axis_name)
    return jax.jit(jax.shard_map(f, mesh=group.mesh, in_specs=spec, out_specs=spec))


def _round_trip(x, idx, *, group):
    received = dispatch(x, idx, group=group)
    return combine(received.x, received.handle, group=group)


def _error_of(f, *args) -> str:
    with pytest.raises(jax.errors.JaxRuntimeError) as caught:
        jax.block_until_ready(f(*args))
    return str(caught.value)


def _works(group) -> None:
    x, idx = _global(PROBLEM.x), _global(PROBLEM.topk_idx)
    got = _mapped(functools.partial(_round_trip, group=group), group)(x, idx)
    np.testing.assert_allclose(got, PROBLEM.num_topk * x)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (8, "topk_idx[1, 1] is 8, but must be -1 (no selection) or an expert in [0, 8)"),
        (-2, "topk_idx[1, 1] is -2, but must be -1 (no selection) or an expert in [0, 8)"),
        ("duplicate", "and so is topk_idx[1, 0]: the experts of a token must be distinct"),
    ],
)
def test_bad_routing_is_an_error_that_names_where(value, text):
    idx = PROBLEM.topk_idx.copy()
    idx[2, 1, 1] = idx[2, 1, 0] if value == "duplicate" else value
    with make_group(PROBLEM, "ffi") as group:
        program = _mapped(functools.partial(_round_trip, group=group), group)
        message = _error_of(program, _global(PROBLEM.x), _global(idx))
        for part in ("INVALID_ARGUMENT", "plan_dispatch: rank 2: topk_idx[1, 1]", text):
            assert part in message, message
        _works(group)


def _with_lost_rank(x, idx, *, group, lost):
    """A program in which the host code of one rank fails before it reaches the dispatch."""

    def host(x, rank):
        if rank == lost:
            raise RuntimeError("the data of this rank is gone")
        return x

    rank = jax.lax.axis_index(group.axis_names)
    x = jax.pure_callback(host, jax.ShapeDtypeStruct(x.shape, x.dtype), x, rank)
    return _round_trip(x, idx, group=group)


def _run_with_lost_rank(group, lost: int) -> list[str]:
    """The errors of all ranks' shards."""
    spec = P("expert")
    program = jax.jit(
        jax.shard_map(
            functools.partial(_with_lost_rank, group=group, lost=lost),
            mesh=group.mesh,
            in_specs=spec,
            out_specs=spec,
            check_vma=False,
        )
    )
    errors = []
    try:
        out = program(_global(PROBLEM.x), _global(PROBLEM.topk_idx))
        shards = [s.data for s in out.addressable_shards]
    except jax.errors.JaxRuntimeError as e:
        return [str(e)]
    for shard in shards:
        try:
            shard.block_until_ready()
        except jax.errors.JaxRuntimeError as e:
            errors.append(str(e))
    return errors


def _lose_a_rank() -> None:
    with make_group(PROBLEM, "ffi", timeout=1.0) as group:
        start = time.monotonic()
        errors = _run_with_lost_rank(group, lost=3)
        took = time.monotonic() - start
        assert errors
        assert took < 30
        # Whichever rank's error JAX shows, it is the callback's own or one that names rank 3.
        for error in errors:
            assert "is gone" in error or ("3" in error and "DEADLINE_EXCEEDED" in error), error
        assert native.load().num_pending() == 0
        _works(group)
    print("the others were told, and the next call works")


def _child_env() -> dict[str, str]:
    here = str(pathlib.Path(__file__).parent)
    path = os.pathsep.join(p for p in [here, *sys.path] if p)
    return {**os.environ, "PYTHONPATH": path, "XLA_FLAGS": ""}


# In a process of its own: JAX reports a failed callback once more when the process ends.
def _run_alone(function: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-c", f"import conftest, test_failures as t; t.{function}()"],
        env=_child_env(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_rank_that_never_comes_fails_the_others_after_the_deadline():
    done = _run_alone("_lose_a_rank")
    assert "the others were told, and the next call works" in done.stdout, done.stderr[-3000:]


def test_the_deadline_error_names_the_missing_rank():
    # Two programs, each on some of the ranks' devices: neither is complete.
    problem = PROBLEM.replace(num_ranks=2, num_experts=2, num_topk=1)
    half = make_mesh((1,), ("expert",))
    with make_group(problem, "ffi", timeout=0.5) as group:
        from jax_ep._src.backends.ffi.primitives import bind, plan_p
        from jax_ep._src.backends.operands import PlanOperands
        from jax_ep._src.spec import OpSpec

        def alone(idx):
            operands = PlanOperands(jnp.zeros(1, jnp.int32), idx)
            return bind(plan_p, operands, spec=OpSpec.of(group, num_tokens=idx.shape[0])).plan.slot

        mapped = jax.shard_map(
            alone, mesh=half, in_specs=P("expert"), out_specs=P("expert"), check_vma=False
        )
        message = _error_of(jax.jit(mapped), problem.topk_idx[0])
        for part in ("DEADLINE_EXCEEDED", "plan", "rank", "1", "0.5 s", group.name):
            assert part in message, (part, message)
        assert native.load().num_pending() == 0


# --- what the log is told, before anybody reads a result ------------------------------------------

# XLA ends a process 60 s after a collective of its own lacks a device, and no result is ever read.
HANGS = """
import conftest, functools, jax, numpy as np, sys
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import test_failures as t
from ep_testing.programs import make_group, make_mesh

mesh = make_mesh((2, 4), ("data", "expert"))
group = make_group(t.PROBLEM, "ffi", mesh=mesh, timeout=2.0)
x = np.tile(t._global(t.PROBLEM.x), (2, 1))
idx = np.tile(t._global(t.PROBLEM.topk_idx), (2, 1))

def bad_routing_in_one_group(x, idx):
    return jax.lax.psum(t._round_trip(x, idx, group=group), "data")

def a_rank_that_does_not_come(x, idx):
    rank = jax.lax.axis_index("expert")
    y = jax.lax.cond(rank != 2, lambda: t._round_trip(x, idx, group=group), lambda: x)
    return jax.lax.psum(y, "expert")

if sys.argv[1] == "bad_routing_in_one_group":
    idx[7, 1] = 8  # data 0, rank 2, token 1
spec = P(("data", "expert"))
f = jax.shard_map(globals()[sys.argv[1]], mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
jax.block_until_ready(jax.jit(f)(x, idx))
"""


@pytest.mark.parametrize(
    ("program", "words"),
    [
        (
            "bad_routing_in_one_group",
            "group_index 0, plan_dispatch: rank 2: topk_idx[1, 1] is 8, but must",
        ),
        ("a_rank_that_does_not_come", "rank(s) 2 of 4 did not reach this plan_dispatch within 2 s"),
    ],
)
def test_an_error_is_logged_though_xla_hangs_behind_it(program, words):
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", HANGS, program],
        env=_child_env(),
        stderr=subprocess.PIPE,
        text=True,
    )
    begin = time.monotonic()
    try:
        assert any(words in line for line in process.stderr)
    finally:
        process.kill()
        process.communicate()
    assert time.monotonic() - begin < 55  # it came before XLA's end


def _with_slow_rank(x, idx, *, group, slow, until):
    """A program in which the host code of one rank waits for an event before its dispatch."""

    def host(x, rank):
        if rank == slow:
            assert until.wait(60)
        return x

    rank = jax.lax.axis_index(group.axis_names)
    x = jax.pure_callback(host, jax.ShapeDtypeStruct(x.shape, x.dtype), x, rank)
    return _round_trip(x, idx, group=group)


def _start_with_slow_rank(group, until):
    """Launches the program; rank 3 is the slow one."""
    spec = P("expert")
    program = jax.jit(
        jax.shard_map(
            functools.partial(_with_slow_rank, group=group, slow=3, until=until),
            mesh=group.mesh,
            in_specs=spec,
            out_specs=spec,
            check_vma=False,
        )
    )
    return program(_global(PROBLEM.x), _global(PROBLEM.topk_idx))


def _wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_late_rank_is_logged_and_seen_in_the_groups_health(caplog):
    until = threading.Event()
    with (
        caplog.at_level(logging.INFO, logger="jax_ep"),
        make_group(PROBLEM, "ffi", warn_after=0.1, timeout=60) as group,
    ):
        assert group.health() == EpHealth()
        assert group.health().ok
        out = _start_with_slow_rank(group, until)
        _wait_for(lambda: group.health().waiting_for == (3,))
        health = group.health()
        assert not health.ok
        assert (health.operation, health.group_index) == ("plan_dispatch", 0)
        assert health.root.startswith("rank 3 (device 3) is in no operation of an EP group")
        _wait_for(lambda: sum("have waited" in r.message for r in caplog.records) >= 2)
        until.set()
        jax.block_until_ready(out)
        _wait_for(lambda: "came after" in caplog.records[-1].message)
        assert group.health().ok
        seen = [(r.levelname, r.message) for r in caplog.records if group.name in r.message]
    level, text = seen[0]
    assert level == "WARNING"
    assert f"{group.name}, group_index 0, plan_dispatch: rank(s) 0-2 of 4 have waited 0." in text
    assert "for rank(s) 3; rank 3 (device 3) is in no operation" in text
    assert text.endswith("Giving up after 60 s")
    assert seen[-1][0] == "INFO"
    assert "plan_dispatch: rank(s) 3 came after" in seen[-1][1]


def _close_while_ranks_wait() -> None:
    until = threading.Event()
    group = make_group(PROBLEM, "ffi", timeout=60)
    out = _start_with_slow_rank(group, until)
    _wait_for(lambda: len(group.health().waiting_for) == 1)
    begin = time.monotonic()
    native.load().close_group(group.group_id)  # as close(), which would wait for `out`
    assert group.health().ok  # nobody waits any more
    until.set()
    message = _error_of(lambda: out)
    assert "FAILED_PRECONDITION" in message, message
    assert time.monotonic() - begin < 30
    print("told at once")


def test_close_fails_the_ranks_that_wait_for_one_that_will_be_refused():
    done = _run_alone("_close_while_ranks_wait")
    assert "told at once" in done.stdout, done.stderr[-3000:]
    words = "plan_dispatch: the group was closed while rank(s) 0-2 waited for rank(s) 3 of 4"
    assert words in done.stderr, done.stderr[-3000:]


def test_a_program_on_another_mesh_than_the_groups_is_refused():
    with make_group(PROBLEM, "ffi", timeout=30) as group:
        turned = make_mesh((4,), ("expert",), order=[1, 0, 2, 3])
        other = make_mesh((4,), ("expert",), order=[4, 5, 6, 7])
        args = _global(PROBLEM.x), _global(PROBLEM.topk_idx)
        for mesh, words in (
            (turned, r"as rank (1 on a device that is rank 0|0 on a device that is rank 1) of"),
            (other, rf"{re.escape(group.name)} has no rank on CPU device [4-7], which runs"),
        ):
            f = jax.shard_map(
                functools.partial(_round_trip, group=group),
                mesh=mesh,
                in_specs=P("expert"),
                out_specs=P("expert"),
            )
            message = _error_of(jax.jit(f), *args)
            assert "on the mesh that the group was made for" in message
            assert re.search(words, message), message


def _messages_of(group, caplog) -> list[str]:
    """What was logged of the group; a notice of the test before may come late."""
    texts = [record.getMessage() for record in caplog.records]
    return [text for text in texts if group.name in text]


def test_a_device_without_a_rank_ends_the_others_at_once(caplog):
    with make_group(PROBLEM, "ffi", timeout=30) as group:
        f = jax.shard_map(
            functools.partial(_round_trip, group=group),
            mesh=make_mesh((4,), ("expert",), order=[0, 1, 2, 7]),
            in_specs=P("expert"),
            out_specs=P("expert"),
        )
        program = jax.jit(f)
        words = f"{group.name} has no rank on CPU device 7, which runs its plan_dispatch"
        start = time.monotonic()
        for _ in range(3):
            assert words in _error_of(program, _global(PROBLEM.x), _global(PROBLEM.topk_idx))
        assert time.monotonic() - start < 20
        _wait_for(lambda: len(_messages_of(group, caplog)) >= 3)
        assert [words in text for text in _messages_of(group, caplog)] == [True] * 3
        right = _mapped(functools.partial(_round_trip, group=group), group)
        jax.block_until_ready(right(_global(PROBLEM.x), _global(PROBLEM.topk_idx)))


def test_a_log_handler_that_raises_loses_its_own_notice_alone(caplog, capfd):
    class Broken(logging.Handler):
        def emit(self, record):
            raise OSError("the disk is full")

    logger = logging.getLogger("jax_ep")
    with make_group(PROBLEM, "ffi", timeout=30) as group:
        program = _mapped(functools.partial(_round_trip, group=group), group)
        bad = np.full_like(_global(PROBLEM.topk_idx), PROBLEM.num_experts)
        broken = Broken()
        logger.addHandler(broken)
        try:
            _error_of(program, _global(PROBLEM.x), bad)
            _wait_for(lambda: "the disk is full" in capfd.readouterr().err)
        finally:
            logger.removeHandler(broken)
        caplog.clear()
        _error_of(program, _global(PROBLEM.x), bad)
        _wait_for(lambda: any("topk_idx" in r.getMessage() for r in caplog.records))


def test_a_compiled_function_of_a_closed_group_says_so():
    group = make_group(PROBLEM, "ffi")
    program = _mapped(functools.partial(_round_trip, group=group), group)
    args = _global(PROBLEM.x), _global(PROBLEM.topk_idx)
    jax.block_until_ready(program(*args))
    group.close()
    message = _error_of(program, *args)
    assert "has been closed" in message, message


def test_close_waits_for_programs_in_flight():
    group = make_group(PROBLEM, "ffi")
    program = _mapped(functools.partial(_round_trip, group=group), group)
    args = _global(PROBLEM.x), _global(PROBLEM.topk_idx)
    outs = [program(*args) for _ in range(20)]
    group.close()
    for out in outs:
        np.testing.assert_allclose(out, PROBLEM.num_topk * args[0])


def test_nothing_is_left_after_groups_and_programs_are_gone():
    import gc

    ext = native.load()
    jax.clear_caches()
    gc.collect()
    groups, sites = ext.num_groups(), ext.num_call_sites()
    for _ in range(3):
        with make_group(PROBLEM, "ffi") as group:
            _works(group)
    del group
    jax.clear_caches()
    gc.collect()
    assert (ext.num_groups(), ext.num_call_sites()) == (groups, sites)
    assert ext.num_pending() == 0
