# SPDX-License-Identifier: Apache-2.0
"""Ranks meet the right partners: many calls in flight, few cores, any order of execution."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jax_ep
from ep_testing.problems import EpProblem
from ep_testing.programs import make_group, make_mesh

WIDTH = 128


def _problem(ranks: int) -> EpProblem:
    return EpProblem(
        name="ring", num_ranks=ranks, num_tokens=2, hidden=WIDTH, num_topk=1, num_experts=ranks
    )


def _ring(x, *, group, shift=1):
    """Every token of rank r goes to rank r + shift and comes back times that rank's number."""
    rank = jax.lax.axis_index(group.axis_names)
    idx = jnp.full((x.shape[0], 1), (rank + shift) % group.num_ranks, jnp.int32)
    received = jax_ep.dispatch(x, idx, group=group)
    return jax_ep.combine(received.x * rank.astype(x.dtype), received.handle, group=group)


def _expected(x, ranks, copies=1, shift=1):
    factor = np.tile((np.arange(ranks) + shift) % ranks, copies)
    return x * np.repeat(factor, 2)[:, None].astype(np.float32)


def _independent_branches(ranks: int, num_branches: int = 6) -> None:
    """Branches whose inputs become ready in any order, through one inner jit."""
    group = make_group(_problem(ranks), "ffi", timeout=30)
    ring = jax.jit(functools.partial(_ring, group=group))

    def on_rank(x, kernel):
        outs = []
        for branch in range(num_branches):
            h = x + branch
            for _ in range(1 + (branch * 5) % 4):
                h = h @ kernel
            outs.append(ring(h))
        return jnp.stack(outs)

    mapped = jax.jit(
        jax.shard_map(
            on_rank, mesh=group.mesh, in_specs=(P("expert"), P()), out_specs=P(None, "expert")
        )
    )
    x = np.random.default_rng(0).integers(-3, 4, (2 * ranks, WIDTH)).astype(np.float32)
    for step in range(5):
        got = np.asarray(mapped(x + step, np.eye(WIDTH, dtype=np.float32)))
        for branch in range(num_branches):
            np.testing.assert_array_equal(got[branch], _expected(x + step + branch, ranks))
    group.close()


@pytest.mark.parametrize("ranks", [8, 16])
def test_six_independent_branches_through_one_inner_jit(ranks):
    _independent_branches(ranks)


def _overlapping_launches(num_launches: int = 200) -> None:
    mesh = make_mesh((2, 4), ("data", "expert"))
    with make_group(_problem(4), "ffi", mesh=mesh, timeout=30) as group:
        spec = P(("data", "expert"))
        rings = [
            jax.jit(
                jax.shard_map(
                    functools.partial(_ring, group=group, shift=shift),
                    mesh=mesh,
                    in_specs=spec,
                    out_specs=spec,
                )
            )
            for shift in (1, 2)
        ]
        x = np.random.default_rng(1).integers(-3, 4, (16, WIDTH)).astype(np.float32)
        launched = [rings[i % 2](x + i) for i in range(num_launches)]
        for i, got in enumerate(launched):
            want = _expected(x + i, 4, copies=2, shift=1 + i % 2)
            np.testing.assert_array_equal(got, want)


def test_two_hundred_overlapping_launches_on_a_data_x_expert_mesh():
    _overlapping_launches()


def test_mixed_with_collectives_of_xla():
    with make_group(_problem(8), "ffi", timeout=30) as group:

        def on_rank(x):
            for _ in range(3):
                total = jax.lax.psum(x, "expert")
                x = _ring(x, group=group) + total
                x = x + jnp.sum(jax.lax.all_gather(x, "expert"), axis=0)
            return x

        def dense(x):
            for _ in range(3):
                total = x.reshape(8, 2, -1).sum(0)
                x = _expected(x, 8) + np.tile(total, (8, 1))
                x = x + np.tile(x.reshape(8, 2, -1).sum(0), (8, 1))
            return x

        mapped = jax.jit(
            jax.shard_map(on_rank, mesh=group.mesh, in_specs=P("expert"), out_specs=P("expert"))
        )
        x = np.random.default_rng(2).integers(-3, 4, (16, WIDTH)).astype(np.float32)
        launched = [mapped(x + i) for i in range(10)]
        for i, got in enumerate(launched):
            np.testing.assert_array_equal(got, dense(x + i))


def test_two_groups_of_different_configs_in_one_program():
    wide, narrow = _problem(8), _problem(4).replace(num_experts=8, num_topk=1)
    mesh = make_mesh((2, 4), ("data", "expert"))
    with (
        make_group(wide, "ffi", mesh=mesh, axis_name=("data", "expert")) as all_ranks,
        make_group(narrow, "ffi", mesh=mesh) as rows,
    ):

        def on_rank(x):
            return _ring(x, group=all_ranks), _ring_of_experts(x, rows)

        def _ring_of_experts(x, group):
            rank = jax.lax.axis_index("expert")
            idx = jnp.full((x.shape[0], 1), 2 * ((rank + 1) % 4), jnp.int32)
            received = jax_ep.dispatch(x, idx, group=group)
            return jax_ep.combine(received.x * rank.astype(x.dtype), received.handle, group=group)

        spec = P(("data", "expert"))
        mapped = jax.jit(jax.shard_map(on_rank, mesh=mesh, in_specs=spec, out_specs=spec))
        x = np.random.default_rng(3).integers(-3, 4, (16, WIDTH)).astype(np.float32)
        across, along = mapped(x)
    np.testing.assert_array_equal(across, _expected(x, 8))
    np.testing.assert_array_equal(along, _expected(x, 4, copies=2))


@pytest.mark.slow
def test_all_of_it_pinned_to_one_core():
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "import conftest, test_rendezvous as t\n"
        "t._independent_branches(8); t._independent_branches(16); t._overlapping_launches()\n"
        "t.test_mixed_with_collectives_of_xla(); print('all met')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=_child_env(),
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert "all met" in done.stdout, done.stderr[-3000:]


def _child_env() -> dict[str, str]:
    import os
    import pathlib

    here = str(pathlib.Path(__file__).parent)
    path = os.pathsep.join(p for p in [here, *sys.path] if p)
    return {**os.environ, "PYTHONPATH": path, "XLA_FLAGS": ""}
