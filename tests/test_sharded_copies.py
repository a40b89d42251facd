# SPDX-License-Identifier: Apache-2.0
"""`sharded_moe` with copies of experts, masks of ranks, and what they lose."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jax_ep
from ep_testing import dense_experts as dense
from ep_testing.dense_experts import E, H, K, assert_trees_close, make_group
from ep_testing.hlo import operands
from jax_ep import experts, reference

RANKS, SLOTS = 4, 3
ROW = ((RANKS,), ("expert",))
DATA = ((2, RANKS), ("data", "expert"))
FSDP = ((2, 2, 2), ("fsdp", "tensor", "expert"))
SPLIT = {"tensor_axes": "tensor", "fsdp_axes": "fsdp"}
ONE_OUT = np.array([True, True, False, True])
WEIGHTS = dense.random_weights()


def plan_of(*, seed=0, num_ranks=RANKS, slots_per_rank=SLOTS):
    load = np.exp(2 * np.random.default_rng(seed).standard_normal(E))
    return jax_ep.plan_placement(
        load, num_ranks=num_ranks, slots_per_rank=slots_per_rank, max_copies=num_ranks
    )


def without(arrays, expert):
    """The placement without any copy of one expert."""
    slots = np.where(arrays.slot_expert == expert, -1, arrays.slot_expert)
    is_out = np.arange(E)[:, None] == expert
    tables = (np.where(is_out, -1, table) for table in (arrays.copies, arrays.upper))
    return jax_ep.PlacementArrays(*map(jnp.asarray, (slots, *tables)), num_ranks=arrays.num_ranks)


def own_weights(num_slots=RANKS * SLOTS):
    """Copies that differ, so that outputs tell which was chosen."""
    rng = np.random.default_rng(3)
    shapes = {name: array.shape[1:] for name, array in WEIGHTS.items()}
    return {
        name: jnp.asarray(rng.standard_normal((num_slots, *shape)) * 0.3, jnp.float32)
        for name, shape in shapes.items()
    }


def value_and_grads(f, *args):
    def loss(*args):
        out, stats = f(*args)
        target = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
        return (out * target).sum(), (out, stats)

    (_, aux), grads = jax.value_and_grad(loss, argnums=range(len(args)), has_aux=True)(*args)
    return aux, grads


@pytest.mark.parametrize("mask", [None, ONE_OUT])
@pytest.mark.parametrize("has_ids", [False, True])
def test_as_place_and_moe_in_shard_map(mask, has_ids, backend):
    x, idx, w = dense.random_tokens((RANKS * 5,))
    idx = idx.at[::4, 1].set(-1)
    ids = jnp.arange(len(x), dtype=jnp.uint32) * 977 if has_ids else None
    arrays, split, whole = plan_of().layer(0), P("expert"), P()
    with make_group(*ROW, backend=backend, num_experts=RANKS * SLOTS) as group:

        @functools.partial(
            jax.shard_map,
            mesh=group.mesh,
            in_specs=(split, split, split, split, split, whole, whole),
            out_specs=(split, split),
        )
        def on_ranks(x, idx, w, p, ids, arrays, mask):
            slots = jax_ep.place(idx, arrays, group=group, token_ids=ids)
            out, stats = jax_ep.moe_with_experts(
                x, slots, w, experts.gated(**p), group=group, rank_mask=mask, with_stats=True
            )
            return out, stats.tokens_per_expert

        def sharded(x, w, p):
            out, stats = jax_ep.sharded_moe(
                x, idx, w, experts.gated(**p), group=group, token_spec=split,
                placement=arrays, token_ids=ids, rank_mask=mask, with_stats=True,
            )  # fmt: skip
            return out, stats.tokens_per_expert

        def by_hand(x, w, p):
            return on_ranks(x, idx, w, p, ids, arrays, mask)

        args = x, w, own_weights()
        (got, load), grads = jax.jit(functools.partial(value_and_grads, sharded))(*args)
        (want, want_load), want_grads = jax.jit(functools.partial(value_and_grads, by_hand))(*args)
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(load, want_load)
    assert_trees_close(grads, want_grads)


def oracle(arrays, mask, x, idx, w, *, ids=None, renormalize=False):
    """Of one row of ranks: outputs, selections by slot, and how many are lost."""
    chosen, weights, rows = (np.asarray(a).reshape(RANKS, -1, a.shape[-1]) for a in (idx, w, x))
    token_ids = None if ids is None else np.asarray(ids).reshape(RANKS, -1)
    slots = reference.place(chosen, arrays.copies, arrays.upper, token_ids=token_ids)
    num = RANKS * SLOTS
    left = reference.plan(slots, num_experts=num, rank_mask=mask).topk_idx
    weights = weights.astype(np.float64)
    if renormalize:
        rest = np.where(left >= 0, weights, 0).sum(axis=-1, keepdims=True)
        asked = np.where(chosen >= 0, weights, 0).sum(axis=-1, keepdims=True)
        weights = weights * asked / np.where(rest == 0, 1, rest)
    p = {name: value for name, value in own_weights().items() if name.startswith("w_")}
    out = reference.moe_dense(rows, left, weights, p["w_gate"], p["w_up"], p["w_down"])
    load = np.bincount(left[left >= 0], minlength=num)
    return out.reshape(x.shape), load, int(((chosen >= 0) & (left < 0)).sum())


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("renormalize", [False, True])
def test_what_is_lost_is_counted_once_over_the_mesh(renormalize, explicit):
    """To a mask, and as an expert has no copy: two rows of ranks, against the oracle."""
    x, idx, w = dense.random_tokens((2, RANKS * 3))
    idx = idx.at[:, ::4, 1].set(-1)
    arrays = without(plan_of().layer(0), 5)
    matrices = {n: a for n, a in own_weights().items() if n.startswith("w_")}
    with make_group(*DATA, explicit=explicit, num_experts=RANKS * SLOTS) as group:
        with jax.set_mesh(group.mesh):
            out, stats = jax_ep.sharded_moe(
                x, idx, w, experts.gated(**matrices), group=group, token_spec=P("data", "expert"),
                placement=arrays, rank_mask=ONE_OUT, renormalize=renormalize, with_stats=True,
            )  # fmt: skip
        tokens = zip(x, idx, w, strict=True)
        rows = [oracle(arrays, ONE_OUT, *row, renormalize=renormalize) for row in tokens]
    want, loads, lost = zip(*rows, strict=True)
    np.testing.assert_allclose(out, np.stack(want), rtol=2e-4, atol=2e-4)
    np.testing.assert_array_equal(stats.tokens_per_expert, sum(loads))
    assert int(stats.num_lost) == sum(lost) > 0
    assert int(stats.num_lost + stats.tokens_per_expert.sum()) == int((idx >= 0).sum())


@pytest.mark.parametrize(
    ("mesh", "token_spec", "axes"),
    [
        (DATA, P("data"), {}),
        (FSDP, P(("fsdp", "expert")), SPLIT),
        (FSDP, P("fsdp", ("expert", "tensor")), SPLIT),  # tokens are gathered over "tensor"
    ],
)
@pytest.mark.parametrize("explicit", [False, True])
def test_copies_on_any_mesh(mesh, token_spec, axes, explicit):
    """As without copies; tokens that do not divide, padding, gradients summed over copies."""
    lead = (2, 7)
    x, idx, w = dense.random_tokens(lead)
    mask = jnp.arange(14).reshape(lead) % 5 != 1
    ids = jnp.arange(14, dtype=jnp.int32).reshape(lead)
    num_ranks = mesh[0][-1]
    plan = plan_of(num_ranks=num_ranks, slots_per_rank=12 // num_ranks)
    arrays = plan.layer(0)
    with make_group(*mesh, explicit=explicit, num_experts=12) as group, jax.set_mesh(group.mesh):

        def sharded(x, w, p):
            stored = {name: a[arrays.slot_expert] for name, a in p.items()}
            return jax_ep.sharded_moe(
                x, idx, w, experts.gated(**stored), group=group, token_spec=token_spec, mask=mask,
                placement=arrays, token_ids=ids, with_stats=True, **axes,
            )  # fmt: skip

        run = jax.jit(functools.partial(value_and_grads, sharded))
        (out, stats), grads = jax.device_get(run(x, w, WEIGHTS))
    kept = jnp.where(mask[..., None], idx, -1)
    run = functools.partial(value_and_grads, lambda x, w, p: (dense.block(x, kept, w, p), None))
    (want, _), want_grads = run(x, w, WEIGHTS)
    assert_trees_close((out, grads), jax.device_get((want, want_grads)))
    load = np.bincount(plan.slot_expert[0], stats.tokens_per_expert, minlength=E)
    np.testing.assert_array_equal(load, np.bincount(kept[kept >= 0], minlength=E))
    assert int(stats.num_lost) == 0


def test_num_lost_is_none_where_nothing_can_be():
    x, idx, w = dense.random_tokens((16,))
    options = {"token_spec": P(("data", "expert")), "with_stats": True}
    lost = {}
    with make_group(*DATA) as group:
        for name, mask in (("none", None), ("all", np.ones(4, bool)), ("out", np.zeros(4, bool))):
            _, stats = jax_ep.sharded_moe(
                x, idx, w, experts.gated(**WEIGHTS), group=group, rank_mask=mask, **options
            )
            lost[name] = stats.num_lost
    assert lost == {"none": None, "all": 0, "out": 16 * K}


def test_the_mask_is_an_operand_of_the_exchange():
    """Results do not say whether anybody waits for a rank that is left out."""
    x, idx, w = dense.random_tokens((16,))
    with make_group(*ROW) as group:

        @jax.jit
        def layer(mask):
            return jax_ep.sharded_moe(
                x, idx, w, experts.gated(**WEIGHTS), group=group, token_spec=P("expert"),
                rank_mask=mask,
            )  # fmt: skip

        found = [operands(layer.lower(m).compile().as_text()) for m in (None, ONE_OUT)]
    assert found[0] == {"plan_dispatch": 5, "combine": 6}
    assert found[1] == {"plan_dispatch": 6, "combine": 7}


def test_another_placement_compiles_nothing():
    x, idx, w = dense.random_tokens((RANKS * 4,))
    ids = np.arange(len(x), dtype=np.int32)
    first, second = plan_of(seed=0).layer(0), plan_of(seed=1).layer(0)
    assert (first.slot_expert != second.slot_expert).any()
    matrices = {n: a for n, a in own_weights().items() if n.startswith("w_")}
    traces = []
    with make_group(*ROW, num_experts=RANKS * SLOTS) as group:

        def layer(x, arrays, mask, ids):
            traces.append(1)
            return jax_ep.sharded_moe(
                x, idx, w, experts.gated(**matrices), group=group, token_spec=P("expert"),
                placement=arrays, rank_mask=mask, token_ids=ids,
            )  # fmt: skip

        run = jax.jit(layer)
        for arrays in (first, second, without(second, 2)):
            for mask in (ONE_OUT, ~ONE_OUT):
                for own_ids in (ids, ids[::-1]):
                    want, _, _ = oracle(arrays, mask, x, idx, w, ids=own_ids)
                    got = run(x, arrays, mask, own_ids)
                    np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-4)
                    np.testing.assert_allclose(
                        layer(x, arrays, mask, own_ids), got, rtol=1e-5, atol=1e-5
                    )
        (kept,) = (f for f in group._kept.values() if hasattr(f, "_cache_size"))
        assert run._cache_size() == 1
        assert len(traces) == 1 + 12  # 12 are the calls without jit
        assert kept._cache_size() <= 2  # the one within `run`, and by itself


BAD = [
    ({"placement": (1, 2)}, "placement is a tuple; allowed: a PlacementArrays, as ExpertPlacement"),
    ({"placement": plan_of()}, "placement is a ExpertPlacement; allowed: a PlacementArrays, as"),
    (
        {"placement": plan_of(slots_per_rank=4).layer(0)},
        r"placement.slot_expert is int32\[16\]; allowed: int32\[12\], a slot for each of EpConfig",
    ),
    (
        {"placement": plan_of(num_ranks=6, slots_per_rank=2).layer(0)},
        "placement is a placement for 6 ranks; allowed: one for the group's 4",
    ),
    (
        {"placement": jax_ep.PlacementArrays(*np.zeros((3, 12), np.int32))},
        r"placement.copies is int32\[12\]; allowed: int32\[E, J\]",
    ),
    ({"token_ids": np.zeros(3, np.int32)}, r"token_ids is int32\[3\]; allowed: int32\[16\], or u"),
    ({"token_ids": np.zeros(16, bool)}, r"token_ids is bool\[16\]; allowed: int32\[16\], or u"),
    ({"rank_mask": np.ones(3, bool)}, r"rank_mask is bool\[3\]; allowed: bool\[4\], or None"),
    ({"rank_mask": np.ones(4, int)}, r"rank_mask is int64\[4\]; allowed: bool\[4\], or None"),
    (
        {"experts": experts.gated(**WEIGHTS)},
        rf"w_gate is float32\[8, {H}, 24\]; allowed: float32\[12, {H}, 24\], of the group's 12",
    ),
]


@pytest.mark.parametrize(("changed", "message"), BAD)
def test_errors_say_what_is_allowed(changed, message):
    x, idx, w = dense.random_tokens((16,))
    arguments = {"topk_idx": idx, "topk_weights": w, "experts": experts.gated(**own_weights())}
    arguments |= {"placement": plan_of().layer(0), "token_spec": P("expert")} | changed
    with make_group(*ROW, num_experts=RANKS * SLOTS) as group:

        def run(x):
            return jax_ep.sharded_moe(x, group=group, **arguments)

        with pytest.raises(ValueError, match=message):
            jax.eval_shape(run, x)
