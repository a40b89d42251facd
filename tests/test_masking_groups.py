# SPDX-License-Identifier: Apache-2.0
"""`EpGroup(on_timeout="mask")`: what its groups allow, and what they refuse."""

import copy
import pickle
import re
import types

import jax
import numpy as np
import pytest

import jax_ep
from ep_testing import fake_cuda, halves
from ep_testing.hlo import operands
from ep_testing.missing_ranks import (
    PROBLEM,
    came,
    expert_outputs,
    masking_group,
    round_trip,
    run_without,
)
from ep_testing.programs import make_group, make_mesh, over_ranks
from jax_ep._src.groups import native
from jax_ep._src.groups.cpu import CpuGroup
from jax_ep._src.groups.cuda import CudaGroup
from jax_ep._src.groups.group import backend_group


def test_lost_selections_by_hand():
    with masking_group(PROBLEM) as group:  # 2 experts a rank
        missing = np.isin(np.arange(8), [1, 6])
        idx = np.array([[0, 1, 4], [2, -1, -1], [-1, -1, -1], [5, 13, 0], [99, -7, 15]], np.int32)
        lost = jax_ep.lost_selections(idx, missing, group=group)
        assert np.asarray(lost).tolist() == [False, True, False, True, False]
        with pytest.raises(ValueError, match=r"missing is bool\[7\]; allowed: bool\[8\]"):
            jax_ep.lost_selections(idx, missing[1:], group=group)
        with pytest.raises(ValueError, match=r"topk_idx is int32\[5, 2\]; allowed: int32\[T, 3\]"):
            jax_ep.lost_selections(idx[:, :2], missing, group=group)


def test_lost_selections_are_those_without_a_row():
    here = came(PROBLEM, 2, 7)
    (received, *_), _ = run_without(PROBLEM, here)
    with masking_group(PROBLEM) as group:
        for rank in np.flatnonzero(here):
            missing = received.missing_ranks[rank]
            lost = jax_ep.lost_selections(PROBLEM.topk_idx[rank], missing, group=group)
            without_row = (PROBLEM.topk_idx[rank] >= 0) & (received.handle.slot[rank] < 0)
            np.testing.assert_array_equal(lost, without_row.any(axis=1))


def test_weights_are_not_copied_over_groups_that_go_on_without_ranks():
    """Slots of a rank that is late would keep other weights than the tables say."""
    with masking_group(PROBLEM) as group:
        message = "{} is called, and EpGroup.on_timeout is 'mask'; use a group with on_timeout"
        with pytest.raises(ValueError, match=message.format("move_experts")):
            jax_ep.move_experts({}, old=None, new=None, group=group)
        with pytest.raises(ValueError, match=message.format("expand_experts")):
            jax_ep.expand_experts({}, None, group=group)


@pytest.mark.parametrize("on_timeout", ["error", "mask"])
def test_nobody_is_ever_missing_in_collectives_of_xla(on_timeout):
    with make_group(PROBLEM, "xla", on_timeout=on_timeout) as group:
        args = (*halves.arguments(PROBLEM), expert_outputs(PROBLEM))
        received, (_, lost), _ = over_ranks(group, lambda *a: round_trip(group, *a))(*args)
        assert lost.shape == (8, 8)
        assert not lost.any()
        if on_timeout == "error":
            assert received.missing_ranks is None
        else:
            assert not received.missing_ranks.any()
            group.give_up_on([0])


def test_combine_with_status_of_a_group_that_fails_is_combine():
    with make_group(PROBLEM, "ffi") as group:
        args = (*halves.arguments(PROBLEM), expert_outputs(PROBLEM))

        def both(x, idx, w, y):
            received = jax_ep.dispatch(x, idx, w, group=group)
            out, missing = jax_ep.combine_with_status(y, received.handle, group=group)
            assert received.missing_ranks is None
            return out, jax_ep.combine(y, received.handle, group=group), missing

        out, plain, missing = over_ranks(group, both)(*args)
        np.testing.assert_array_equal(out, plain)
        assert not missing.any()

        def loss(y, x, idx, w):
            received = jax_ep.dispatch(x, idx, w, group=group)
            return jax_ep.combine_with_status(y, received.handle, group=group)[0].sum()

        gradient = over_ranks(group, jax.grad(loss))(args[3], *args[:3])
        assert np.asarray(gradient).any()


def test_programs_of_groups_that_fail_are_what_they_were():
    """No operand and no result more: the text has none of masks."""
    with make_group(PROBLEM, "ffi") as group, masking_group(PROBLEM) as masking:

        def text(group):
            def f(x, idx, w):
                received = jax_ep.dispatch(x, idx, w, group=group)
                return jax_ep.combine_with_status(
                    received.x, received.handle, received.weights, group=group
                )[0]

            return halves.compiled_text(group, f, *halves.arguments(PROBLEM))

        assert operands(text(group)) == {"plan_dispatch": 5, "combine": 6}
        assert "pred[8]" not in text(group)
        assert operands(text(masking)) == {"plan_dispatch": 5, "combine": 7}
        assert "pred[8]" in text(masking)


REFUSED = {
    "combine": lambda g, x, i, w, r: jax_ep.combine(r.x, r.handle, group=g),
    "combine_start": lambda g, x, i, w, r: jax_ep.combine_start(r.x, r.handle, group=g),
    "dispatch_start": lambda g, x, i, w, r: jax_ep.dispatch_start(x, i, w, group=g).ticket,
    "moe": lambda g, x, i, w, r: jax_ep.moe_with_experts(x, i, w, lambda recv: recv.x, group=g),
}


@pytest.mark.parametrize("operation", REFUSED)
@pytest.mark.parametrize("backend", ["ffi", "xla"])
def test_what_cannot_say_who_is_missing_is_refused(operation, backend):
    with masking_group(PROBLEM, backend) as group:

        def on_rank(x, idx, w):
            received = jax_ep.dispatch(x, idx, w, group=group)
            return REFUSED[operation](group, x, idx, w, received)

        text = (
            rf"{operation} is called, and EpGroup.on_timeout is 'mask'; use .*combine_with_status, "
            "so that missing_ranks is not overlooked"
        )
        with pytest.raises(ValueError, match=text):
            over_ranks(group, on_rank)(*halves.arguments(PROBLEM))


def test_moe_on_global_arrays_is_refused():
    x, idx, w = (a.reshape(-1, a.shape[-1]) for a in halves.arguments(PROBLEM))
    matrices = [np.zeros(shape, np.float32) for shape in ((16, 12, 4), (16, 12, 4), (16, 4, 12))]
    spec = jax.sharding.PartitionSpec("expert")
    experts = jax_ep.experts.gated(*matrices)
    with (
        masking_group(PROBLEM) as group,
        pytest.raises(ValueError, match=r"moe is called, and EpGroup.on_timeout is 'mask'"),
    ):
        jax_ep.sharded_moe(x, idx, w, experts, group=group, token_spec=spec)


@pytest.mark.parametrize("of", ["x", "w", "y"])
@pytest.mark.parametrize("backend", ["ffi", "xla"])
def test_gradients_are_refused(of, backend):
    with masking_group(PROBLEM, backend) as group:

        def loss(x, w, y, idx):
            received = jax_ep.dispatch(x, idx, w, group=group)
            out, _ = jax_ep.combine_with_status(y, received.handle, group=group)
            return out.sum() + received.x.sum() + received.weights.sum()

        x, idx, w = halves.arguments(PROBLEM)
        y = expert_outputs(PROBLEM)
        operation = "combine_with_status" if of == "y" else "dispatch"
        f = over_ranks(group, jax.grad(loss, argnums="xwy".index(of)))
        with pytest.raises(ValueError, match=f"{operation} is differentiated, and EpGroup.on_time"):
            f(x, w, y, idx)

        def cut(*args):
            return jax.grad(lambda x: loss(jax.lax.stop_gradient(x), *args[1:]) + x.sum())(args[0])

        assert (np.asarray(over_ranks(group, cut)(x, w, y, idx)) == 1).all()


def test_vmap_and_dead_code():
    """One exchange for each element, with its own missing ranks; and counts alone have them too."""
    with masking_group(PROBLEM, timeout=60.0) as group:
        masks = np.stack([came(PROBLEM, 0), came(PROBLEM), came(PROBLEM, 2, 3)], axis=0)
        masks = np.broadcast_to(masks, (8, 3, 8))

        def one(x, idx, w, mask):
            received = jax_ep.dispatch(x, idx, w, group=group, rank_mask=mask)
            out, missing = jax_ep.combine_with_status(received.x, received.handle, group=group)
            return received.tokens_per_expert, out, missing | received.missing_ranks

        f = over_ranks(group, jax.vmap(one, in_axes=(None, None, None, 0)))
        got = f(*halves.arguments(PROBLEM), masks)
        for i in range(3):
            want = over_ranks(group, one)(*halves.arguments(PROBLEM), masks[:, i])
            for a, b in zip(got, want, strict=True):
                np.testing.assert_array_equal(a[:, i], b)
        over_x = over_ranks(group, jax.vmap(one, in_axes=(0, None, None, None)))
        x, idx, w = halves.arguments(PROBLEM)
        twice = over_x(np.stack([x, 2 * x], axis=1), idx, w, masks[:, 0])
        np.testing.assert_array_equal(twice[0][:, 0], got[0][:, 0])
        np.testing.assert_array_equal(twice[1][:, 1], 2 * got[1][:, 0])

        def load(x, idx, w):
            return jax_ep.dispatch(x, idx, w, group=group).tokens_per_expert

        want = PROBLEM.plan.tokens_per_expert
        np.testing.assert_array_equal(over_ranks(group, load)(x, idx, w), want)


def test_the_group_says_what_it_does():
    with make_group(PROBLEM, "ffi") as group, masking_group(PROBLEM) as masking:
        assert (group.on_timeout, masking.on_timeout) == ("error", "mask")
        assert "on_timeout" not in repr(group)
        assert "backend='ffi', on_timeout='mask', config=EpConfig(" in repr(masking)
        assert {masking: 1}[masking] == 1
        assert hash(masking) != hash(group)
        assert masking != group
        assert copy.deepcopy(masking) is masking
        assert masking.health().ok
        with pytest.raises(TypeError, match="cannot be pickled"):
            pickle.dumps(masking)
        with pytest.raises(
            ValueError, match=r"give_up_on is called, and EpGroup.on_timeout is 'er"
        ):
            group.give_up_on([0])
        for ranks in ([8], [-1], [True], [1.0], ["0"]):
            with pytest.raises(ValueError, match=r"ranks is .*; allowed: ints from 0 to 7"):
                masking.give_up_on(ranks)
        with pytest.raises(ValueError, match=r"group_index is 1; allowed: None, or an int from 0"):
            masking.give_up_on([0], group_index=1)
    with pytest.raises(jax_ep.EpGroupClosed):
        masking.give_up_on([0])


def test_bad_groups_are_refused():
    with pytest.raises(ValueError, match=r"on_timeout is 'skip'; allowed: 'error', 'mask'"):
        make_group(PROBLEM, "ffi", on_timeout="skip")
    even = PROBLEM.replace(drop="even", capacity_factor=0.7)
    with pytest.raises(ValueError, match=r"on_timeout is 'mask', and EpConfig.drop is 'even'"):
        masking_group(even)


def test_a_group_that_cannot_go_on_is_not_given_one_that_fails(monkeypatch):
    """Where the kernels cannot serve: no fallback to collectives, unless they are asked for."""
    monkeypatch.setattr(native, "why_unavailable", lambda: "it was not built")
    config = jax_ep.EpConfig(**PROBLEM.config_kwargs())
    mesh = make_mesh((8,), ("expert",))
    with pytest.raises(jax_ep.EpUnavailable, match="cannot serve this group: it was not built"):
        jax_ep.EpGroup(mesh, "expert", config, on_timeout="mask")
    with jax_ep.EpGroup(mesh, "expert", config, on_timeout="mask", backend="xla") as group:
        assert group.on_timeout == "mask"


# --- on GPUs -----------------------------------------------------------------------------------


@pytest.fixture
def fake(monkeypatch):
    return fake_cuda.install(monkeypatch)


def _on_gpus(**config):
    sizes = {"num_experts": 8, "num_topk": 2, "hidden": 16, "max_tokens_per_rank": 4}
    arguments = {k: config.pop(k) for k in ("on_timeout", "tuning", "backend") if k in config}
    made = jax_ep.EpConfig(**{**sizes, **config})
    mesh = make_mesh((4,), ("expert",))
    return jax_ep.EpGroup(mesh, "expert", made, **{"on_timeout": "mask", **arguments})


@pytest.mark.parametrize("on_timeout", ["error", "mask"])
def test_the_module_for_gpus_is_told_whether_ranks_may_be_missing(on_timeout, fake):
    with _on_gpus(low_latency_tokens=4, on_timeout=on_timeout) as group:
        assert group.backend == "ffi"
        assert fake.groups[group.group_id]["masks"] == (on_timeout == "mask")
        # The kernels that say who was missing are in one piece.
        halves = backend_group(group).dispatches_in_halves(4, quantized=False)
        assert halves == backend_group(group).combines_in_halves(4) == (on_timeout == "error")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "serve no calls: EpConfig.low_latency_tokens is None; allowed: at least 1"),
        ({"low_latency_tokens": 0}, "EpConfig.low_latency_tokens is 0; allowed: at least 1"),
        (
            {"low_latency_tokens": 4, "domain_size": 2},
            "do not serve calls of 4 tokens of this config: rows must be a multiple of 16 bytes in "
            "all formats, and EpConfig.domain_size None, 1 or the number of ranks",
        ),
    ],
)
def test_groups_on_gpus_whose_calls_cannot_miss_ranks_are_refused(config, message, fake):
    for backend in (None, "ffi"):
        with pytest.raises(jax_ep.EpUnavailable, match=re.escape(message)):
            _on_gpus(**config, backend=backend)
    assert not fake.log
    with _on_gpus(**config, on_timeout="error") as group:
        assert group.backend == "ffi"


def test_the_dispatches_of_a_group_on_gpus_must_be_able_to_miss_ranks(fake, monkeypatch):
    asked = []

    def refuses(shape, **call):
        asked.append((shape.low_latency_tokens, call))
        return False

    monkeypatch.setattr(fake, "dispatch_is_low_latency", refuses)
    message = "do not serve calls of 3 tokens of this config: rows must be a multiple of 16 bytes"
    fp8 = {"wire_dtype": "float8_e4m3fn", "recv_dtype": "float8_e4m3fn"}
    with pytest.raises(jax_ep.EpUnavailable, match=message):
        _on_gpus(low_latency_tokens=3, **fp8)
    assert asked == [(3, {"num_tokens": 3, "fp8_x": False, "fp8_rows": True})]


def test_groups_on_gpus_that_span_domains_are_refused(fake, monkeypatch):
    monkeypatch.setenv("JAX_EP_NODE_RANKS", "2")
    message = "with on_timeout 'mask' its ranks must be in one domain, as those of one host are, "
    with pytest.raises(jax_ep.EpUnavailable, match=message + "and these are in domains of 2"):
        _on_gpus(low_latency_tokens=4)
    assert not fake.log


def test_tuning_may_say_which_calls_can_miss_ranks(fake):
    """What the config leaves open, and nothing else; no more tokens than the group has."""
    tuning = jax_ep.Tuning(low_latency_tokens=100)
    with _on_gpus(tuning=tuning) as group:
        held = fake.groups[group.group_id]
        assert (held["masks"], held["heap"].low_latency_tokens) == (True, 4)
    for config, said in (({"low_latency_tokens": 0}, tuning), ({}, jax_ep.Tuning()), ({}, "off")):
        with pytest.raises(jax_ep.EpUnavailable, match=r"low_latency_tokens is .*; allowed: at"):
            _on_gpus(tuning=said, **config)
    with pytest.raises(jax_ep.EpUnavailable, match="low_latency_tokens is 0; allowed: at least 1"):
        _on_gpus(tuning=jax_ep.Tuning(low_latency_tokens=0))


@pytest.mark.parametrize("kind", [CpuGroup, CudaGroup])
def test_the_compiled_modules_are_told_of_ranks_in_the_same_words(kind):
    told = []
    module = types.SimpleNamespace(give_up_on=lambda **kwargs: told.append(kwargs))
    group = types.SimpleNamespace(_module=module, group_id=7)
    kind.give_up_on(group, (3, 1), range(2))
    assert told == [{"group_id": 7, "group_indices": [0, 1], "ranks": [3, 1]}]
