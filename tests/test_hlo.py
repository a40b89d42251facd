# SPDX-License-Identifier: Apache-2.0
"""What the compiler is given: exactly our custom calls, and no collective beside them."""

import collections
import functools
import re
import types

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

import jax_ep
from ep_testing.hlo import collectives
from ep_testing.problems import PROBLEMS
from ep_testing.programs import make_group
from jax_ep._src.backends.ffi import primitives

PROBLEM = PROBLEMS["eight_ranks"]


def _compiled_text(f, group, *args) -> str:
    spec = P(group.axis_name)
    mapped = jax.shard_map(f, mesh=group.mesh, in_specs=spec, out_specs=spec)
    return jax.jit(mapped).lower(*args).compile().as_text()


def _custom_calls(text: str) -> collections.Counter:
    return collections.Counter(re.findall(r'custom_call_target="(jax_ep_\w+)"', text))


def _global(array):
    return array.reshape(-1, array.shape[-1])


def _args():
    return [_global(a) for a in (PROBLEM.x, PROBLEM.topk_idx, PROBLEM.topk_weights)]


def _block(x, idx, w, *, group):
    received = jax_ep.dispatch(x, idx, w, group=group)
    return jax_ep.combine(jnp.sin(received.x), received.handle, received.weights, group=group)


def _loss(x, idx, w, *, group):
    return jnp.sum(jnp.cos(_block(x, idx, w, group=group)))


def test_forward_is_one_call_of_each_kind():
    with make_group(PROBLEM, "ffi") as group:
        text = _compiled_text(functools.partial(_block, group=group), group, *_args())
    assert _custom_calls(text) == {"jax_ep_plan_dispatch": 1, "jax_ep_combine": 1}
    assert not collectives(text)


@pytest.mark.parametrize("wire", [None, "float8_e4m3fn"])
@pytest.mark.parametrize("in_a_scan", [False, True])
def test_counts_alone_need_the_plan_alone(wire, in_a_scan):
    with make_group(PROBLEM.replace(wire_dtype=wire), "ffi") as group:

        def counts(x, idx, w):
            return jax_ep.dispatch(x, idx, w, group=group).num_dropped[None]

        def summed(x, idx, w):
            start = jnp.zeros_like(counts(x, idx, w))
            return jax.lax.scan(lambda n, _: (n + counts(x, idx, w), None), start, None, 3)[0]

        text = _compiled_text(summed if in_a_scan else counts, group, *_args())
    assert _custom_calls(text) == {"jax_ep_plan": 1}


def test_the_gradient_of_rows_that_nobody_looks_at_needs_the_plan_alone():
    """A loss that is linear in the rows: its forward exchange is dead code, the handle is not."""
    with make_group(PROBLEM, "ffi") as group:

        def loss(x, idx, w):
            return jnp.sum(jax_ep.dispatch(x, idx, w, group=group).x)

        text = _compiled_text(jax.grad(loss), group, *_args())
    assert _custom_calls(text) == {"jax_ep_plan": 1, "jax_ep_combine": 1}


def test_a_batch_of_one_routing_has_one_plan():
    with make_group(PROBLEM, "ffi") as group:

        def send(x, idx, w):
            one = functools.partial(_block, group=group)
            batched = jax.vmap(one, in_axes=(0, None, None))(jnp.stack([x, 2 * x]), idx, w)
            return batched.reshape(-1, x.shape[1])

        text = _compiled_text(send, group, *_args())
    assert _custom_calls(text) == {"jax_ep_plan": 1, "jax_ep_dispatch": 1, "jax_ep_combine": 1}


@pytest.mark.parametrize("wire", [None, "float8_e4m3fn"])
def test_backward_is_one_dispatch_and_one_combine_and_no_plan(wire):
    problem = PROBLEM.replace(wire_dtype=wire)
    with make_group(problem, "ffi") as group:
        grad = jax.grad(functools.partial(_loss, group=group), argnums=(0, 2))
        text = _compiled_text(grad, group, *_args())
    # The forward combine is there for the loss's cosine only.
    assert _custom_calls(text) == {
        "jax_ep_plan_dispatch": 1, "jax_ep_dispatch": 1, "jax_ep_combine": 2,
    }  # fmt: skip
    assert not collectives(text)


@pytest.mark.parametrize("layout", ["expert", "rank"])
def test_the_backward_of_combine_is_one_dispatch_with_its_products(layout):
    """No array of rows is made beside the dispatch's own result."""
    problem = PROBLEMS["deepseek" if layout == "expert" else "deepseek_by_rank"]
    with make_group(problem, "ffi") as group:

        def backward(y, weights, handle, out_bar):
            _, vjp = jax.vjp(lambda y, w: jax_ep.combine(y, handle, w, group=group), y, weights)
            return vjp(out_bar)

        def on_rank(x, idx, w):
            received = jax_ep.dispatch(x, idx, w, group=group)
            return received.x, received.weights, received.handle

        args = _global(problem.x), _global(problem.topk_idx), _global(problem.topk_weights)
        spec = P(group.axis_name)
        forward = jax.shard_map(on_rank, mesh=group.mesh, in_specs=spec, out_specs=spec)
        y, weights, handle = jax.eval_shape(forward, *args)
        text = _compiled_text(backward, group, y, weights, handle, args[0])
        rows = rf"\[{problem.plan.capacity},{problem.hidden}\]"
    assert _custom_calls(text) == {"jax_ep_dispatch": 1}
    assert re.findall(rf"{rows}\S* parameter\(", text)
    made = re.findall(rf"= \w+{rows}\S* (\S+)\(", text)
    assert set(made) <= {"parameter", "get-tuple-element", "bitcast", "copy"}, made


def test_so_is_that_of_rows_received_in_fp8():
    """Weights travel with the rows, in both directions."""
    fp8 = "float8_e4m3fn"
    with make_group(PROBLEM.replace(wire_dtype=fp8, recv_dtype=fp8), "ffi") as group:
        experts, hidden = group.num_local_experts * group.num_ranks, PROBLEM.hidden
        w = jnp.ones((experts, hidden, hidden))

        def loss(x, idx, weights, w):
            return jnp.sum(jnp.cos(jax_ep.moe(x, idx, weights, w, w, w, group=group)))

        text = _compiled_text(jax.grad(loss, argnums=(0, 2, 3)), group, *_args(), w)
    assert _custom_calls(text) == {
        "jax_ep_plan_dispatch": 1, "jax_ep_dispatch": 1, "jax_ep_combine": 2,
    }  # fmt: skip
    assert not collectives(text)


def test_remat_of_everything_repeats_the_forward_once():
    with make_group(PROBLEM, "ffi") as group:
        block = jax.checkpoint(
            functools.partial(_loss, group=group),
            policy=jax.checkpoint_policies.nothing_saveable,
        )
        text = _compiled_text(jax.grad(block, argnums=(0, 2)), group, *_args())
    counts = _custom_calls(text)
    assert counts["jax_ep_plan"] + counts["jax_ep_plan_dispatch"] <= 2
    assert counts["jax_ep_plan_dispatch"] + counts["jax_ep_dispatch"] <= 3
    assert not collectives(text)


def test_a_scan_holds_the_calls_once():
    with make_group(PROBLEM, "ffi") as group:

        def scanned(x, idx, w):
            def step(x, _):
                return _block(x, idx, w, group=group), None

            return jax.lax.scan(step, x, None, length=5)[0]

        text = _compiled_text(scanned, group, *_args())
    assert sum(_custom_calls(text).values()) == 2
    assert not collectives(text)


def test_no_custom_call_has_a_side_effect():
    with make_group(PROBLEM, "ffi") as group:
        grad = jax.grad(functools.partial(_loss, group=group), argnums=(0, 2))
        spec = P("expert")
        mapped = jax.shard_map(grad, mesh=group.mesh, in_specs=spec, out_specs=spec)
        text = jax.jit(mapped).lower(*_args()).as_text()
    calls = [line for line in text.splitlines() if "@jax_ep_" in line]
    assert calls
    assert not [line for line in calls if "has_side_effect = true" in line]


def test_the_xla_backend_is_collectives_alone():
    with make_group(PROBLEM, "xla") as group:
        text = _compiled_text(functools.partial(_block, group=group), group, *_args())
    assert not _custom_calls(text)
    assert collectives(text)


def test_other_routing_does_not_compile_again(backend):
    with make_group(PROBLEM, backend) as group:
        spec = P("expert")
        mapped = jax.jit(
            jax.shard_map(
                functools.partial(_block, group=group), mesh=group.mesh, in_specs=spec,
                out_specs=spec,
            )
        )  # fmt: skip
        x, idx, w = _args()
        mapped(x, idx, w)
        mapped(x, idx[::-1].copy(), w)
        assert mapped._cache_size() == 1


def test_the_backward_keeps_rows_in_their_own_dtype(backend):
    problem = PROBLEM.replace(dtype="bfloat16")
    with make_group(problem, backend) as group:

        def on_rank(x, idx, w):
            _, vjp = jax.vjp(lambda x, w: _block(x, idx, w, group=group), x, w)
            return jax.tree.leaves(vjp)

        args = _global(problem.x), _global(problem.topk_idx), _global(problem.topk_weights)
        kept = jax.eval_shape(
            jax.shard_map(on_rank, mesh=group.mesh, in_specs=P("expert"), out_specs=P("expert")),
            *args,
        )
        rows = problem.num_ranks * problem.plan.capacity
    wide = [a for a in kept if a.shape == (rows, problem.hidden) and a.dtype == jnp.float32]
    assert [a for a in kept if a.shape == (rows, problem.hidden)]
    assert not wide


def test_a_wider_result_of_dispatch_is_not_kept_for_the_backward():
    # Unweighted, nothing but the handle is a residual: no [C, H] array is saved.
    with make_group(PROBLEM, "ffi") as group:

        def linear(x, idx):
            received = jax_ep.dispatch(x, idx, group=group)
            return jax_ep.combine(received.x, received.handle, group=group)

        def on_rank(x, idx):
            _, vjp = jax.vjp(lambda x: linear(x, idx), x)
            return [a for a in jax.tree.leaves(vjp) if jnp.issubdtype(a.dtype, jnp.floating)]

        shapes = jax.eval_shape(
            jax.shard_map(on_rank, mesh=group.mesh, in_specs=P("expert"), out_specs=P("expert")),
            *_args()[:2],
        )
    assert all(s.size < PROBLEM.plan.capacity * PROBLEM.hidden for s in jax.tree.leaves(shapes))


@pytest.mark.parametrize("backend", ["ffi", "xla"])
def test_profiles_name_the_operation_the_direction_and_the_group(backend):
    """Two groups of one program look alike otherwise."""
    with make_group(PROBLEM, backend) as first, make_group(PROBLEM, backend) as second:

        def loss(x, idx, w):
            y = _block(x, idx, w, group=first)
            return jnp.sum(jnp.cos(_block(y, idx, w, group=second)))[None]

        text = _compiled_text(jax.grad(lambda *a: loss(*a)[0]), first, *_args())
    names = re.findall(r'op_name="([^"]*)"', text)
    for group in (first, second):
        number = group.name.split()[1]
        for operation in ("dispatch", "combine"):
            scope = rf"jax_ep\.{operation}/EpGroup_{number}\b"
            of_it = [name for name in names if re.search(scope, name)]
            assert any("transpose(" in name for name in of_it), scope
            assert any("transpose(" not in name for name in of_it), scope


def test_the_hash_of_a_call_site_knows_the_layer_and_not_the_number_of_the_group():
    """Processes may have made other groups before: of the same call they are to have the same."""

    def call_site(layer, number):
        stack = f"jit(f)/{layer}/jvp(jax_ep.dispatch/EpGroup_{number})"
        return primitives._call_site(types.SimpleNamespace(name_stack=stack))

    assert call_site("layer_0", 1) == call_site("layer_0", 23)
    assert call_site("layer_0", 1) != call_site("layer_1", 1)
