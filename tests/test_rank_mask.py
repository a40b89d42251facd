# SPDX-License-Identifier: Apache-2.0
"""`rank_mask`: ranks that take no part, against the oracle, and who waits for whom."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jax_ep
from ep_testing import assertions, halves
from ep_testing.hlo import operands
from ep_testing.problems import PROBLEMS, EpProblem
from ep_testing.programs import make_group, over_ranks
from jax_ep import reference

PROBLEM = EpProblem(
    name="masked", num_ranks=4, num_tokens=5, num_topk=3, num_experts=8, hidden=12
)  # fmt: skip
CASES = {
    "expert": PROBLEM,
    "rank": PROBLEM.replace(layout="rank"),
    "drops": PROBLEM.replace(recv_capacity=6, expert_alignment=2),
    "fp8_rows": PROBLEMS["fp8_rows"],
    "domains": PROBLEM.replace(domain_size=2, dtype="bfloat16"),
    "even": PROBLEM.replace(drop="even", capacity_factor=0.7),
    "padded": PROBLEM.replace(num_experts=7, pad_experts=True),
}
ONE_OUT = np.array([True, True, False, True])
MASKS = {"one": ONE_OUT, "two": [False, True, True, False], "alone": [False, False, True, False],
         "nobody": [False] * 4, "all": [True] * 4}  # fmt: skip


def masks_of(problem, masks):
    """The same mask on all ranks, or one for each."""
    masks = np.asarray(masks, bool)
    return np.broadcast_to(masks, (problem.num_ranks, problem.num_ranks))


def masked(problem, mask):
    """The problem with the routing that a mask leaves, for what compares with the oracle."""
    left = reference.plan(problem.topk_idx, **problem.plan_kwargs(), rank_mask=mask).topk_idx
    table = tuple(tuple(map(tuple, rank)) for rank in left.tolist())
    return problem.replace(routing="table", table=table)


def exchange(problem, backend, masks):
    """What all ranks receive, and their sums of what experts give, with and without weights."""

    def on_rank(x, idx, w, y, mask):
        received = jax_ep.dispatch(x, idx, w, group=group, rank_mask=mask)
        weighted = jax_ep.combine(y, received.handle, received.weights, group=group)
        return received, weighted, jax_ep.combine(y, received.handle, group=group)

    with make_group(problem, backend) as group:
        y = problem.random((problem.num_ranks, problem.plan.capacity, problem.hidden), salt=3)
        outs = over_ranks(group, on_rank)(
            problem.x, problem.topk_idx, problem.topk_weights, y, masks_of(problem, masks)
        )
        return y, jax.tree.map(np.asarray, outs)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("case", CASES)
def test_against_the_oracle(case, mask, backend):
    problem, mask = CASES[case], np.asarray(MASKS[mask], bool)
    y, (received, weighted, unweighted) = exchange(problem, backend, mask)
    want = reference.dispatch(
        problem.x, problem.topk_idx, problem.topk_weights, **problem.dispatch_kwargs(),
        rank_mask=mask,
    )  # fmt: skip
    left = masked(problem, mask)
    assertions.assert_received_rows_equal(received.x, want.x, left)
    for name in ("weights", "topk_idx", "group_sizes", "tokens_per_expert", "num_dropped"):
        np.testing.assert_array_equal(getattr(received, name), getattr(want, name), name)
    np.testing.assert_array_equal(received.handle.topk_idx, left.topk_idx)
    np.testing.assert_array_equal(received.handle.slot, want.plan.slot)
    np.testing.assert_array_equal(received.handle.row_source, want.plan.row_source)
    np.testing.assert_array_equal(received.handle.rank_mask, masks_of(problem, mask))
    sums = {"dtype": problem.np_dtype, "domain_size": problem.domain_size}
    assertions.assert_sums_equal(unweighted, reference.combine(y, want.plan, **sums), left)
    if backend == "ffi":  # XLA may round the products of the other one
        exact = reference.combine(y, want.plan, want.weights, **sums)
        assertions.assert_sums_equal(weighted, exact, left)


def test_rows_of_the_ranks_that_take_part_do_not_depend_on_the_others_experts():
    """By hand: the oracle's definition, without it."""
    _, (received, *_) = exchange(PROBLEM, "ffi", ONE_OUT)
    idx, owner = PROBLEM.topk_idx, PROBLEM.topk_idx // 2
    kept = np.where(ONE_OUT[owner] & ONE_OUT[:, None, None], idx, -1)
    for expert in range(8):
        sources = [s * 5 + t for s in range(4) for t in range(5) if expert in kept[s, t]]
        start = received.group_sizes[expert // 2, : expert % 2].sum()
        rows = received.handle.row_source[expert // 2, start : start + len(sources)]
        assert rows.tolist() == sources
    assert (received.x[2] == 0).all()
    assert received.tokens_per_expert[2].tolist() == [0, 0]


def test_a_call_without_a_mask_has_no_operand_for_one():
    with make_group(PROBLEM, "ffi") as group:

        def operands_with(*masks):
            def f(x, idx, w):
                mask = masks[0] if masks else None
                received = jax_ep.dispatch(x, idx, w, group=group, rank_mask=mask)
                return jax_ep.combine(received.x, received.handle, received.weights, group=group)

            text = halves.compiled_text(group, f, *halves.arguments(PROBLEM))
            return operands(text)

        assert operands_with() == {"plan_dispatch": 5, "combine": 6}
        assert operands_with(np.ones(4, bool)) == {"plan_dispatch": 6, "combine": 7}


def test_ranks_that_do_not_come_at_all():
    """As far as one process can show it: the rank's branch has no exchange."""
    with make_group(PROBLEM, "ffi", timeout=20) as group:

        def exchange(x, idx, w, mask):
            received = jax_ep.dispatch(x, idx, w, group=group, rank_mask=mask)
            return jax_ep.combine(received.x, received.handle, received.weights, group=group)

        def on_rank(x, idx, w, mask):
            alive = mask[jax.lax.axis_index("expert")]
            absent = lambda x, idx, w, mask: jnp.zeros_like(x)  # noqa: E731
            return jax.lax.cond(alive, exchange, absent, x, idx, w, mask)

        got = over_ranks(group, on_rank)(*halves.arguments(PROBLEM), masks_of(PROBLEM, ONE_OUT))
        whole = over_ranks(group, exchange)(*halves.arguments(PROBLEM), masks_of(PROBLEM, ONE_OUT))
    np.testing.assert_array_equal(got, whole)


def test_the_mask_changes_from_turn_to_turn_of_a_loop(backend):
    rng = np.random.default_rng(0)
    masks = rng.random((12, 4)) < 0.6
    with make_group(PROBLEM, backend) as group:

        def on_rank(x, idx, w, masks):
            def turn(x, mask):
                received = jax_ep.dispatch(x, idx, w, group=group, rank_mask=mask)
                y = jnp.sin(received.x)
                out = jax_ep.combine(y, received.handle, received.weights, group=group)
                return jnp.cos(out), (out, received.tokens_per_expert)

            return jax.lax.scan(turn, x, masks)[1]

        each = np.broadcast_to(masks, (4, *masks.shape))
        out, load = over_ranks(group, on_rank)(*halves.arguments(PROBLEM), each)
    x = PROBLEM.x
    for turn, mask in enumerate(masks):
        want = reference.dispatch(
            x, PROBLEM.topk_idx, PROBLEM.topk_weights, **PROBLEM.dispatch_kwargs(), rank_mask=mask
        )
        np.testing.assert_array_equal(load[:, turn], want.tokens_per_expert)
        y = np.sin(want.x)
        sums = reference.combine(y, want.plan, want.weights, dtype=np.float32)
        np.testing.assert_allclose(out[:, turn], sums, rtol=1e-5, atol=1e-5)
        x = np.cos(np.asarray(out[:, turn]))


def test_different_masks_are_an_error_that_names_them():
    masks = np.ones((4, 4), bool)
    masks[3, 2] = False
    with (
        make_group(PROBLEM, "ffi", timeout=20) as group,
        pytest.raises(jax.errors.JaxRuntimeError) as caught,
    ):
        jax.block_until_ready(
            over_ranks(
                group,
                lambda x, idx, mask: jax_ep.dispatch(x, idx, group=group, rank_mask=mask).x,
            )(PROBLEM.x, PROBLEM.topk_idx, masks)
        )
    text = "ranks disagree: rank_mask is "
    assert text in str(caught.value)
    assert "[1, 1, 0, 1] on rank 3" in str(caught.value)


def test_a_deadline_names_only_ranks_that_take_part():
    masks = masks_of(PROBLEM, ONE_OUT)
    with make_group(PROBLEM, "ffi", timeout=1.5) as group:

        def on_rank(x, idx, mask):
            def exchange(x, idx, mask):
                return jax_ep.dispatch(x, idx, group=group, rank_mask=mask).x[:1]

            late = jax.lax.axis_index("expert") >= 2  # 2 is masked
            return jax.lax.cond(late, lambda x, idx, mask: x[:1], exchange, x, idx, mask)

        run = over_ranks(group, on_rank)
        with pytest.raises(jax.errors.JaxRuntimeError, match=r"rank\(s\) 3 of 4 did not reach"):
            jax.block_until_ready(run(PROBLEM.x, PROBLEM.topk_idx, masks))


def loss_of(group, mask):
    def loss(x, w, idx):
        received = jax_ep.dispatch(x, idx, w, group=group, rank_mask=mask)
        y = jnp.sin(received.x)
        return jnp.sum(jnp.sin(jax_ep.combine(y, received.handle, received.weights, group=group)))

    return loss


@pytest.mark.parametrize("remat", [False, True])
def test_gradients_are_those_of_the_routing_that_is_left(backend, remat):
    left = masked(PROBLEM, ONE_OUT)

    def run(problem, masks):
        with make_group(problem, backend) as group:

            def on_rank(x, idx, w, *mask):
                loss = loss_of(group, mask[0] if mask else None)
                loss = jax.checkpoint(loss) if remat else loss
                return jax.value_and_grad(loss, argnums=(0, 1))(x, w, idx)

            return over_ranks(group, on_rank)(*halves.arguments(problem), *masks)

    halves.assert_same_bits(run(PROBLEM, [masks_of(PROBLEM, ONE_OUT)]), run(left, []))


@pytest.mark.parametrize("mask", ["one", "two", "nobody"])
def test_halves_are_the_whole(mask):
    masks = masks_of(PROBLEM, MASKS[mask])

    def in_halves(x, idx, w, mask):
        flight = jax_ep.dispatch_start(x, idx, w, group=group, rank_mask=mask)
        received = jax_ep.dispatch_done(flight, after=jnp.cos(x), group=group)
        flight = jax_ep.combine_start(received.x, received.handle, received.weights, group=group)
        return received, jax_ep.combine_done(flight, group=group)

    def whole(x, idx, w, mask):
        received = jax_ep.dispatch(x, idx, w, group=group, rank_mask=mask)
        out = jax_ep.combine(received.x, received.handle, received.weights, group=group)
        return received, out

    with make_group(PROBLEM, "ffi") as group:
        args = (*halves.arguments(PROBLEM), masks)
        got, want = (over_ranks(group, f)(*args) for f in (in_halves, whole))
        halves.assert_same_bits(got, want)
        assert halves.num_open(group) == 0


def test_vmap_over_masks_is_a_loop():
    masks = np.stack([masks_of(PROBLEM, MASKS[m]) for m in ("one", "all", "alone")], axis=1)
    with make_group(PROBLEM, "ffi") as group:

        def one(x, idx, w, mask):
            received = jax_ep.dispatch(x, idx, w, group=group, rank_mask=mask)
            return jax_ep.combine(received.x, received.handle, received.weights, group=group)

        batched = over_ranks(group, jax.vmap(one, in_axes=(None, None, None, 0)))
        got = batched(*halves.arguments(PROBLEM), masks)
        for i in range(3):
            want = over_ranks(group, one)(*halves.arguments(PROBLEM), masks[:, i])
            np.testing.assert_array_equal(got[:, i], want)


def weights_of_experts(problem, *, width=6):
    rng = np.random.default_rng(5)
    shapes = [(problem.hidden, width), (problem.hidden, width), (width, problem.hidden)]
    return [rng.normal(size=(problem.num_experts, *s)).astype(np.float32) * 0.3 for s in shapes]


@pytest.mark.parametrize("renormalize", [False, True])
def test_moe_with_masks(backend, renormalize):
    matrices = weights_of_experts(PROBLEM)
    by_rank = [m.reshape(4, 2, *m.shape[1:]) for m in matrices]
    with make_group(PROBLEM, backend) as group:
        layer = functools.partial(jax_ep.moe, group=group, renormalize=renormalize, with_stats=True)
        out, stats = over_ranks(
            group, lambda x, idx, w, *rest: layer(x, idx, w, *rest[:3], rank_mask=rest[3])
        )(*halves.arguments(PROBLEM), *by_rank, masks_of(PROBLEM, ONE_OUT))
    want = reference.moe(
        PROBLEM.x, PROBLEM.topk_idx, PROBLEM.topk_weights, *matrices,
        rank_mask=ONE_OUT, renormalize=renormalize,
    )  # fmt: skip
    np.testing.assert_allclose(out, want, rtol=2e-4, atol=2e-4 * np.abs(want).max())
    left = masked(PROBLEM, ONE_OUT).topk_idx
    lost = ((PROBLEM.topk_idx >= 0) & (left < 0)).sum(axis=(1, 2))
    assert np.asarray(stats.num_lost).tolist() == lost.tolist()
    assert (np.asarray(out)[2] == 0).all()


def test_sharded_moe_with_masks():
    problem, mask = PROBLEM, ONE_OUT
    matrices = weights_of_experts(problem)
    flat = [a.reshape(-1, a.shape[-1]) for a in halves.arguments(problem)]
    with make_group(problem, "ffi") as group:

        @jax.jit
        def layer(x, idx, w, mask):
            return jax_ep.sharded_moe(
                x, idx, w, jax_ep.experts.gated(*matrices), group=group, token_spec=P("expert"),
                rank_mask=mask, renormalize=True,
            )  # fmt: skip

        out = np.asarray(layer(*flat, mask))
    want = reference.moe(
        problem.x, problem.topk_idx, problem.topk_weights, *matrices,
        rank_mask=mask, renormalize=True,
    )  # fmt: skip
    want = want.reshape(out.shape)
    np.testing.assert_allclose(out, want, rtol=2e-4, atol=2e-4 * np.abs(want).max())


def test_renormalized_weights_by_hand():
    from jax_ep._src.rank_mask import renormalized

    idx = np.array([[0, 5, 2], [4, 5, -1], [0, 1, 2], [6, -1, 0]], np.int32)
    left = np.array([[0, -1, 2], [-1, -1, -1], [0, 1, 2], [-1, -1, 0]], np.int32)
    w = np.array([[0.5, 0.3, 0.2], [0.7, 0.3, 9.0], [0.1, 0.2, 0.3], [0.4, 7.0, 0.0]], np.float32)
    got = np.asarray(renormalized(jnp.asarray(w), jnp.asarray(idx), jnp.asarray(left)))
    of_all = np.float32(np.float32(w[0, 0] + w[0, 1]) + w[0, 2])
    np.testing.assert_array_equal(got[0], w[0] * (of_all / np.float32(w[0, 0] + w[0, 2])))
    np.testing.assert_array_equal(got[1:], w[1:])  # none left, all left, and weights of 0


def test_moe_in_fp8_and_with_overlap():
    problem = PROBLEMS["fp8_rows"]
    num_local = problem.num_experts // problem.num_ranks
    matrices = weights_of_experts(problem)
    by_rank = [
        m.reshape(problem.num_ranks, num_local, *m.shape[1:]).astype(problem.np_dtype)
        for m in matrices
    ]
    mask = np.arange(problem.num_ranks) != 1
    left = masked(problem, mask)
    outs = []
    for given, masks in ((problem, [masks_of(problem, mask)]), (left, [])):
        with make_group(given, "ffi") as group:

            def on_rank(x, idx, w, *rest, group=group):
                mask = rest[3] if len(rest) > 3 else None
                return jax_ep.moe(
                    x, idx, w, *rest[:3], group=group, rank_mask=mask, overlap=jnp.cos
                )

            outs.append(over_ranks(group, on_rank)(*halves.arguments(given), *by_rank, *masks))
    halves.assert_same_bits(*outs)


@pytest.mark.parametrize(
    "mask", [np.ones(3, bool), np.ones(4, np.int32), np.ones((4, 1), bool), [True] * 4]
)
@pytest.mark.parametrize("operation", ["dispatch", "dispatch_start"])
def test_what_is_no_mask_is_refused(mask, operation):
    f = getattr(jax_ep, operation)
    with (
        make_group(PROBLEM, "ffi") as group,
        pytest.raises(ValueError, match=r"rank_mask is .*; allowed: .*bool\[4\], or None"),
    ):
        over_ranks(group, lambda x, idx: f(x, idx, group=group, rank_mask=mask))(
            PROBLEM.x, PROBLEM.topk_idx
        )
