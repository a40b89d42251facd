# SPDX-License-Identifier: Apache-2.0
"""`route_expert_choice`: by hand, against the oracle, with dispatch and combine, and its errors."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jax_ep
from ep_testing.programs import make_mesh, over_ranks
from jax_ep import reference

RANKS, TOKENS, EXPERTS, HIDDEN = 4, 6, 8, 12


def _group(num_ranks=RANKS, num_experts=EXPERTS, *, mesh=None, axis_name="expert", **options):
    mesh = mesh or make_mesh((num_ranks,), ("expert",))
    backend = options.pop("backend", "xla")
    config = jax_ep.EpConfig(
        **{
            "num_experts": num_experts,
            "num_topk": num_experts,
            "hidden": HIDDEN,
            "max_tokens_per_rank": 16,
            "dtype": jnp.float32,
            **options,
        }
    )
    return jax_ep.EpGroup(mesh, axis_name, config, backend=backend)


def _choose(group, logits, capacity, **kwargs):
    """Of all ranks: `[R, T, E]` in and out."""
    run = over_ranks(
        group,
        lambda v: jax_ep.route_expert_choice(v, capacity=capacity, group=group),
        **kwargs,
    )
    return jax.tree.map(np.asarray, run(logits))


def _logits(seed=0, num_tokens=TOKENS):
    return np.random.default_rng(seed).standard_normal((RANKS, num_tokens, EXPERTS)).astype("f")


def test_by_hand():
    # Shares of expert 0: 1/2, 3/4 on rank 0, 3/4, 1/4 on rank 1; of expert 1, the rest.
    logits = np.log([[[1.0, 1.0], [3.0, 1.0]], [[3.0, 1.0], [1.0, 3.0]]]).astype(np.float32)
    with _group(2, 2) as group:
        idx, weights = _choose(group, logits, 1)
        assert idx.tolist() == [[[-1, -1], [0, -1]], [[-1, -1], [-1, 1]]]
        want = [[[0, 0], [0.75, 0]], [[0, 0], [0, 0.75]]]
        np.testing.assert_allclose(weights, want, rtol=1e-6)
        idx, weights = _choose(group, logits, 3)
    # Of the shares of 1/4 for expert 1, that of the lower rank.
    assert idx.tolist() == [[[0, 1], [0, 1]], [[0, -1], [-1, 1]]]
    np.testing.assert_allclose(weights[0], [[0.5, 0.5], [0.75, 0.25]], rtol=1e-6)
    assert (idx.dtype, weights.dtype) == (np.int32, np.float32)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("capacity", [1, 5, TOKENS * RANKS - 1, TOKENS * RANKS, 1000])
def test_agrees_with_the_oracle(capacity, check_vma):
    logits = _logits()
    with _group() as group:
        idx, weights = _choose(group, logits, np.int64(capacity), check_vma=check_vma)
    want_idx, want = reference.route_expert_choice(logits, capacity=capacity)
    np.testing.assert_array_equal(idx, want_idx)
    np.testing.assert_allclose(weights, want, rtol=1e-6)
    chosen = (idx >= 0).sum(axis=(0, 1))
    np.testing.assert_array_equal(chosen, min(capacity, TOKENS * RANKS))


def test_experts_that_do_not_divide_by_the_ranks():
    logits = _logits()[..., :6]
    with _group(num_experts=6, pad_experts=True) as group:
        idx, weights = _choose(group, logits, 7)
    want_idx, want = reference.route_expert_choice(logits, capacity=7)
    np.testing.assert_array_equal(idx, want_idx)
    np.testing.assert_allclose(weights, want, rtol=1e-6)


def test_equal_scores_go_to_the_lower_rank_and_then_token():
    # Few values, the same float32 operations for each: ties are exact.
    logits = np.random.default_rng(1).integers(0, 2, (RANKS, TOKENS, 1)) * np.ones(EXPERTS)
    with _group() as group:
        idx, weights = _choose(group, logits.astype(np.float32), 8)
    first = np.arange(RANKS * TOKENS).reshape(RANKS, TOKENS, 1) < 8
    np.testing.assert_array_equal(idx, np.where(first, np.arange(EXPERTS), -1))
    np.testing.assert_allclose(weights, np.where(first, 1 / EXPERTS, 0) * np.ones(EXPERTS))


@pytest.mark.parametrize("capacity", [2, 12, 100])
def test_what_is_masked_is_never_chosen(capacity):
    logits = _logits()
    logits[1] = -np.inf
    logits[2, :2] = -np.inf
    logits[0, :, 3] = -np.inf  # an expert that no token of rank 0 may have
    with _group() as group:
        idx, weights = _choose(group, logits, capacity)
        grad = jax.grad(
            lambda v: over_ranks(
                group, lambda v: jax_ep.route_expert_choice(v, capacity=capacity, group=group)[1]
            )(v)[..., 0].sum()
        )(logits)
    want_idx, want = reference.route_expert_choice(logits, capacity=capacity)
    np.testing.assert_array_equal(idx, want_idx)
    np.testing.assert_allclose(weights, want, rtol=1e-6)
    assert (idx[1] == -1).all()
    assert (idx[0, :, 3] == -1).all()
    assert np.isfinite(grad).all()
    assert not np.asarray(grad)[np.isneginf(logits)].any()


def test_nan_gives_no_expert_more_than_its_capacity():
    logits = _logits()
    logits[1, 2, 3] = logits[3, 0, 0] = np.nan
    with _group() as group:
        idx, _ = _choose(group, logits, 4)
    assert ((idx >= 0).sum(axis=(0, 1)) <= 4).all()


def test_no_tokens():
    with _group() as group:
        idx, weights = _choose(group, np.zeros((RANKS, 0, EXPERTS), np.float32), 4)
    assert idx.shape == weights.shape == (RANKS, 0, EXPERTS)


def test_bfloat16_logits_are_scored_in_float32():
    logits = jnp.asarray(_logits(), jnp.bfloat16)
    with _group() as group:
        got = _choose(group, logits, 5)
        want = _choose(group, logits.astype(jnp.float32), 5)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert got[1].dtype == np.float32


@pytest.mark.parametrize("axis_name", ["expert", ("node", "expert"), ("expert", "node")])
def test_groups_of_one_or_more_axes_beside_others(axis_name):
    """Ranks are numbered as the group's axes are given; other axes have groups of their own."""
    mesh = make_mesh((2, 2, 2), ("node", "data", "expert"))
    names = (axis_name,) if isinstance(axis_name, str) else axis_name
    others = tuple(name for name in mesh.axis_names if name not in names)
    num_groups, num_ranks = 2 ** len(others), 2 ** len(names)
    # All scores are equal, so that ranks decide; the groups differ in who is masked.
    logits = np.zeros((num_groups, num_ranks, 3, EXPERTS), np.float32)
    logits[-1, 0, 1] = -np.inf
    with _group(mesh=mesh, axis_name=axis_name) as group:
        spec = P(others, names)

        def on_rank(v):
            routed = jax_ep.route_expert_choice(v[0, 0], capacity=4, group=group)
            return jax.tree.map(lambda a: a[None, None], routed)

        run = jax.shard_map(on_rank, mesh=mesh, in_specs=spec, out_specs=spec)
        idx, _ = jax.jit(run)(logits)
    for got, of_group in zip(np.asarray(idx), logits, strict=True):
        want, _ = reference.route_expert_choice(of_group, capacity=4)
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("options", [{}, {"expert_alignment": 4}], ids=["", "aligned"])
def test_with_dispatch_and_combine_it_is_the_dense_computation(backend, options):
    """Forward, and the gradients of tokens, logits and matrices, worked out in NumPy."""
    capacity, local = 5, EXPERTS // RANKS
    align = options.get("expert_alignment", 1)
    rows = local * -(-capacity // align) * align
    rng = np.random.default_rng(3)
    logits = _logits()
    logits[3, 4] = -np.inf
    x = rng.standard_normal((RANKS, TOKENS, HIDDEN)).astype(np.float32)
    w = rng.standard_normal((EXPERTS, HIDDEN, HIDDEN)).astype(np.float32) / HIDDEN
    cotangent = rng.standard_normal(x.shape).astype(np.float32)

    with _group(backend=backend, recv_capacity=rows, **options) as group:

        def on_rank(x, logits, w):
            routing = jax_ep.route_expert_choice(logits, capacity=capacity, group=group)
            recv = jax_ep.dispatch(x, *routing, group=group)
            y = jax.lax.ragged_dot(recv.x, w, recv.group_sizes)
            out = jax_ep.combine(y, recv.handle, recv.weights, group=group)
            return out, recv.num_dropped, recv.tokens_per_expert

        program = over_ranks(group, on_rank)
        by_rank = w.reshape(RANKS, local, HIDDEN, HIDDEN)
        out, num_dropped, load = program(x, logits, by_rank)
        grads = jax.grad(lambda *a: (program(*a)[0] * cotangent).sum(), argnums=(0, 1, 2))(
            x, logits, by_rank
        )
    assert not num_dropped.any()
    np.testing.assert_array_equal(load, capacity)

    want, want_grads = _dense(x, logits, w, cotangent, capacity)
    got = (out, *grads[:2], grads[2].reshape(w.shape))
    for g, expected in zip(got, (want, *want_grads), strict=True):
        # Sums of at most a hundred products of numbers of order 1.
        np.testing.assert_allclose(g, expected, rtol=1e-5, atol=1e-5)
        assert np.abs(expected).max() > 0.1


def _dense(x, logits, w, cotangent, capacity):
    """`sum_e weight_e * (x @ w_e)`, and its gradients, in float64."""
    x, w, cotangent = (a.astype(np.float64) for a in (x, w, cotangent))
    idx, weights = reference.route_expert_choice(logits, capacity=capacity)
    y = np.einsum("rth,ehf->rtef", x, w)
    out = np.einsum("rte,rtef->rtf", weights, y)
    weighted = weights[..., None] * cotangent[:, :, None, :]
    by_x = np.einsum("rtef,ehf->rth", weighted, w)
    by_w = np.einsum("rth,rtef->ehf", x, weighted)
    # Of a softmax s: d s_e / d logit_i = s_e * ((e == i) - s_i).
    everything = reference.route_expert_choice(logits, capacity=x.size)[1]
    by_scores = np.where(idx >= 0, np.einsum("rtf,rtef->rte", cotangent, y), 0.0)
    mean = (by_scores * everything).sum(axis=-1, keepdims=True)
    return out, (by_x, everything * (by_scores - mean), by_w)


def test_under_vmap_each_element_is_routed_alone():
    logits = np.stack([_logits(seed) for seed in range(3)], axis=1)
    with _group() as group:
        choose = lambda v: jax_ep.route_expert_choice(v, capacity=5, group=group)  # noqa: E731
        idx, weights = over_ranks(group, jax.vmap(choose))(logits)
    for element in range(3):
        want_idx, want = reference.route_expert_choice(logits[:, element], capacity=5)
        np.testing.assert_array_equal(idx[:, element], want_idx)
        np.testing.assert_allclose(weights[:, element], want, rtol=1e-6)


# --- arguments -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        *[
            ({"capacity": value}, {}, f"capacity is {value!r}; allowed: an int from 1 to")
            for value in (0, -1, 2.0, True, None)
        ],
        (
            {},
            {"num_topk": 2},
            "group has EpConfig.num_topk 2 and num_experts 8; allowed for route_expert_choice: "
            "num_topk equal to num_experts",
        ),
        (
            {"logits": np.zeros((RANKS, TOKENS, 4), np.float32)},
            {},
            "logits has shape (6, 4); allowed: [T, 8], as EpConfig.num_experts of the group",
        ),
        (
            {"logits": np.zeros((RANKS, TOKENS, EXPERTS), np.int32)},
            {},
            "logits is int32 of shape (6, 8); allowed: [T, E], floating point, E at least 1",
        ),
    ],
)
def test_bad_arguments_are_named_when_traced(changes, options, message):
    arguments = {"logits": _logits(), "capacity": 3, **changes}
    with _group(**options) as group, pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        _choose(group, **arguments)


def test_it_needs_an_open_group_and_its_axes():
    with pytest.raises(ValueError, match="group is a int; allowed: an EpGroup"):
        jax_ep.route_expert_choice(_logits()[0], capacity=3, group=3)
    with _group() as group:
        message = "route_expert_choice must be called inside jax.shard_map over the group's axes"
        with pytest.raises(ValueError, match=message):
            jax_ep.route_expert_choice(_logits()[0], capacity=3, group=group)
    with pytest.raises(jax_ep.EpGroupClosed):
        jax_ep.route_expert_choice(_logits()[0], capacity=3, group=group)


def test_the_oracle_by_hand():
    logits = np.log([[[1.0, 1.0], [3.0, 1.0]], [[3.0, 1.0], [1.0, 3.0]]])
    idx, weights = reference.route_expert_choice(logits, capacity=2)
    assert idx.tolist() == [[[-1, 1], [0, -1]], [[0, -1], [-1, 1]]]
    np.testing.assert_allclose(weights, [[[0, 0.5], [0.75, 0]], [[0.75, 0], [0, 0.75]]])
