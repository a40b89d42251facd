# SPDX-License-Identifier: Apache-2.0
"""`sharded_moe` against a dense block: meshes, padding, what is gathered, errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jax_ep
from ep_testing import dense_experts as dense
from ep_testing.dense_experts import E, F, H, K, assert_trees_close, make_group
from ep_testing.hlo import collectives
from jax_ep import experts

WEIGHTS = dense.random_weights()
DATA = ((2, 4), ("data", "expert"))
SEQUENCE = ((2, 4), ("sequence", "expert"))
FSDP = ((2, 2, 2), ("fsdp", "tensor", "expert"))
SPLIT = {"tensor_axes": "tensor", "fsdp_axes": "fsdp"}


def value_and_grads(f, x, *args):
    target = jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape)

    def loss(*args):
        return (f(*args) * target).sum()

    return jax.value_and_grad(loss, argnums=range(1 + len(args)))(x, *args)


def assert_equals_dense(mesh, lead, token_spec, *, mask=None, explicit=False, **axes):
    x, idx, w = dense.random_tokens(lead)
    with make_group(*mesh, explicit=explicit) as group, jax.set_mesh(group.mesh):

        def moe(x, w, p):
            bound = experts.gated(**p)
            return jax_ep.sharded_moe(
                x, idx, w, bound, group=group, token_spec=token_spec, mask=mask, **axes
            )

        got = jax.jit(functools.partial(value_and_grads, moe))(x, w, WEIGHTS)
    kept = idx if mask is None else jnp.where(mask[..., None], idx, -1)
    want = value_and_grads(lambda x, w, p: dense.block(x, kept, w, p), x, w, WEIGHTS)
    assert_trees_close(jax.device_get(got), jax.device_get(want))


@pytest.mark.parametrize(
    ("mesh", "lead", "token_spec", "axes"),
    [
        (DATA, (16,), P(("data", "expert")), {}),
        (SEQUENCE, (4, 6), P("expert", "sequence"), {}),
        (FSDP, (4, 6), P(("fsdp", "expert")), SPLIT),
        (FSDP, (4, 6), P("fsdp"), SPLIT),  # the group's axis splits further
        (FSDP, (4, 4), P("fsdp", ("expert", "tensor")), SPLIT),  # gathered and reduce-scattered
        (FSDP, (8,), P(("fsdp", "tensor", "expert")), {"tensor_axes": ("tensor",)}),
    ],
)
def test_forward_and_gradients_on_meshes(mesh, lead, token_spec, axes):
    assert_equals_dense(mesh, lead, token_spec, **axes)


@pytest.mark.parametrize(
    ("mesh", "lead", "token_spec"),
    [
        (DATA, (3, 5), P("data")),
        (DATA, (1,), P()),
        (SEQUENCE, (3, 7), P(None, ("sequence", "expert"))),
    ],
)
@pytest.mark.parametrize("explicit", [False, True])
def test_what_does_not_divide_is_padded(mesh, lead, token_spec, explicit):
    mask = jnp.arange(np.prod(lead)).reshape(lead) % 3 != 1
    assert_equals_dense(mesh, lead, token_spec, mask=mask, explicit=explicit)


def test_explicit_axes():
    assert_equals_dense(FSDP, (4, 6), P("fsdp", "expert"), explicit=True, **SPLIT)


def _placed(mesh, tree, spec):
    return jax.tree.map(lambda a: jax.device_put(a, NamedSharding(mesh, spec)), tree)


@pytest.mark.parametrize(
    ("mesh", "token_spec", "weight_spec", "axes", "forward", "backward"),
    [
        (DATA, P(("data", "expert")), P("expert"), {}, {}, None),
        # One sum of the tokens' outputs, one of their gradients; the weights stay where they are.
        (
            FSDP,
            P(("fsdp", "expert")),
            {"w_gate": P("expert", None, "tensor"), "w_down": P("expert", "tensor")},
            {"tensor_axes": "tensor"},
            {"all-reduce": 1},
            None,
        ),
        # Each of the weights once, and its gradient once.
        (
            FSDP,
            P(("fsdp", "expert")),
            {"w_gate": P("expert", "fsdp", "tensor"), "w_down": P("expert", "tensor", "fsdp")},
            SPLIT,
            {"all-gather": 3, "all-reduce": 1},
            {"reduce-scatter": 3},
        ),
    ],
)
def test_nothing_is_gathered_that_is_not_needed(
    mesh, token_spec, weight_spec, axes, forward, backward
):
    weights = dense.random_weights(biases=False)
    lead = (16,)
    with make_group(*mesh) as group:

        def moe(x, idx, w, p):
            bound = experts.gated(**p)
            return jax_ep.sharded_moe(x, idx, w, bound, group=group, token_spec=token_spec, **axes)

        x, idx, w = _placed(group.mesh, dense.random_tokens(lead), token_spec)
        specs = {"w_gate": weight_spec, "w_up": weight_spec, "w_down": weight_spec}
        if isinstance(weight_spec, dict):
            specs = {**weight_spec, "w_up": weight_spec["w_gate"]}
        placed = {n: _placed(group.mesh, weights[n], specs[n]) for n in weights}
        text = jax.jit(moe).lower(x, idx, w, placed).compile().as_text()
        assert collectives(text) == forward

        def loss(x, w, p):
            return (moe(x, idx, w, p) * x).sum()

        grads = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
        found = collectives(grads.lower(x, w, placed).compile().as_text())
        for kind, count in (backward or {}).items():
            assert found[kind] == count, found
        assert found["all-gather"] == forward.get("all-gather", 0), found
        assert "all-to-all" not in found
        assert "collective-permute" not in found
        out = jax.jit(moe)(x, idx, w, placed)
        assert out.sharding.is_equivalent_to(NamedSharding(group.mesh, token_spec), out.ndim)
        for name, grad in grads(x, w, placed)[2].items():
            assert grad.sharding.is_equivalent_to(placed[name].sharding, 3), name


def test_statistics_are_those_of_the_whole_mesh():
    for mesh, token_spec, axes in [
        (FSDP, P(("fsdp", "expert")), SPLIT),
        (FSDP, P("fsdp", ("expert", "tensor")), SPLIT),
        (DATA, P("data"), {}),
    ]:
        x, idx, w = dense.random_tokens((4, 4))
        with make_group(*mesh) as group:
            _, stats = jax_ep.sharded_moe(
                x, idx, w, experts.gated(**WEIGHTS), group=group, token_spec=token_spec,
                with_stats=True, **axes,
            )  # fmt: skip
        np.testing.assert_array_equal(
            stats.tokens_per_expert, np.bincount(np.ravel(idx), minlength=E)
        )
        assert int(stats.num_dropped) == 0


def test_quantized_and_low_rank_weights_are_split_with_the_others():
    x, idx, w = dense.random_tokens((4, 4))
    rng = np.random.default_rng(0)
    values = jnp.asarray(rng.integers(-100, 100, (E, H, F)), jnp.int8)
    quantized = experts.QuantizedMatrices(values, jnp.full((E, 1, F), 0.01, jnp.float32))
    a, b = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((E, F, 3), (E, 3, H)))
    rest = {n: v for n, v in WEIGHTS.items() if n not in ("w_up", "w_down")}
    bound = experts.gated(w_up=quantized, w_down=experts.LowRank(WEIGHTS["w_down"], a, b), **rest)
    with make_group(*FSDP) as group:
        got = jax_ep.sharded_moe(
            x, idx, w, bound, group=group, token_spec=P(("fsdp", "expert")), **SPLIT
        )
    low_rank = WEIGHTS["w_down"] + jnp.einsum("efr,erh->efh", a, b, precision="highest")
    weights = {**rest, "w_up": quantized.dequantize(jnp.float32), "w_down": low_rank}
    assert_trees_close(got, dense.block(x, idx, w, weights))


@pytest.mark.parametrize("blocks", [1, 2, 4, H])
def test_scales_of_blocks_are_gathered_with_their_values(blocks):
    # Of two blocks along H, a device of two along the FSDP axis has one.
    x, idx, w = dense.random_tokens((4, 4))
    rng = np.random.default_rng(0)

    def quantized(shape, scales):
        values = jnp.asarray(rng.integers(-100, 100, shape), jnp.int8)
        parts = jnp.asarray(rng.random(scales) / 100, jnp.float32)
        return experts.QuantizedMatrices(values, parts)

    up, down = ((E, blocks, F), (E, F, blocks))
    parts = {
        "w_gate": quantized((E, H, F), up),
        "w_up": quantized((E, H, F), up),
        "w_down": quantized((E, F, H), down),
    }
    with make_group(*FSDP) as group:
        got = jax_ep.sharded_moe(
            x, idx, w, experts.gated(**parts), group=group, token_spec=P("fsdp"), **SPLIT
        )
    whole = {name: part.dequantize(jnp.float32) for name, part in parts.items()}
    assert_trees_close(got, dense.block(x, idx, w, whole))


def test_tensor_axes_need_something_to_split():
    x, idx, w = dense.random_tokens((16,))
    square = {"w": jnp.ones((E, H, H))}
    custom = experts.custom(lambda recv, p: recv.x, square, {"w": ("experts", "hidden", None)})
    with make_group(*FSDP) as group, pytest.raises(ValueError, match=r"no weight with .* 'ffn'"):
        jax_ep.sharded_moe(
            x, idx, w, custom, group=group, token_spec=P("fsdp"), tensor_axes="tensor"
        )


def test_no_tokens_where_tensor_axes_split_them():
    x, idx, w = dense.random_tokens((4, 0))
    with make_group(*FSDP) as group:
        got = jax_ep.sharded_moe(
            x,
            idx,
            w,
            experts.gated(**WEIGHTS),
            group=group,
            token_spec=P("fsdp", "tensor"),
            **SPLIT,
        )
    assert got.shape == (4, 0, H)


def test_stages_of_a_pipeline_by_vmap():
    x, idx, w = dense.random_tokens((2, 8))
    stacked = jax.tree.map(lambda a: jnp.stack([a, a * 0.5]), WEIGHTS)
    with make_group((2, 4), ("stage", "expert")) as group:

        def stage(x, idx, w, p):
            spec = P("expert")
            return jax_ep.sharded_moe(x, idx, w, experts.gated(**p), group=group, token_spec=spec)

        mapped = jax.jit(jax.vmap(stage, spmd_axis_name="stage"))
        got = mapped(x, idx, w, stacked)
        text = mapped.lower(x, idx, w, stacked).compile().as_text()
    assert_trees_close(got, jax.vmap(dense.block)(x, idx, w, stacked))
    assert "all-gather" not in text  # each device has the tokens of its stage alone


def test_experts_are_padded():
    experts_, lead = 6, (8,)
    weights = {n: w[:experts_] for n, w in WEIGHTS.items()}
    x, idx, w = dense.random_tokens(lead)
    idx = jnp.asarray(
        np.argsort(np.random.default_rng(0).random((*lead, experts_)), -1)[:, :K], jnp.int32
    )
    with make_group(*DATA, num_experts=experts_, pad_experts=True) as group:

        def moe(x, w, p):
            spec = P(("data", "expert"))
            return jax_ep.sharded_moe(x, idx, w, experts.gated(**p), group=group, token_spec=spec)

        got = value_and_grads(moe, x, w, weights)
    want = value_and_grads(lambda x, w, p: dense.block(x, idx, w, p), x, w, weights)
    assert_trees_close(got, want)


BAD = [
    ({"token_spec": "data"}, "token_spec is 'data'; allowed: a jax.sharding.PartitionSpec"),
    ({"token_spec": P("model")}, "allowed: distinct axes of the mesh"),
    ({"token_spec": P(None, "fsdp")}, "x has 2 dimensions; allowed: axes for all but the last"),
    ({"tensor_axes": "expert"}, "tensor_axes is 'expert'; allowed: distinct axes of the mesh out"),
    ({"fsdp_axes": "tensor"}, r"fsdp_axes is \('tensor',\); allowed: axes that split the tokens"),
    ({"experts": lambda recv: recv.x}, "experts is a function; allowed: what jax_ep.experts"),
    (
        {"x": jnp.zeros((16, H), jnp.bfloat16)},
        r"x is bfloat16\[16, 16\]; allowed: float32\[..., 16",
    ),
    ({"mask": jnp.ones(16)}, r"mask is float32\[16\]; allowed: bool\[16\]"),
    ({"x": jnp.zeros((256, H))}, r"allowed: int32\[256, 2\]"),
    (
        {"experts": experts.gated(**dense.random_weights(biases=False) | {"w_up": None})},
        "w_up is a NoneType; allowed: an array, float32",
    ),
]


@pytest.mark.parametrize(("changed", "message"), BAD)
def test_errors_say_what_is_allowed(changed, message):
    x, idx, w = dense.random_tokens((16,))
    with make_group(*FSDP) as group:
        arguments = {
            "x": x,
            "topk_idx": idx,
            "topk_weights": w,
            "experts": experts.gated(**WEIGHTS),
        }
        arguments |= {"group": group, "token_spec": P(("fsdp", "expert"))} | changed
        with pytest.raises(ValueError, match=message):
            jax_ep.sharded_moe(**arguments)


def test_too_many_tokens_for_a_device():
    x, idx, w = dense.random_tokens((64,))
    group = make_group(*DATA, max_tokens_per_rank=7)
    with (
        group,
        pytest.raises(ValueError, match=r"x has 64 tokens, 8 on each of 8 devices .* is 7"),
    ):
        jax_ep.sharded_moe(x, idx, w, experts.gated(**WEIGHTS), group=group, token_spec=P("data"))


def test_axes_that_do_not_divide_the_weights():
    x, idx, w = dense.random_tokens((16,))
    odd = {n: a[..., :23] if n in ("w_gate", "w_up") else a for n, a in WEIGHTS.items()}
    odd = {n: a for n, a in odd.items() if not n.startswith("bias")} | {
        "w_down": WEIGHTS["w_down"][:, :23]
    }
    with (
        make_group(*FSDP) as group,
        pytest.raises(ValueError, match=r"tensor_axes has .*divide 23"),
    ):
        jax_ep.sharded_moe(
            x, idx, w, experts.gated(**odd), group=group, token_spec=P("fsdp"), tensor_axes="tensor"
        )


def test_inside_of_shard_map_it_says_what_to_call():
    x, idx, w = dense.random_tokens((16,))
    with make_group(*DATA) as group:

        def on_rank(x, idx, w):
            bound = experts.gated(**WEIGHTS)
            return jax_ep.sharded_moe(x, idx, w, bound, group=group, token_spec=P())

        spec = P(("data", "expert"))
        f = jax.shard_map(on_rank, mesh=group.mesh, in_specs=spec, out_specs=spec)
        with pytest.raises(ValueError, match=r"inside of jax\.shard_map.*call jax_ep\.route"):
            jax.eval_shape(f, x, idx, w)
