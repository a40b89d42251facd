# SPDX-License-Identifier: Apache-2.0
"""What goes wrong while a program runs: everybody is told, nobody hangs, the next call works."""

import functools
import os
import pathlib
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jax_ep import combine, dispatch
from jax_ep._src import native
from problems import EpProblem
from programs import make_group, make_mesh

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
        for part in ("INVALID_ARGUMENT", "plan: rank 2: topk_idx[1, 1]", text):
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
        assert native.load().num_open_meetings() == 0
        _works(group)
    print("the others were told, and the next call works")


# In a process of its own: JAX reports a failed callback once more when the process ends.
def test_a_rank_that_never_comes_fails_the_others_after_the_deadline():
    here = str(pathlib.Path(__file__).parent)
    path = os.pathsep.join(p for p in [here, *sys.path] if p)
    done = subprocess.run(
        [sys.executable, "-P", "-c", "import conftest, test_failures as t; t._lose_a_rank()"],
        env={**os.environ, "PYTHONPATH": path, "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "the others were told, and the next call works" in done.stdout, done.stderr[-3000:]


def test_the_deadline_error_names_the_missing_rank():
    # Two programs, each on some of the ranks' devices: neither is complete.
    problem = PROBLEM.replace(num_ranks=2, num_experts=2, num_topk=1)
    half = make_mesh((1,), ("expert",))
    with make_group(problem, "ffi", timeout=0.5) as group:
        from jax_ep._src.backends.primitives import plan_p
        from jax_ep._src.spec import OpSpec

        def alone(idx):
            return plan_p.bind(jnp.zeros(2, jnp.int32), idx, spec=OpSpec.of(group))[0]

        mapped = jax.shard_map(
            alone, mesh=half, in_specs=P("expert"), out_specs=P("expert"), check_vma=False
        )
        message = _error_of(jax.jit(mapped), problem.topk_idx[0])
        for part in ("DEADLINE_EXCEEDED", "plan", "rank", "1", "0.5 s", group.name):
            assert part in message, (part, message)
        assert native.load().num_open_meetings() == 0


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
    groups, sites = ext.num_groups(), ext.num_sites()
    for _ in range(3):
        with make_group(PROBLEM, "ffi") as group:
            _works(group)
    del group
    jax.clear_caches()
    gc.collect()
    assert (ext.num_groups(), ext.num_sites()) == (groups, sites)
    assert ext.num_open_meetings() == 0
