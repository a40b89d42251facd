# SPDX-License-Identifier: Apache-2.0
"""Messages of dispatch and combine for arguments that do not fit, at trace time."""

import contextlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jax_ep
from ep_testing import fake_cuda
from ep_testing.problems import EpProblem
from ep_testing.programs import make_group, make_mesh, over_ranks

PROBLEM = EpProblem(
    name="errors", num_ranks=2, num_tokens=4, num_topk=2, num_experts=4, hidden=8,
    max_tokens_per_rank=6,
)  # fmt: skip


@pytest.fixture
def group(backend):
    with make_group(PROBLEM, backend) as group:
        yield group


def _array(shape, dtype=np.float32):
    return np.zeros((2, *shape), dtype)


DISPATCH = {
    "x_hidden": ({"x": _array((4, 7))}, "x is float32[4, 7]; allowed: float32[T, 8]"),
    "x_rank": ({"x": _array((4, 8, 1))}, "x is float32[4, 8, 1]; allowed: float32[T, 8]"),
    "x_dtype": ({"x": _array((4, 8), np.float16)}, "x is float16[4, 8]; allowed: float32[T, 8]"),
    "too_many_tokens": (
        {"x": _array((7, 8)), "topk_idx": _array((7, 2), np.int32), "topk_weights": None},
        "x has 7 tokens; allowed: up to config.max_tokens_per_rank, which is 6",
    ),
    "idx_shape": (
        {"topk_idx": _array((4, 3), np.int32)},
        "topk_idx is int32[4, 3]; allowed: int32[4, 2]",
    ),
    "idx_dtype": (
        {"topk_idx": _array((4, 2), np.uint8)},
        "topk_idx is uint8[4, 2]; allowed: int32[4, 2]",
    ),
    "weights_shape": (
        {"topk_weights": _array((3, 2))},
        "topk_weights is float32[3, 2]; allowed: float32[4, 2]",
    ),
    "weights_dtype": (
        {"topk_weights": _array((4, 2), np.float16)},
        "topk_weights is float16[4, 2]; allowed: float32[4, 2]",
    ),
}


@pytest.mark.parametrize("case", DISPATCH)
def test_dispatch_names_the_argument(case, group):
    change, message = DISPATCH[case]
    good = {
        "x": PROBLEM.x,
        "topk_idx": PROBLEM.topk_idx,
        "topk_weights": PROBLEM.topk_weights,
    }
    arguments = {**good, **change}
    has_weights = arguments["topk_weights"] is not None

    def on_rank(x, idx, w=None):
        return jax_ep.dispatch(x, idx, w, group=group).x

    given = [a for a in arguments.values() if a is not None]
    assert has_weights == (len(given) == 3)
    with pytest.raises(ValueError, match=re.escape(message)):
        over_ranks(group, on_rank)(*given)


COMBINE = {
    "y_rows": ((_array((15, 8)), None), "y is float32[15, 8]; allowed: float32[16, 8]"),
    "y_dtype": (
        (_array((16, 8), np.float16), None),
        "y is float16[16, 8]; allowed: float32[16, 8]",
    ),
    "weights": (
        (_array((16, 8)), _array((16, 2))),
        "weights is float32[16, 2]; allowed: float32[16]",
    ),
}


@pytest.mark.parametrize("case", COMBINE)
def test_combine_names_the_argument(case, group):
    (y, weights), message = COMBINE[case]

    def on_rank(x, idx, y, *weights):
        handle = jax_ep.dispatch(x, idx, group=group).handle
        return jax_ep.combine(y, handle, *weights, group=group)

    given = [y] if weights is None else [y, weights]
    with pytest.raises(ValueError, match=re.escape(message)):
        over_ranks(group, on_rank)(PROBLEM.x, PROBLEM.topk_idx, *given)


def test_a_handle_of_another_group_is_refused(group, backend):
    other_problem = PROBLEM.replace(expert_alignment=8)
    with make_group(other_problem, backend, mesh=group.mesh) as other:

        def on_rank(x, idx):
            received = jax_ep.dispatch(x, idx, group=group)
            return jax_ep.combine(received.x, received.handle, group=other)

        with pytest.raises(ValueError, match="handle is of a dispatch with 2 ranks") as caught:
            over_ranks(group, on_rank)(PROBLEM.x, PROBLEM.topk_idx)
        assert "expert_alignment=8" in str(caught.value)


# Shape of the mesh, the axes of the dispatch, those of the combine. Only the axes tell the last
# three apart: the ranks are as many, and the config is the same.
OTHER_AXES = {
    "another_axis": ((2, 4), "a", "b"),
    "one_of_two": ((2, 4), ("a", "b"), "b"),
    "two_of_one": ((2, 4), "a", ("a", "b")),
    "as_many_ranks": ((2, 2), "a", "b"),
    "another_order": ((2, 4), ("a", "b"), ("b", "a")),
    "an_axis_of_one": ((4, 1), ("a", "b"), "a"),
}


def _trace_combine_with_a_handle_of(other, group):
    """Traces a program that dispatches with one group and combines with another; runs nothing."""

    def on_rank(x, idx):
        received = jax_ep.dispatch(x, idx, group=other)
        return jax_ep.combine(received.x, received.handle, group=group)

    split = P(other.axis_names)
    mapped = jax.shard_map(
        on_rank, mesh=other.mesh, in_specs=split, out_specs=P(other.mesh.axis_names)
    )
    tokens = 4 * other.num_ranks
    x = jax.ShapeDtypeStruct((tokens, 8), np.float32)
    idx = jax.ShapeDtypeStruct((tokens, 2), np.int32)
    return jax.eval_shape(mapped, x, idx)


@pytest.mark.parametrize("case", OTHER_AXES)
def test_a_handle_of_other_axes_is_refused(case, backend):
    shape, dispatched, combined = OTHER_AXES[case]
    mesh = make_mesh(shape, ("a", "b"))
    problem = PROBLEM.replace(num_experts=8)
    with (
        make_group(problem, backend, mesh=mesh, axis_name=dispatched) as other,
        make_group(problem, backend, mesh=mesh, axis_name=combined) as group,
    ):
        message = (
            f"handle is of a dispatch over the axes {other.axis_names}; allowed: one over this "
            f"group's, {group.axis_names}"
        )
        with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
            _trace_combine_with_a_handle_of(other, group)


def test_a_handle_of_another_group_over_the_same_axes_serves(backend):
    mesh = make_mesh((2, 4), ("a", "b"))
    problem = PROBLEM.replace(num_experts=8)
    with (
        make_group(problem, backend, mesh=mesh, axis_name="a") as other,
        make_group(problem, backend, mesh=mesh, axis_name=("a",)) as group,
    ):
        assert _trace_combine_with_a_handle_of(other, group).shape == (32, 8)


@pytest.mark.parametrize(
    ("dispatched", "combined"),
    [
        ("ffi", "xla"),
        ("xla", "ffi"),
        ("gpu", "ffi"),
        ("ffi", "gpu"),
        ("gpu", "xla"),
        ("xla", "gpu"),
    ],
)
@pytest.mark.parametrize("layout", ["expert", "rank"])
def test_a_handle_of_another_kind_of_group_is_refused(dispatched, combined, layout, monkeypatch):
    mesh = make_mesh((2,), ("expert",))
    problem = PROBLEM.replace(layout=layout)
    with contextlib.ExitStack() as stack:
        made = {}
        for kind in sorted(
            {dispatched, combined}, key="gpu".__eq__
        ):  # from then on all are on GPUs
            if kind == "gpu":
                fake_cuda.install(monkeypatch)
            backend = "ffi" if kind == "gpu" else kind
            made[kind] = stack.enter_context(make_group(problem, backend, mesh=mesh))
        where = {"xla": "'xla' on cpu", "ffi": "'ffi' on cpu", "gpu": "'ffi' on cuda"}[combined]
        message = f"handle is of a dispatch by another backend; this group's is {where}"
        with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
            _trace_combine_with_a_handle_of(made[dispatched], made[combined])


def test_something_else_than_a_handle_or_a_group(group):
    def combine_rows(x):
        return jax_ep.combine(x, x, group=group)

    with pytest.raises(ValueError, match=re.escape("allowed: Dispatched.handle")):
        over_ranks(group, combine_rows)(PROBLEM.x)
    with pytest.raises(ValueError, match="group is a str; allowed: an EpGroup"):
        over_ranks(group, lambda x, i: jax_ep.dispatch(x, i, group="expert"))(
            PROBLEM.x, PROBLEM.topk_idx
        )
    with pytest.raises(ValueError, match="x is a list; allowed: an array"):
        over_ranks(group, lambda i: jax_ep.dispatch([1.0], i, group=group).x)(PROBLEM.topk_idx)


def test_outside_shard_map(group):
    message = (
        "dispatch must be called inside jax.shard_map over the group's axes ('expert',); not "
        "manual here: ['expert']"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        jax_ep.dispatch(PROBLEM.x[0], PROBLEM.topk_idx[0], group=group)


def test_inside_shard_map_over_another_mesh(group):
    mesh = make_mesh((4,), ("expert",))

    def on_rank(x, idx):
        return jax_ep.dispatch(x, idx, group=group).x

    mapped = jax.shard_map(on_rank, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"))
    with pytest.raises(ValueError, match="axis 'expert' has 4 devices here, and 2 in the mesh"):
        mapped(jnp.zeros((8, 8)), jnp.zeros((8, 2), jnp.int32))


def test_the_primitives_refuse_operands_that_vary_over_different_axes():
    from jax_ep._src.backends.ffi.primitives import bind, plan_p
    from jax_ep._src.backends.operands import PlanOperands
    from jax_ep._src.spec import OpSpec

    with make_group(PROBLEM, "ffi") as group:

        def on_rank(idx):
            operands = PlanOperands(jnp.zeros(2, jnp.int32), idx)
            return bind(plan_p, operands, spec=OpSpec.of(group, num_tokens=idx.shape[0])).plan.slot

        with pytest.raises(ValueError, match="jax_ep_plan: operands vary over different mesh axes"):
            over_ranks(group, on_rank)(PROBLEM.topk_idx)


def test_the_primitives_say_that_they_run_inside_shard_map_only():
    from jax_ep._src.backends.ffi.primitives import bind, plan_p
    from jax_ep._src.backends.operands import PlanOperands
    from jax_ep._src.spec import OpSpec

    with make_group(PROBLEM, "ffi") as group:
        spec = OpSpec.of(group, num_tokens=4)
        operands = PlanOperands(jnp.zeros(2, jnp.int32), jnp.zeros((4, 2), jnp.int32))
        with pytest.raises(NotImplementedError, match=r"runs inside jax\.shard_map only"):
            bind(plan_p, operands, spec=spec)
