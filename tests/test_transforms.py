# SPDX-License-Identifier: Apache-2.0
"""A MoE-like block gives the dense result under JAX's transformations and on every kind of mesh.

The block's experts multiply by an expert's own number, so that a row at the wrong expert shows.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jax_ep
from ep_testing.problems import PROBLEMS
from ep_testing.programs import make_group, make_mesh

PROBLEM = PROBLEMS["deepseek"].replace(dtype="float32", num_tokens=4, hidden=8)
FOUR = PROBLEM.replace(num_ranks=4)


def _tokens(problem, num_copies=1):
    """Global x, topk_idx, topk_weights: all ranks' tokens, for several groups."""
    rng = np.random.default_rng(5)
    count = num_copies * problem.num_ranks * problem.num_tokens
    experts = [rng.permutation(problem.num_experts)[: problem.num_topk] for _ in range(count)]
    idx = np.array(experts, np.int32)
    x = rng.standard_normal((count, problem.hidden)).astype(np.float32)
    weights = rng.uniform(0.1, 1, idx.shape).astype(np.float32)
    return x, idx, weights / weights.sum(1, keepdims=True)


def _expert(idx):
    """What an expert multiplies by: another number for each, of order 1."""
    return 1.0 + idx.astype(jnp.float32) / PROBLEM.num_experts


def dense(x, idx, w):
    """What `block` computes, without any exchange."""
    factor = jnp.sum(w * _expert(idx), axis=1, keepdims=True)
    return jnp.sin(x) * factor


def block(x, idx, w, *, group):
    """Dispatches, multiplies each row by its expert's factor, combines."""
    received = jax_ep.dispatch(x, idx, w, group=group)
    ends = jnp.cumsum(received.group_sizes)
    row = jnp.arange(received.x.shape[0])
    local = jnp.sum(row[:, None] >= ends[None, :], axis=1)
    expert = local + jax.lax.axis_index(group.axis_names) * group.num_local_experts
    y = jnp.sin(received.x) * _expert(expert)[:, None]
    return jax_ep.combine(y, received.handle, received.weights, group=group)


def _check(f, reference, x, idx, w, *, group, spec, check_vma=True, jit=True):
    """`f` on every rank equals `reference` on the whole."""
    mapped = jax.shard_map(f, mesh=group.mesh, in_specs=spec, out_specs=spec, check_vma=check_vma)
    got = (jax.jit(mapped) if jit else mapped)(x, idx, w)
    want = reference(x, idx, w)
    jax.tree.map(lambda g, r: np.testing.assert_allclose(g, r, rtol=2e-5, atol=2e-5), got, want)


def _grad(f):
    """Gradients of a scalar loss of `f` to x and w."""

    def grads(x, idx, w):
        return jax.grad(lambda x, w: jnp.sum(jnp.cos(f(x, idx, w))), (0, 1))(x, w)

    return grads


def _scan(f):
    def scanned(x, idx, w):
        def step(carry, _):
            return jnp.tanh(f(carry, idx, w)), jnp.sum(carry, axis=1)

        return jax.lax.scan(step, x, None, length=3)[0]

    return scanned


def _while(f):
    def looped(x, idx, w):
        return jax.lax.fori_loop(0, 3, lambda _, x: jnp.tanh(f(x, idx, w)), x)

    return looped


def _cond(f):
    def branched(x, idx, w):
        taken = jax.lax.cond(jnp.bool_(True), lambda x: f(x, idx, w), lambda x: x, x)
        return jax.lax.cond(jnp.bool_(False), lambda x: f(x, idx, w), lambda x: x, taken)

    return branched


def _remat(policy):
    def remat(f):
        inner = jax.checkpoint(lambda x, idx, w: jnp.sin(f(jnp.cos(x), idx, w)), policy=policy)
        return _grad(inner)

    return remat


def _remat_reference(f):
    return _grad(lambda x, idx, w: jnp.sin(f(jnp.cos(x), idx, w)))


POLICIES = jax.checkpoint_policies
TRANSFORMS = {
    "plain": (lambda f: f, None),
    "grad": (_grad, None),
    "value_and_grad": (
        lambda f: (
            lambda x, idx, w: jax.value_and_grad(lambda x: jnp.sum(f(x, idx, w)), has_aux=False)(x)[
                1
            ]
        ),
        None,
    ),
    "scan": (_scan, None),
    "grad_of_scan": (lambda f: _grad(_scan(f)), None),
    "while": (_while, None),
    "cond": (_cond, None),
    "grad_of_cond": (lambda f: _grad(_cond(f)), None),
    "remat": (_remat(None), _remat_reference),
    "remat_nothing_saveable": (_remat(POLICIES.nothing_saveable), _remat_reference),
    "remat_everything_saveable": (_remat(POLICIES.everything_saveable), _remat_reference),
    "remat_dots_saveable": (_remat(POLICIES.dots_saveable), _remat_reference),
    "grad_of_scan_of_remat": (
        lambda f: _grad(_scan(jax.checkpoint(f))),
        lambda f: _grad(_scan(f)),
    ),
}


CASES = [(name, True) for name in TRANSFORMS] + [
    (name, False) for name in ("plain", "grad", "cond", "grad_of_scan_of_remat")
]


@pytest.mark.parametrize(("name", "check_vma"), CASES)
def test_under_a_transformation(name, check_vma, backend):
    transform, reference = TRANSFORMS[name]
    with make_group(FOUR, backend) as group:
        f = functools.partial(block, group=group)
        _check(
            transform(f),
            (reference or transform)(dense),
            *_tokens(FOUR),
            group=group,
            spec=P("expert"),
            check_vma=check_vma,
        )


def test_without_jit(backend):
    with make_group(FOUR, backend) as group:
        f = functools.partial(block, group=group)
        _check(f, dense, *_tokens(FOUR), group=group, spec=P("expert"), jit=False)


MESHES = {
    "one_axis": ((8,), ("expert",), "expert", None),
    "data_then_expert": ((2, 4), ("data", "expert"), "expert", None),
    "expert_then_data": ((4, 2), ("expert", "data"), "expert", None),
    "tuple_axis": ((2, 4), ("node", "gpu"), ("node", "gpu"), None),
    "tuple_axis_turned": ((2, 4), ("node", "gpu"), ("gpu", "node"), None),
    "tuple_axis_and_data": ((2, 2, 2), ("node", "data", "gpu"), ("node", "gpu"), None),
    "reversed_devices": ((8,), ("expert",), "expert", range(7, -1, -1)),
    "shuffled_devices": ((2, 4), ("data", "expert"), "expert", [5, 0, 12, 3, 9, 2, 15, 7]),
}


@pytest.mark.parametrize("transform", ["plain", "grad"])
@pytest.mark.parametrize("name", MESHES)
def test_on_a_mesh(name, transform, backend):
    shape, names, axis_name, order = MESHES[name]
    mesh = make_mesh(shape, names, order=order)
    ranks = np.prod([mesh.shape[a] for a in np.atleast_1d(axis_name)])
    problem = PROBLEM.replace(num_ranks=int(ranks))
    with make_group(problem, backend, mesh=mesh, axis_name=axis_name) as group:
        assert group.num_ranks == ranks
        f = functools.partial(block, group=group)
        change, _ = TRANSFORMS[transform]
        tokens = _tokens(problem, num_copies=8 // ranks)
        # All axes shard the tokens, those of the group first, so that ranks hold blocks in order.
        rest = tuple(n for n in names if n not in group.axis_names)
        _check(change(f), change(dense), *tokens, group=group, spec=P((*group.axis_names, *rest)))


def test_grad_and_scan_around_shard_map(backend):
    # What a block needs for its backward crosses the shard_map and is stacked by the scan; no
    # array of size 0 may be among it, because XLA of jaxlib 0.11.2 crashes on those.
    with make_group(FOUR, backend) as group:
        x, idx, w = _tokens(FOUR)
        spec = P("expert")
        mapped = jax.shard_map(
            functools.partial(block, group=group), mesh=group.mesh, in_specs=spec, out_specs=spec
        )

        def loss(f, x, w):
            def step(x, _):
                return jnp.tanh(f(x, idx, w)), None

            return jnp.sum(jnp.cos(jax.lax.scan(step, x, None, length=3)[0]))

        got = jax.jit(jax.grad(functools.partial(loss, mapped), (0, 1)))(x, w)
        want = jax.grad(functools.partial(loss, dense), (0, 1))(x, w)
    for g, r in zip(got, want, strict=True):
        np.testing.assert_allclose(g, r, rtol=2e-5, atol=2e-5)


def test_gradients_of_replicated_parameters_are_summed(backend):
    with make_group(FOUR, backend) as group:
        x, idx, w = _tokens(FOUR)
        kernel = np.random.default_rng(0).standard_normal((8, 8)).astype(np.float32)

        def loss(f, x, idx, w, kernel):
            return jnp.sum(jnp.cos(f(jnp.einsum("th,hf->tf", x, kernel), idx, w)))

        def on_rank(x, idx, w, kernel):
            f = functools.partial(block, group=group)
            return jax.grad(loss, argnums=4)(f, x, idx, w, kernel)

        mapped = jax.shard_map(
            on_rank, mesh=group.mesh, in_specs=(*[P("expert")] * 3, P()), out_specs=P()
        )
        got = jax.jit(mapped)(x, idx, w, kernel)
    want = jax.grad(loss, argnums=4)(dense, x, idx, w, kernel)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("in_axes", [(0, None, None), (0, 0, 0)], ids=["x", "x_and_routing"])
@pytest.mark.parametrize("transform", ["plain", "grad"])
def test_vmap_runs_one_exchange_for_each_element(in_axes, transform, backend):
    with make_group(FOUR, backend) as group:
        change, _ = TRANSFORMS[transform]
        tokens = _tokens(FOUR)
        turned = [np.stack([np.roll(a, i, axis=0) for i in range(3)]) for a in tokens]
        args = [b if axis == 0 else a for a, b, axis in zip(tokens, turned, in_axes, strict=True)]

        def on_rank(x, idx, w):
            f = functools.partial(block, group=group)
            return jax.vmap(change(f), in_axes=in_axes)(x, idx, w)

        specs = tuple(P(None, "expert") if axis == 0 else P("expert") for axis in in_axes)
        got = jax.jit(
            jax.shard_map(on_rank, mesh=group.mesh, in_specs=specs, out_specs=P(None, "expert"))
        )(*args)
        want = jax.vmap(change(dense), in_axes=in_axes)(*args)
    jax.tree.map(lambda g, r: np.testing.assert_allclose(g, r, rtol=2e-5, atol=2e-5), got, want)


def test_donated_arguments(backend):
    with make_group(FOUR, backend) as group:
        f = functools.partial(block, group=group)
        mapped = jax.shard_map(f, mesh=group.mesh, in_specs=P("expert"), out_specs=P("expert"))
        x, idx, w = _tokens(FOUR)
        sharding = jax.sharding.NamedSharding(group.mesh, P("expert"))
        donated = jax.device_put(x, sharding)
        got = jax.jit(mapped, donate_argnums=0)(donated, idx, w)
        assert donated.is_deleted()
        np.testing.assert_allclose(got, dense(x, idx, w), rtol=2e-5, atol=2e-5)


def test_a_mesh_axis_left_to_the_compiler(backend):
    # Manual over the group's axis alone: XLA gathers over the other axis, correct if wasteful; a
    # warning says so.
    mesh = make_mesh((2, 4), ("data", "expert"))
    with make_group(FOUR, backend, mesh=mesh) as group:
        f = functools.partial(block, group=group)
        mapped = jax.shard_map(
            f, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"), axis_names={"expert"}
        )
        x, idx, w = _tokens(FOUR)
        sharding = jax.sharding.NamedSharding(mesh, P(("data", "expert")))
        with pytest.warns(UserWarning, match=r"leaves the axes \['data'\] to the compiler"):
            got = jax.jit(mapped)(jax.device_put(x, sharding), idx, w)
        np.testing.assert_allclose(got, dense(x, idx, w), rtol=2e-5, atol=2e-5)


def test_explicit_sharding_mode(backend):
    devices = np.array(jax.devices()[:4])
    explicit = (jax.sharding.AxisType.Explicit,)
    mesh = jax.sharding.Mesh(devices, ("expert",), axis_types=explicit)
    with make_group(FOUR, backend, mesh=mesh) as group, jax.set_mesh(mesh):
        f = functools.partial(block, group=group)
        mapped = jax.shard_map(f, in_specs=P("expert"), out_specs=P("expert"))
        x, idx, w = _tokens(FOUR)
        placed = [
            jax.device_put(a, jax.sharding.NamedSharding(mesh, P("expert"))) for a in (x, idx, w)
        ]
        np.testing.assert_allclose(jax.jit(mapped)(*placed), dense(x, idx, w), rtol=2e-5, atol=2e-5)


def test_handle_and_received_rows_cross_shard_map_and_jit(backend):
    # Two programs: the handle is data, nothing is remembered between dispatch and combine.
    with make_group(FOUR, backend) as group:
        x, idx, w = _tokens(FOUR)
        smap = functools.partial(
            jax.shard_map, mesh=group.mesh, in_specs=P("expert"), out_specs=P("expert")
        )

        def send(x, idx, w):
            received = jax_ep.dispatch(x, idx, w, group=group)
            return received.x, received.weights, received.handle

        rows, weights, handle = jax.jit(smap(send))(x, idx, w)
        back = functools.partial(jax_ep.combine, group=group)
        got = jax.jit(smap(lambda y, h, w: back(y, h, w)))(rows, handle, weights)
        np.testing.assert_allclose(got, x * w.sum(1, keepdims=True), rtol=2e-5, atol=2e-5)
