# SPDX-License-Identifier: Apache-2.0
"""`moe` against the oracle: values, statistics, gradients, what empty rows hold, and errors."""

import dataclasses
import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jax_ep
import jax_ep._src.moe as moe_module
from ep_testing.moe_layers import FFN, by_rank, inputs, weights_of
from ep_testing.problems import PROBLEMS
from ep_testing.programs import make_group, make_mesh, over_ranks
from jax_ep import reference

RTOL = {"float32": 1e-4, "bfloat16": 0.04, "float16": 4e-3}


def assert_close(got, want, rtol):
    got, want = np.asarray(got).astype(np.float64), np.asarray(want)
    size = max(1e-3, float(np.max(np.abs(want), initial=0.0)))
    np.testing.assert_allclose(got, want, rtol=rtol, atol=rtol * size)


@pytest.mark.parametrize(
    "name",
    [
        "three_ranks",
        "alignment_8_drops",
        "capacity_one_short",
        "masked_half",
        "all_masked",
        "no_zero_fill",
        "hidden_20",
        "fp8_float32",
    ],
)
def test_values_and_statistics_are_the_oracles(name, backend):
    problem = PROBLEMS[name]
    weights, x = weights_of(problem), inputs(problem)
    with make_group(problem, backend) as group:
        run = over_ranks(group, functools.partial(jax_ep.moe, group=group, with_stats=True))
        out, stats = run(x, problem.topk_idx, problem.topk_weights, *by_rank(problem, weights))
    want = reference.moe(
        x,
        problem.topk_idx,
        problem.topk_weights,
        *weights,
        wire_dtype=problem.wire_dtype,
        recv_capacity=problem.capacity,
        expert_alignment=problem.expert_alignment,
    )
    assert out.dtype == problem.np_dtype
    assert_close(out, want, RTOL[problem.dtype])
    np.testing.assert_array_equal(stats.tokens_per_expert, problem.plan.tokens_per_expert)
    np.testing.assert_array_equal(stats.num_dropped, problem.plan.num_dropped)


@pytest.mark.parametrize("check_vma", [True, False])
def test_gradients_are_those_of_a_dense_layer(check_vma, backend):
    """On a mesh with a data axis, so that gradients of weights are summed over it."""
    mesh = make_mesh((2, 4), ("data", "expert"))
    problem = PROBLEMS["topk_1"].replace(num_topk=3, hidden=12)
    weights = [jnp.asarray(w) for w in weights_of(problem)]
    num_tokens = 8 * problem.num_tokens
    x = jax.random.normal(jax.random.key(0), (num_tokens, problem.hidden))
    logits = jax.random.normal(jax.random.key(1), (num_tokens, problem.num_experts))
    experts, tokens = P("expert"), P(("data", "expert"))

    with make_group(problem, backend, mesh=mesh) as group:

        def on_rank(x, logits, w_gate, w_up, w_down):
            routing = jax_ep.route(logits, num_topk=3)
            experts = w_gate, w_up, w_down
            return jax_ep.moe(x, *routing, *experts, group=group, activation=jax.nn.gelu)

        layer = jax.shard_map(
            on_rank,
            mesh=mesh,
            in_specs=(tokens, tokens, experts, experts, experts),
            out_specs=tokens,
            check_vma=check_vma,
        )

        def dense(x, logits, w_gate, w_up, w_down):
            topk_idx, topk_weights = jax_ep.route(logits, num_topk=3)
            weight = jax.nn.one_hot(topk_idx, problem.num_experts) * topk_weights[..., None]
            gate = jax.nn.gelu(jnp.einsum("th,ehf->tef", x, w_gate))
            y = gate * jnp.einsum("th,ehf->tef", x, w_up)
            return jnp.einsum("tef,efh,te->th", y, w_down, weight.sum(axis=1))

        def gradients(f, *args):
            loss = lambda *args: jnp.square(f(*args)).sum()  # noqa: E731
            return jax.jit(jax.value_and_grad(loss, argnums=range(5)))(*args)

        got = gradients(layer, x, logits, *weights)
        remat = gradients(jax.checkpoint(layer), x, logits, *weights)
        want = gradients(dense, x, logits, *weights)
    for g, r, w in zip(*map(jax.tree.leaves, (got, remat, want)), strict=True):
        assert_close(g, w, 1e-4)
        assert_close(r, w, 1e-4)


def test_empty_rows_leak_nothing(monkeypatch, backend):
    """With `zero_fill=False` rows may hold anything: NaN changes neither outputs nor gradients."""
    problem = PROBLEMS["alignment_8"].replace(zero_fill=False, recv_capacity=90)
    weights, x = weights_of(problem), inputs(problem)

    def poisoned(*args, **kwargs):
        recv = jax_ep.dispatch(*args, **kwargs)
        held = (recv.handle.row_source >= 0)[:, None]
        assert recv.x.shape[0] == 90
        return dataclasses.replace(recv, x=jnp.where(held, recv.x, jnp.nan))

    def run():
        with make_group(problem, backend) as group:

            def on_rank(x, topk_idx, topk_weights, *weights):
                def loss(x, topk_weights, *weights):
                    out = jax_ep.moe(x, topk_idx, topk_weights, *weights, group=group)
                    return jnp.square(out).sum(), out

                argnums = range(5)
                return jax.grad(loss, argnums, has_aux=True)(x, topk_weights, *weights)

            args = (x, problem.topk_idx, problem.topk_weights, *by_rank(problem, weights))
            return jax.tree.map(np.asarray, over_ranks(group, on_rank)(*args))

    clean = run()
    monkeypatch.setattr(moe_module, "dispatch", poisoned)
    for got, want in zip(jax.tree.leaves(run()), jax.tree.leaves(clean), strict=True):
        assert np.isfinite(got).all()
        np.testing.assert_allclose(got, want, rtol=1e-6)


# --- arguments -----------------------------------------------------------------------------------


class Boxed:
    """What stands for an array as `nnx.Param` does, in nothing but this method."""

    def __init__(self, array):
        self.array = array

    def __jax_array__(self):
        return self.array


@pytest.mark.parametrize("kind", ["boxed", "nnx.Param"])
def test_objects_that_stand_for_arrays_are_taken(kind, backend):
    # Not above: ranks on GPUs import this file, and need no Flax.
    box = Boxed if kind == "boxed" else importlib.import_module("flax.nnx").Param
    problem = PROBLEMS["three_ranks"]
    args = problem.x, problem.topk_idx, problem.topk_weights, *by_rank(problem, weights_of(problem))
    with make_group(problem, backend) as group:

        def on_rank(box, x, topk_idx, topk_weights, *weights):
            x, topk_idx, topk_weights, *weights = map(box, (x, topk_idx, topk_weights, *weights))
            out = jax_ep.moe(x, topk_idx, topk_weights, *weights, group=group)
            recv = jax_ep.dispatch(x, topk_idx, topk_weights, group=group)
            return out, jax_ep.combine(box(recv.x), recv.handle, box(recv.weights), group=group)

        got, want = (
            over_ranks(group, functools.partial(on_rank, kind))(*args)
            for kind in (box, lambda array: array)
        )
    jax.tree.map(np.testing.assert_array_equal, got, want)


# --- errors ------------------------------------------------------------------------------------

TINY = PROBLEMS["tiny"]
GOOD = {
    "x": jnp.zeros((4, 8)),
    "topk_idx": jnp.zeros((4, 2), jnp.int32),
    "topk_weights": jnp.zeros((4, 2)),
    "w_gate": jnp.zeros((2, 8, FFN)),
    "w_up": jnp.zeros((2, 8, FFN)),
    "w_down": jnp.zeros((2, FFN, 8)),
}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": jnp.zeros((4, 9))}, r"x is float32\[4, 9\]; allowed: float32\[T, 8\]"),
        ({"topk_idx": jnp.zeros((4, 3), jnp.int32)}, r"topk_idx is int32\[4, 3\]; allowed"),
        ({"topk_weights": None}, r"topk_weights is None; allowed: float32\[T, K\]"),
        ({"topk_weights": jnp.zeros((4, 2), jnp.bfloat16)}, "topk_weights is bfloat16"),
        (
            {"w_gate": jnp.zeros((4, 8, FFN))},
            r"w_gate is float32\[4, 8, 6\]; allowed: float32\[2, 8, 6\], of the 2 experts on each",
        ),
        ({"w_gate": jnp.zeros((8, FFN))}, r"w_gate is float32\[8, 6\]; allowed: float32\[2, 8, F"),
        ({"w_gate": jnp.zeros((2, 8, FFN), jnp.bfloat16)}, "w_gate is bfloat16"),
        ({"w_gate": None}, "w_gate is a NoneType; allowed: an array"),
        (
            {"w_up": jnp.zeros((2, 8, 5))},
            r"w_up is float32\[2, 8, 5\]; allowed: float32\[2, 8, 6\]",
        ),
        ({"w_down": jnp.zeros((2, 8, FFN))}, r"w_down is .*; allowed: float32\[2, 6, 8\]"),
        ({"group": None}, "group is a NoneType; allowed: an EpGroup"),
    ],
)
def test_errors_name_the_argument(changed, message):
    with make_group(TINY, "xla") as group:
        args = GOOD | {"group": group} | changed
        group_arg = args.pop("group")

        def on_rank():
            return jax_ep.moe(**args, group=group_arg)

        mapped = jax.shard_map(on_rank, mesh=group.mesh, in_specs=(), out_specs=P("expert"))
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(mapped)


def test_layout_rank_is_refused():
    message = "layout 'rank'; allowed for moe: 'expert', because"
    group = make_group(PROBLEMS["tiny_by_rank"], "xla")
    with group, pytest.raises(ValueError, match=message):
        jax_ep.moe(**GOOD, group=group)


def test_outside_of_shard_map_and_after_close():
    group = make_group(TINY, "xla")
    with group, pytest.raises(ValueError, match="must be called inside"):
        jax_ep.moe(**GOOD, group=group)
    with pytest.raises(jax_ep.EpGroupClosed):
        jax_ep.moe(**GOOD, group=group)
