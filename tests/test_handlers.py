# SPDX-License-Identifier: Apache-2.0
"""The FFI handlers check every buffer and attribute themselves, whatever the Python above does.

They are called without the primitives, by one rank on one device.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_ep._src.groups import native

T, K, H, C, E = 3, 2, 4, 6, 4
_GROUP_IDS = itertools.count(1)
I32, F32 = np.int32, np.float32


@pytest.fixture
def group_id():
    ext = native.load()
    native.register_targets()
    group = next(_GROUP_IDS)
    ext.create_group(
        group_id=group,
        name="EpGroup of one rank",
        num_ranks=1,
        warn_after_s=2.5,
        timeout_s=5.0,
        ranks=[(jax.devices()[0].id, 0, 0)],
    )
    yield group
    ext.close_group(group)


def _attrs(group_id, **changes):
    attrs = {
        "group_id": np.int64(group_id),
        "num_ranks": I32(1),
        "num_experts": I32(E),
        "num_topk": I32(K),
        "expert_alignment": I32(1),
        "layout": I32(0),
    }
    return {**attrs, **changes}


def _struct(shape, dtype=I32):
    return jax.ShapeDtypeStruct(shape, dtype)


# name -> shape, dtype of operands and results; and the attributes beside "ep".
TARGETS = {
    "jax_ep_plan": (
        {"program_rank": ((1,), I32), "topk_idx": ((T, K), I32)},
        {
            "slot": ((T, K), I32),
            "row_source": ((C,), I32),
            "row_topk_idx": ((0,), I32),
            "source_slot": ((0,), I32),
            "group_sizes": ((E,), I32),
            "tokens_per_expert": ((E,), I32),
            "num_dropped": ((), I32),
        },
        {},
    ),
    "jax_ep_dispatch": (
        {
            "program_rank": ((1,), I32),
            "x": ((T, H), F32),
            "x_scales": ((0,), F32),
            "token_scalars": ((T, K), F32),
            "row_weights": ((C,), F32),
            "y": ((C, H), F32),
            "topk_idx": ((T, K), I32),
            "slot": ((T, K), I32),
            "row_source": ((C,), I32),
        },
        {
            "rows": ((C, H), F32),
            "rows_scales": ((0,), F32),
            "row_scalars": ((C,), F32),
            "row_dots": ((C,), F32),
        },
        {"dtype": I32(0), "wire": I32(0), "zero_fill": np.bool_(True)},
    ),
    "jax_ep_plan_dispatch": (
        {
            "program_rank": ((1,), I32),
            "x": ((T, H), F32),
            "x_scales": ((0,), F32),
            "token_scalars": ((T, K), F32),
            "topk_idx": ((T, K), I32),
        },
        {
            "slot": ((T, K), I32),
            "row_source": ((C,), I32),
            "row_topk_idx": ((0,), I32),
            "source_slot": ((0,), I32),
            "group_sizes": ((E,), I32),
            "tokens_per_expert": ((E,), I32),
            "num_dropped": ((), I32),
            "rows": ((C, H), F32),
            "rows_scales": ((0,), F32),
            "row_scalars": ((C,), F32),
        },
        {"dtype": I32(0), "wire": I32(0), "zero_fill": np.bool_(True)},
    ),
    "jax_ep_combine": (
        {
            "program_rank": ((1,), I32),
            "y": ((C, H), F32),
            "weights": ((C,), F32),
            "row_scalars": ((C,), F32),
            "topk_idx": ((T, K), I32),
            "slot": ((T, K), I32),
        },
        {"out": ((T, H), F32), "token_scalars": ((T, K), F32)},
        {"domain_size": I32(1)},
    ),
}


def _call(
    target,
    group_id,
    *,
    buffers=None,
    attrs=None,
    ep=None,
    values=None,
    more=None,
    more_results=None,
    less=None,
):
    """Calls a target with some shapes, attributes or values replaced; returns its results.

    `more` are further operands, and `more_results` results; `less` names one that is left out.
    """
    operands, results, others = TARGETS[target]
    buffers = buffers or {}
    operands, results = {**operands, **(more or {})}, {n: results[n] for n in results if n != less}
    results |= more_results or {}
    unknown = set(buffers) - set(operands) - set(results)
    assert not unknown
    operands = {n: buffers.get(n, s) for n, s in operands.items()}
    results = [_struct(*buffers.get(n, s)) for n, s in results.items()]
    values = {"topk_idx": np.tile(np.arange(K), (T, 1)), **(values or {})}
    arrays = [
        jnp.asarray(values[n] if n in values and n not in buffers else np.zeros(shape), dtype)
        for n, (shape, dtype) in operands.items()
    ]
    call = jax.ffi.ffi_call(target, results)
    out = jax.jit(
        lambda *a: call(*a, ep=_attrs(group_id, **(ep or {})), **{**others, **(attrs or {})})
    )(*arrays)
    return jax.block_until_ready(out)


def _refusal(*args, **kwargs) -> str:
    with pytest.raises(jax.errors.JaxRuntimeError) as caught:
        _call(*args, **kwargs)
    message = str(caught.value)
    assert "INVALID_ARGUMENT" in message
    return message


@pytest.mark.parametrize("target", TARGETS)
def test_well_formed_calls_are_accepted(target, group_id):
    _call(target, group_id)


BUFFERS = [(target, name) for target, parts in TARGETS.items() for p in parts[:2] for name in p]


# The plan's row_source has no other size to agree with: it says what the capacity is.
SIZED = [b for b in BUFFERS if b != ("jax_ep_plan", "row_source")]


@pytest.mark.parametrize(("target", "name"), SIZED)
def test_a_buffer_of_another_shape_is_named(target, name, group_id):
    operands, results, _ = TARGETS[target]
    shape, dtype = {**operands, **results}[name]
    wrong = (*shape[:-1], shape[-1] + 1) if shape else (1,)
    message = _refusal(target, group_id, buffers={name: (wrong, dtype)})
    # Two buffers disagree: whichever is named, both sizes are shown.
    assert "buffer '" in message, message
    assert "expected" in message, message


@pytest.mark.parametrize(("target", "name"), BUFFERS)
def test_a_buffer_of_another_rank_is_named(target, name, group_id):
    operands, results, _ = TARGETS[target]
    shape, dtype = {**operands, **results}[name]
    message = _refusal(target, group_id, buffers={name: ((*shape, 1, 1), dtype)})
    assert f"buffer '{name}' is " in message, message


@pytest.mark.parametrize(("target", "name"), BUFFERS)
def test_a_buffer_of_another_dtype_is_named(target, name, group_id):
    operands, results, _ = TARGETS[target]
    shape, _ = {**operands, **results}[name]
    message = _refusal(target, group_id, buffers={name: (shape, np.uint16)})
    assert f"buffer '{name}' is XLA type" in message, message
    assert "expected " in message, message


@pytest.mark.parametrize("target", TARGETS)
def test_a_call_with_other_numbers_of_buffers_is_refused(target, group_id):
    operands, results, _ = TARGETS[target]
    message = _refusal(target, group_id, less=list(results)[-1])
    got = f"the call has {len(operands)} operands and {len(results) - 1} results"
    assert f"{got}; expected {len(operands)} and {len(results)}" in message, message
    message = _refusal(target, group_id, more={**RANK_MASK, "other": ((3,), np.int32)})
    got = f"the call has {len(operands) + 2} operands and {len(results)} results"
    assert f"{got}; expected {len(operands) + 1} and {len(results)}" in message, message


# The operand that a call may have one more of.
RANK_MASK = {"rank_mask": ((1,), np.bool_)}


@pytest.mark.parametrize("target", TARGETS)
def test_the_rank_mask_is_the_last_operand(target, group_id):
    _call(target, group_id, more=RANK_MASK, values={"rank_mask": np.ones(1, np.bool_)})
    message = _refusal(target, group_id, more={"rank_mask": ((3,), np.int32)})
    assert "buffer 'rank_mask' is int32[3]; expected bool[1]" in message, message
    message = _refusal(target, group_id, more={"rank_mask": ((2,), np.bool_)})
    assert "buffer 'rank_mask' is bool[2]; expected bool[1]" in message, message


@pytest.mark.parametrize("target", TARGETS)
def test_missing_ranks_are_the_last_result(target, group_id):
    def missing(*shape, dtype=np.bool_):
        return {"more_results": {"missing_ranks": (shape, dtype)}}

    if target not in ("jax_ep_plan_dispatch", "jax_ep_combine"):
        message = _refusal(target, group_id, **missing(1))
        results = len(TARGETS[target][1])
        assert f"and {results + 1} results; expected" in message, message
        return
    out = _call(target, group_id, **missing(1))
    assert np.asarray(out[-1]).tolist() == [False]
    for wrong, text in ((missing(2), "bool[2]"), (missing(1, dtype=np.int32), "int32[1]")):
        message = _refusal(target, group_id, **wrong)
        assert f"buffer 'missing_ranks' is {text}; expected bool[1]" in message, message


def test_rows_of_combine_go_in_and_out_in_one_dtype(group_id):
    shape = TARGETS["jax_ep_combine"][1]["out"][0]
    message = _refusal("jax_ep_combine", group_id, buffers={"out": (shape, jnp.bfloat16)})
    assert "buffer 'out' is bfloat16; expected the dtype of 'y', float32" in message


@pytest.mark.parametrize("name", ["x", "rows"])
def test_rows_of_dispatch_have_the_dtype_that_its_attribute_says(name, group_id):
    operands, results, _ = TARGETS["jax_ep_dispatch"]
    shape = {**operands, **results}[name][0]
    message = _refusal("jax_ep_dispatch", group_id, buffers={name: (shape, jnp.bfloat16)})
    assert (
        f"buffer '{name}' is bfloat16[{shape[0]}, 4]; expected float32 or float8_e4m3f" in message
    )


FP8 = {"x": ((T, H), jnp.float8_e4m3fn), "rows": ((C, H), jnp.float8_e4m3fn)}
SCALES = {"x_scales": ((T, 1), F32), "rows_scales": ((C, 1), F32)}


@pytest.mark.parametrize("name", ["x", "rows"])
def test_quantized_rows_come_with_their_scales_and_on_their_wire(name, group_id):
    rows = {name: FP8[name], **NO_WEIGHTS, **NO_DOTS}
    both = {**rows, f"{name}_scales": SCALES[f"{name}_scales"]}
    wire = {"wire": I32(1)}
    _call("jax_ep_dispatch", group_id, buffers=both, attrs=wire)
    message = _refusal("jax_ep_dispatch", group_id, buffers=rows, attrs=wire)
    expected = f"float32[{FP8[name][0][0]}, 1]"
    assert f"buffer '{name}_scales' is float32[0]; expected {expected}" in message
    message = _refusal("jax_ep_dispatch", group_id, buffers=both)
    assert f"{name} is float8_e4m3fn, but wire is same; allowed: wire float8_e4m3fn" in message
    scales = {f"{name}_scales": SCALES[f"{name}_scales"], **NO_WEIGHTS, **NO_DOTS}
    message = _refusal("jax_ep_dispatch", group_id, buffers=scales, attrs=wire)
    assert f"buffer '{name}_scales' is {expected}; expected float32[0]" in message


NO_WEIGHTS = {"row_weights": ((0,), F32)}
NO_DOTS = {"y": ((C, 0), F32), "row_dots": ((0,), F32)}


def test_products_of_dispatch_can_be_left_out(group_id):
    for absent in (NO_WEIGHTS, NO_DOTS, NO_WEIGHTS | NO_DOTS):
        _call("jax_ep_dispatch", group_id, buffers=absent)


@pytest.mark.parametrize("name", NO_DOTS)
def test_dot_products_come_with_their_operand(name, group_id):
    message = _refusal("jax_ep_dispatch", group_id, buffers={name: NO_DOTS[name]})
    got, expected = (C, 0) if name == "y" else (0, C)
    assert f"buffer 'row_dots' is float32[{got}]; expected float32[{expected}]" in message


def test_rows_of_products_have_one_dtype(group_id):
    message = _refusal("jax_ep_dispatch", group_id, buffers={"y": ((C, H), jnp.bfloat16)})
    assert "buffer 'y' is bfloat16; expected the dtype of 'x', float32" in message


@pytest.mark.parametrize(("name", "absent"), [("row_weights", NO_DOTS), ("y", NO_WEIGHTS)])
def test_products_are_of_rows_that_are_not_quantized(name, absent, group_id):
    wire = {"wire": I32(1)}
    message = _refusal("jax_ep_dispatch", group_id, buffers=absent, attrs=wire)
    assert f"{name} is given, and wire is float8_e4m3fn; allowed: wire same" in message
    _call("jax_ep_dispatch", group_id, buffers=NO_WEIGHTS | NO_DOTS, attrs=wire)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("num_ranks", 0, "1 or more"),
        ("num_experts", 0, "a positive multiple of num_ranks"),
        ("num_topk", 0, "1 to num_experts"),
        ("expert_alignment", 0, "1 or more"),
        ("layout", 2, "0 (expert), 1 (rank)"),
    ],
)
def test_a_bad_attribute_is_named(target, name, value, allowed, group_id):
    message = _refusal(target, group_id, ep={name: I32(value)})
    assert f"{name} is {value}; allowed: {allowed}" in message, message


def test_a_bad_dtype_is_named(group_id):
    for bad in (-1, 3):
        message = _refusal("jax_ep_dispatch", group_id, attrs={"dtype": I32(bad)})
        allowed = "0 (float32), 1 (bfloat16), 2 (float16)"
        assert f"attribute dtype is {bad}; allowed: {allowed}" in message


def test_a_bad_domain_size_is_named(group_id):
    _call("jax_ep_combine", group_id, attrs={"domain_size": I32(0)})
    for bad in (-1, 2):
        message = _refusal("jax_ep_combine", group_id, attrs={"domain_size": I32(bad)})
        assert f"domain_size is {bad}; allowed: 0, or a divisor of num_ranks, 1" in message


def test_a_bad_wire_is_named(group_id):
    message = _refusal("jax_ep_dispatch", group_id, attrs={"wire": I32(7)})
    assert "attribute wire is 7; allowed: 0 (same), 1 (float8_e4m3fn)" in message


@pytest.mark.parametrize("rank", [-1, 1])
def test_a_program_that_takes_the_device_for_another_rank_is_refused(rank, group_id):
    with pytest.raises(jax.errors.JaxRuntimeError) as caught:
        _call("jax_ep_plan", group_id, values={"program_rank": np.array([rank])})
    assert f"runs plan as rank {rank} on a device that is rank 0 of its" in str(caught.value)


@pytest.mark.parametrize("target", ["jax_ep_dispatch", "jax_ep_combine"])
@pytest.mark.parametrize(("name", "value"), [("slot", C), ("slot", -2), ("topk_idx", E)])
def test_a_handle_that_points_outside_is_refused_before_anything_is_written(
    target, name, value, group_id
):
    bad = np.tile(np.arange(K), (T, 1))
    bad[1, 1] = value
    message = _refusal(target, group_id, values={name: bad})
    assert name in message, message
    assert str(value) in message, message


def test_an_unknown_group_is_refused():
    native.register_targets()
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"FAILED_PRECONDITION.*has not made"):
        _call("jax_ep_plan", 10**9)
