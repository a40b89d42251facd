# SPDX-License-Identifier: Apache-2.0
"""Exchanges in loops: ranks of one visit meet, whatever else the mesh has.

Devices that hold the same data, along an axis over which nothing varies, run apart in a loop: one
may be many visits ahead of its copy. Every visit here has tokens and routing of its own, so that a
rank that met another visit's ranks would show, and every device's shard is compared.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jax_ep
from ep_testing.problems import EpProblem
from ep_testing.programs import make_group, make_mesh

# Of meshes with axes that are not manual, along which devices repeat the work.
pytestmark = pytest.mark.filterwarnings("ignore:dispatch is called in a jax.shard_map that leaves")

HIDDEN, TOKENS, VISITS = 8, 3, 100


def _round_trip(x, idx, *, group):
    """`2 * x`: two selections a token, and no expert."""
    received = jax_ep.dispatch(x, idx, group=group)
    return jax_ep.combine(received.x, received.handle, group=group)


# --- loops over the leading axis of (xs, idx) ----------------------------------------------------


def _scan(step, xs, idx):
    return jax.lax.scan(lambda carry, visit: (carry, step(*visit)), 0, (xs, idx))[1]


def _turn(step, xs, idx, i, out):
    x, j = (jax.lax.dynamic_index_in_dim(a, i, keepdims=False) for a in (xs, idx))
    return jax.lax.dynamic_update_index_in_dim(out, step(x, j), i, 0)


def _fori(step, xs, idx):
    return jax.lax.fori_loop(
        0, len(xs), lambda i, out: _turn(step, xs, idx, i, out), jnp.zeros_like(xs)
    )


def _while(step, xs, idx):
    def turn(state):
        i, out = state
        return i + 1, _turn(step, xs, idx, i, out)

    start = jnp.int32(0), jnp.zeros_like(xs)
    return jax.lax.while_loop(lambda state: state[0] < len(xs), turn, start)[1]


def _map(step, xs, idx):
    return jax.lax.map(lambda visit: step(*visit), (xs, idx))


def _vmap(step, xs, idx):
    return jax.vmap(step)(xs, idx)


LOOPS = {"scan": _scan, "fori": _fori, "while": _while, "map": _map, "vmap": _vmap}

# --- meshes --------------------------------------------------------------------------------------

# shape, names, the group's axes, those along which tokens are split, manual axes (None: all)
MESHES = {
    "replicated": ((2, 4), ("tensor", "expert"), "expert", "expert", None),
    "replicated_last": ((4, 2), ("expert", "tensor"), "expert", "expert", None),
    "replicated_of_three": (
        (2, 2, 2), ("data", "tensor", "expert"), "expert", ("data", "expert"), None,
    ),
    "tuple": ((2, 2, 2), ("tensor", "node", "gpu"), ("node", "gpu"), ("node", "gpu"), None),
    "auto": ((2, 4), ("data", "expert"), "expert", "expert", {"expert"}),
    "auto_tuple": (
        (2, 2, 2), ("node", "data", "gpu"), ("node", "gpu"), ("node", "gpu"), {"node", "gpu"},
    ),
}  # fmt: skip


def _group(mesh_name, backend="ffi"):
    shape, names, axes, _, _ = MESHES[mesh_name]
    mesh = make_mesh(shape, names)
    ranks = int(np.prod([mesh.shape[a] for a in np.atleast_1d(axes)]))
    problem = EpProblem(
        name="loops", num_ranks=ranks, num_tokens=TOKENS, num_topk=2, num_experts=8, hidden=HIDDEN
    )
    return make_group(problem, backend, mesh=mesh, axis_name=axes)


def _tokens(group, split, visits=VISITS):
    rng = np.random.default_rng(11)
    shards = int(np.prod([group.mesh.shape[a] for a in np.atleast_1d(split)]))
    count = TOKENS * shards
    xs = rng.integers(-1000, 1000, (visits, count, HIDDEN)).astype(np.float32)
    idx = np.argsort(rng.random((visits, count, 8)), axis=2)[..., :2].astype(np.int32)
    return xs, idx


def _program(group, mesh_name, loop, *, outside, check_vma):
    _, _, _, split, manual = MESHES[mesh_name]
    step = functools.partial(_round_trip, group=group)
    options = {"mesh": group.mesh, "check_vma": check_vma}
    if manual is not None:
        options["axis_names"] = manual
    if outside:
        spec = P(split)
        step = jax.shard_map(step, in_specs=spec, out_specs=spec, **options)
        return jax.jit(functools.partial(loop, step))
    spec = P(None, split)
    looped = functools.partial(loop, step)
    return jax.jit(jax.shard_map(looped, in_specs=spec, out_specs=spec, **options))


def _wrong_visits(out, want):
    """Visits in which any device's shard is not what it must be."""
    wrong = set()
    for shard in out.addressable_shards:
        differs = np.any(np.asarray(shard.data) != want[shard.index], axis=(1, 2))
        wrong |= set(np.flatnonzero(differs).tolist())
    return sorted(wrong)


@pytest.mark.parametrize("check_vma", [True, False], ids=["vma", "no_vma"])
@pytest.mark.parametrize("outside", [False, True], ids=["inside", "outside"])
@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("mesh_name", MESHES)
def test_every_visit_meets_its_own_ranks(mesh_name, loop, outside, check_vma):
    with _group(mesh_name) as group:
        f = _program(group, mesh_name, LOOPS[loop], outside=outside, check_vma=check_vma)
        xs, idx = _tokens(group, MESHES[mesh_name][3])
        for _ in range(2):
            assert _wrong_visits(f(xs, idx), 2 * xs) == []


@pytest.mark.parametrize("mesh_name", ["replicated", "auto", "tuple"])
def test_gradients_of_a_loop(mesh_name):
    with _group(mesh_name) as group:
        _, _, _, split, _ = MESHES[mesh_name]
        xs, idx = _tokens(group, split, visits=30)
        f = _program(group, mesh_name, _scan, outside=False, check_vma=True)
        weights = np.random.default_rng(2).integers(-9, 9, xs.shape).astype(np.float32)

        @jax.jit
        def grads(xs, weights):
            return jax.grad(lambda xs: jnp.sum(weights * f(xs, idx)))(xs)

        sharding = jax.sharding.NamedSharding(group.mesh, P(None, split))
        placed = [jax.device_put(a, sharding) for a in (xs, weights)]
        for _ in range(3):
            assert _wrong_visits(grads(*placed), 2 * weights) == []


def test_copies_that_skip_visits_do_not_disturb_each_other():
    # Along "tensor" nothing varies but who exchanges: one copy at even visits, the other at odd.
    with _group("replicated") as group:
        xs, idx = _tokens(group, "expert")
        step = functools.partial(_round_trip, group=group)

        def on_rank(xs, idx):
            copy = jax.lax.axis_index("tensor")

            def visit(i, x, j):
                return jax.lax.cond((i + copy) % 2 == 0, lambda: step(x, j), lambda: -x)

            return jax.lax.scan(lambda i, a: (i + 1, visit(i, *a)), 0, (xs, idx))[1][None]

        spec = P(None, "expert")
        f = jax.jit(
            jax.shard_map(
                on_rank,
                mesh=group.mesh,
                in_specs=spec,
                out_specs=P("tensor", None, "expert"),
                check_vma=False,
            )
        )
        factor = np.where((np.arange(VISITS) + np.arange(2)[:, None]) % 2 == 0, 2, -1)
        want = factor[:, :, None, None] * xs
        for _ in range(5):
            np.testing.assert_array_equal(f(xs, idx), want)


# --- vmap(spmd_axis_name): each part of the batch on its own part of the mesh ---------------------


@pytest.mark.parametrize("check_vma", [True, False], ids=["vma", "no_vma"])
@pytest.mark.parametrize("transform", ["values", "gradients"])
def test_vmap_spread_over_a_mesh_axis(transform, check_vma, backend):
    # Pipelines run their stages like this: the batch is split along "data", and so the groups
    # along it hold other tokens, though nothing varied over it when the block was traced.
    mesh = make_mesh((2, 4), ("data", "expert"))
    problem = EpProblem(
        name="spmd", num_ranks=4, num_tokens=TOKENS, num_topk=2, num_experts=8, hidden=HIDDEN
    )
    with make_group(problem, backend, mesh=mesh) as group:
        rng = np.random.default_rng(3)
        x = rng.standard_normal((4, 4 * TOKENS, HIDDEN)).astype(np.float32)
        idx = np.argsort(rng.random((4 * TOKENS, 8)), axis=1)[:, :2].astype(np.int32)
        w = rng.uniform(size=idx.shape).astype(np.float32)

        def block(x, idx, w):
            received = jax_ep.dispatch(x, idx, w, group=group)
            y = jnp.sin(received.x)
            return jax_ep.combine(y, received.handle, received.weights, group=group)

        mapped = jax.shard_map(
            block, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"), check_vma=check_vma
        )
        spread = jax.vmap(mapped, in_axes=(0, None, None), spmd_axis_name="data")

        def dense(x, idx, w):
            del idx
            return jnp.sin(x) * jnp.sum(w, axis=1)[:, None][None]

        def loss(f, x, w):
            return jnp.sum(jnp.cos(f(x, idx, w)))

        if transform == "values":
            got, want = jax.jit(spread)(x, idx, w), dense(x, idx, w)
        else:
            got = jax.jit(jax.grad(functools.partial(loss, spread), (0, 1)))(x, w)
            want = jax.grad(functools.partial(loss, dense), (0, 1))(x, w)
    jax.tree.map(lambda g, r: np.testing.assert_allclose(g, r, rtol=2e-5, atol=2e-5), got, want)
