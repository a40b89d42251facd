# SPDX-License-Identifier: Apache-2.0
"""The handlers for platform CUDA: what they launch, on which device, and what they refuse.

They are called as XLA would call them; the kernels' launches are written down.
"""

import dataclasses

import numpy as np
import pytest

from ep_testing import fake_cudart
from ep_testing.cuda_calls import (
    DTYPES,
    OPERATIONS,
    Sizes,
    buffers,
    call,
    groups_of_two,
    refusal,
)
from jax_ep._src.groups import cuda as cuda_group

FP8 = "float8_e4m3fn"
SIZES = Sizes()
VARIANTS = {
    "expert": SIZES,
    "rank": Sizes(layout="rank", recv_capacity=12),
    "bfloat16": Sizes(dtype="bfloat16"),
    "no_tokens": Sizes(num_tokens=0),
    "without_scalars": Sizes(scalars=False, weighted=False),
    "products": Sizes(products=True, dtype="float16"),
    "products_by_rank": Sizes(products=True, layout="rank", recv_capacity=12, scalars=False),
    "rank_unweighted": Sizes(layout="rank", weighted=False),
    "masked": Sizes(masked=True),
    "products_masked": Sizes(products=True, masked=True, layout="rank", recv_capacity=12),
    "fp8_in": Sizes(x_dtype=FP8),
    "fp8_out": Sizes(rows_dtype=FP8, layout="rank", recv_capacity=12, dtype="float16"),
    "fp8": Sizes(x_dtype=FP8, rows_dtype=FP8, dtype="bfloat16"),
}


@pytest.fixture
def fake(monkeypatch):
    fake = fake_cudart.install(monkeypatch, devices=4)
    yield fake
    fake.check_clean()


@pytest.fixture
def make_group(fake):
    with groups_of_two() as make:
        yield make


def _group_for(make_group, sizes):
    return make_group(layout=sizes.layout, dtype=sizes.dtype, wire_dtype=sizes.wire_dtype)


# --- what is launched --------------------------------------------------------------------------


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_kernel_gets_what_the_call_was_given(operation, variant, fake, make_group):
    sizes = VARIANTS[variant]
    group = _group_for(make_group, sizes)
    arrays = buffers(operation, sizes)
    call(fake, operation, group.group_id, arrays, sizes, device=1, stream=0x5000)

    (launch,) = fake.launches()
    assert (launch["operation"], launch["device"], launch["stream"]) == (operation, 1, 0x5000)
    for name, array in arrays.items():
        is_absent = name.endswith("_scales") and not array.size
        assert is_absent or launch[name] == array.ctypes.data, name
    expected = {
        "shape_num_ranks": 2, "num_experts": 8, "num_topk": 2, "num_tokens": sizes.num_tokens,
        "recv_capacity": sizes.recv_capacity, "expert_alignment": 1,
        "layout": int(sizes.layout == "rank"),
    }  # fmt: skip
    if operation != "plan":
        expected |= {"hidden": 16, "dtype": DTYPES.index(sizes.dtype)}
        expected["num_scalars"] = 2 if sizes.scalars else 0
    if "dispatch" in operation:
        formats = {"x": int(sizes.x_dtype == FP8), "rows": int(sizes.rows_dtype == FP8)}
        expected |= {"wire": max(formats.values()), "zero_fill": 1}
        expected |= {f"{name}_format": format for name, format in formats.items()}
        products = int(sizes.products and operation == "dispatch")
        expected |= {"weighted": products, "with_dots": products}
    if operation == "combine":
        expected["weighted"] = int(sizes.weighted)
    assert {name: launch[name] for name in expected} == expected


def _launched(fake, group, operation, sizes):
    """The kernels that a call launches, by their entry points, and how many blocks."""
    call(fake, operation, group.group_id, buffers(operation, sizes), sizes)
    name = [name for name in fake.lines("calls") if name.startswith("launch_")][-1]
    return name.removeprefix("launch_"), fake.launches()[-1]["blocks"]


LOW_LATENCY = {
    "plan_dispatch": "low_latency_dispatch",
    "combine": "low_latency_combine",
}


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_few_tokens_get_the_low_latency_kernels(operation, variant, fake, make_group):
    """Where the group has room for them; not a plan alone, and nothing of gradients."""
    sizes = VARIANTS[variant]
    group = make_group(
        layout=sizes.layout, dtype=sizes.dtype, wire_dtype=sizes.wire_dtype, low_latency_tokens=3
    )
    serves = operation == "plan_dispatch" or (operation == "combine" and not sizes.scalars)
    name, _ = _launched(fake, group, operation, sizes)
    assert name == (LOW_LATENCY[operation] if serves else operation)


@pytest.mark.parametrize("operation", LOW_LATENCY)
@pytest.mark.parametrize(
    ("config", "changed", "low_latency"),
    [
        ({}, {}, False),
        ({"low_latency_tokens": 0}, {}, False),
        ({"low_latency_tokens": 3}, {}, True),
        ({"low_latency_tokens": 4}, {"num_tokens": 0}, True),
        ({"low_latency_tokens": 3}, {"num_tokens": 4}, False),
        ({"low_latency_tokens": 4}, {"hidden": 0}, False),
        # Rows of 60 bytes.
        ({"low_latency_tokens": 4}, {"hidden": 15}, False),
        ({"low_latency_tokens": 4, "num_experts": 1088}, {"num_experts": 1088}, True),
        # 2 ranks with 256 tokens of 32 selections are as many as fit.
        (
            {"low_latency_tokens": 256, "max_tokens_per_rank": 256, "num_topk": 32},
            {"num_tokens": 256, "num_topk": 32},
            True,
        ),
    ],
)
def test_which_calls_are_low_latency_ones(
    operation, config, changed, low_latency, fake, make_group
):
    sizes = dataclasses.replace(SIZES, scalars=False, **changed)
    if sizes.num_topk > 8:
        config, sizes = {**config, "num_experts": 64}, dataclasses.replace(sizes, num_experts=64)
    name, _ = _launched(fake, make_group(**config), operation, sizes)
    assert name == (LOW_LATENCY[operation] if low_latency else operation)


@pytest.mark.parametrize("operation", LOW_LATENCY)
@pytest.mark.parametrize(("num_sms", "most"), [(None, 64), (1, 1), (3, 3)])
def test_low_latency_kernels_take_no_more_sms_than_they_may(
    operation, num_sms, most, fake, make_group
):
    sizes = dataclasses.replace(SIZES, scalars=False, num_tokens=128, hidden=4096)
    group = make_group(
        max_num_sms=num_sms, hidden=4096, max_tokens_per_rank=128, low_latency_tokens=128
    )
    assert _launched(fake, group, operation, sizes) == (LOW_LATENCY[operation], most)


@pytest.mark.parametrize("operation", ["dispatch", "combine", "plan_dispatch"])
def test_rows_that_do_not_travel_have_no_elements(operation, fake, make_group):
    sizes = dataclasses.replace(SIZES, hidden=0)
    group = make_group()
    call(fake, operation, group.group_id, buffers(operation, sizes), sizes)
    assert fake.launches()[0]["hidden"] == 0


def test_attributes_reach_the_kernel(fake, make_group):
    group = make_group(wire_dtype="float8_e4m3fn")
    for wire, zero_fill, alignment in [(0, True, 1), (1, False, 4)]:
        call(
            fake, "dispatch", group.group_id, buffers("dispatch", SIZES), SIZES,
            wire=np.int32(wire), zero_fill=np.bool_(zero_fill),
            ep_expert_alignment=np.int32(alignment),
        )  # fmt: skip
        launch = fake.launches()[-1]
        assert (launch["wire"], launch["zero_fill"]) == (wire, int(zero_fill))
        assert launch["expert_alignment"] == alignment


@pytest.mark.parametrize("operation", OPERATIONS)
def test_calls_are_told_apart(operation, fake, make_group):
    """By sizes and call site: so kernels notice ranks that are not alike."""
    group = make_group()
    for tokens, site in [(3, 1), (3, 1), (3, 2), (4, 1)]:
        sizes = dataclasses.replace(SIZES, num_tokens=tokens)
        arrays = buffers(operation, sizes)
        call(fake, operation, group.group_id, arrays, sizes, call_site=np.int32(site))
    first, again, of_other_site, of_other_size = (launch["call_tag"] for launch in fake.launches())
    assert first == again
    assert len({first, of_other_site, of_other_size}) == 3


def test_every_rank_sees_every_heap(fake, make_group):
    group = make_group(timeout=7.5)
    for device in range(2):
        call(fake, "plan", group.group_id, buffers("plan", SIZES), SIZES, device=device)
    first, second = fake.launches()
    assert (first["rank"], second["rank"]) == (0, 1)
    assert first["num_ranks"] == second["num_ranks"] == 2
    assert first["heap"] == second["heap"]
    assert len(set(first["heap"])) == 2
    for words in ("control", "error", "long_waits"):
        assert first[words] != second[words]
    assert first["report_ns"] <= 1_000_000_000
    assert first["timeout_ns"] == 7_500_000_000
    assert first["heap_bytes"] == group.heap_bytes


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize(("num_sms", "most"), [(None, None), (1, 1), (3, 3)])
def test_a_launch_takes_no_more_sms_than_it_may(operation, num_sms, most, fake, make_group):
    group = make_group(max_num_sms=num_sms, num_experts=512, max_tokens_per_rank=4096)
    sizes = dataclasses.replace(SIZES, num_experts=512, num_tokens=4096)
    call(fake, operation, group.group_id, buffers(operation, sizes), sizes)
    blocks = fake.launches()[0]["blocks"]
    assert blocks == (most or {"plan": 16}.get(operation, 24))


@pytest.mark.parametrize(("num_experts", "fits"), [(2048, True), (2050, False)])
def test_a_plan_of_many_experts_and_its_dispatch_are_two_kernels(
    num_experts, fits, fake, make_group
):
    group = make_group(num_experts=num_experts)
    sizes = dataclasses.replace(SIZES, num_experts=num_experts)
    arrays = buffers("plan_dispatch", sizes)
    call(fake, "plan_dispatch", group.group_id, arrays, sizes, stream=0x7000)
    launches = fake.launches()
    assert [launch["operation"] for launch in launches] == (
        ["plan_dispatch"] if fits else ["plan", "dispatch"]
    )
    for launch in launches:
        assert launch["stream"] == 0x7000
        for name in arrays.keys() & launch.keys():
            is_absent = name.endswith("_scales") and not arrays[name].size
            assert is_absent or launch[name] == arrays[name].ctypes.data, name


@pytest.mark.parametrize("kernel", ["plan", "dispatch"])
def test_a_failed_launch_of_the_two_is_reported(kernel, fake, make_group):
    group = make_group(num_experts=4096)
    sizes = dataclasses.replace(SIZES, num_experts=4096)
    fake.fail(f"launch_{kernel}")
    message = refusal(fake, "plan_dispatch", group.group_id, buffers("plan_dispatch", sizes), sizes)
    assert message.startswith("INTERNAL: cudaErrorUnknown "), message
    assert f"launch_{kernel}" in message
    assert len(fake.launches()) == (0 if kernel == "plan" else 1)


def test_groups_launch_on_their_own_heaps(fake, make_group):
    one, other = make_group(), make_group()
    for group in (one, other):
        call(fake, "plan", group.group_id, buffers("plan", SIZES), SIZES)
    heaps = [launch["heap"] for launch in fake.launches()]
    assert len({*heaps[0], *heaps[1]}) == 4


# --- what is refused ---------------------------------------------------------------------------

BUFFERS = [
    (operation, name, variant)
    for variant in ("rank", "fp8")
    for operation in (OPERATIONS if variant == "rank" else ("dispatch", "plan_dispatch"))
    for name in buffers(operation, VARIANTS[variant])
    if not ("plan" in operation and name == "row_source")  # says what the capacity is
]


@pytest.mark.parametrize(("operation", "name", "variant"), BUFFERS)
@pytest.mark.parametrize("change", ["shape", "rank", "dtype"])
def test_a_bad_buffer_is_named_and_nothing_is_launched(
    operation, name, variant, change, fake, make_group
):
    sizes = VARIANTS[variant]
    group = _group_for(make_group, sizes)
    arrays = buffers(operation, sizes)
    good = arrays[name]
    longer = (*good.shape[:-1], good.shape[-1] + 1) if good.shape else (1,)
    arrays[name] = {
        "shape": np.zeros(longer, good.dtype),
        "rank": good.reshape(*good.shape, 1, 1),
        "dtype": good.astype(np.uint16),
    }[change]
    message = refusal(fake, operation, group.group_id, arrays, sizes)
    assert message.startswith("INVALID_ARGUMENT: buffer '"), message
    assert change == "shape" or f"buffer '{name}' is" in message, message
    assert not fake.launches()


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize(
    ("attribute", "value", "words"),
    [
        ("ep_num_ranks", 0, "num_ranks is 0"),
        ("ep_layout", 2, "layout is 2"),
        ("ep_expert_alignment", 0, "expert_alignment is 0"),
    ],
)
def test_a_bad_attribute_is_named(operation, attribute, value, words, fake, make_group):
    group = make_group()
    arrays = buffers(operation, SIZES)
    message = refusal(
        fake, operation, group.group_id, arrays, SIZES, **{attribute: np.int32(value)}
    )
    assert message.startswith("INVALID_ARGUMENT: "), message
    assert words in message
    assert not fake.launches()


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_tokens": 5}, "5 tokens do not fit; the group's max_tokens_per_rank is 4"),
        ({"num_experts": 16}, "num_experts is 16, but the group has 8"),
        ({"num_topk": 3}, "num_topk is 3, but the group has 2"),
        ({"num_ranks": 4}, "num_ranks is 4, but the group has 2"),
        ({"layout": "rank"}, "layout is rank, but the group has expert"),
    ],
)
def test_a_call_of_another_group_is_refused(operation, changes, words, fake, make_group):
    group = make_group()
    sizes = dataclasses.replace(SIZES, **changes)
    message = refusal(fake, operation, group.group_id, buffers(operation, sizes), sizes)
    assert message == f"INVALID_ARGUMENT: {words}"
    assert not fake.launches()


@pytest.mark.parametrize("operation", ["dispatch", "combine", "plan_dispatch"])
def test_rows_longer_than_the_heaps_are_refused(operation, fake, make_group):
    group = make_group(dtype="bfloat16")
    message = refusal(fake, operation, group.group_id, buffers(operation, SIZES), SIZES)
    assert "rows of 16 float32 do not fit; the group has room for 16 bfloat16" in message
    assert not fake.launches()


@pytest.mark.parametrize(
    ("operation", "name"),
    [
        *(("dispatch", "x"), ("dispatch", "rows"), ("combine", "y"), ("combine", "out")),
        *(("plan_dispatch", "x"), ("plan_dispatch", "rows"), ("dispatch", "y")),
    ],
)
def test_rows_that_bulk_copies_cannot_reach_are_refused(operation, name, fake, make_group):
    group = make_group()
    sizes = SIZES
    if (operation, name) == ("dispatch", "y"):
        sizes = dataclasses.replace(SIZES, products=True)
    arrays = buffers(operation, sizes)
    rows = arrays[name]
    bytes_ = np.zeros(rows.nbytes + 16, np.uint8)
    arrays[name] = bytes_[4 : 4 + rows.nbytes].view(rows.dtype).reshape(rows.shape)
    message = refusal(fake, operation, group.group_id, arrays, sizes)
    assert message.startswith(f"INVALID_ARGUMENT: buffer '{name}' is at address 0x"), message
    assert "not a multiple of 16" in message
    assert not fake.launches()


@pytest.mark.parametrize(("variant", "named"), [("fp8_in", "x"), ("fp8_out", "rows"), ("fp8", "x")])
def test_quantized_rows_need_the_wire_that_carries_them(variant, named, fake, make_group):
    sizes = VARIANTS[variant]
    group = _group_for(make_group, sizes)
    arrays = buffers("dispatch", sizes)
    message = refusal(fake, "dispatch", group.group_id, arrays, sizes, wire=np.int32(0))
    assert message == (
        f"INVALID_ARGUMENT: {named} is float8_e4m3fn, but wire is same; allowed: wire float8_e4m3fn"
    )
    assert not fake.launches()


@pytest.mark.parametrize("name", ["x", "rows"])
def test_quantized_rows_that_bulk_copies_cannot_reach_are_refused(name, fake, make_group):
    sizes = VARIANTS["fp8"]
    group = _group_for(make_group, sizes)
    arrays = buffers("dispatch", sizes)
    rows = arrays[name]
    bytes_ = np.zeros(rows.nbytes + 16, np.uint8)
    arrays[name] = bytes_[4 : 4 + rows.nbytes].view(rows.dtype).reshape(rows.shape)
    message = refusal(fake, "dispatch", group.group_id, arrays, sizes)
    assert message.startswith(f"INVALID_ARGUMENT: buffer '{name}' is at address 0x"), message
    assert not fake.launches()


def test_a_wire_that_the_group_has_not_is_refused(fake, make_group):
    group = make_group()
    arrays = buffers("dispatch", SIZES)
    message = refusal(fake, "dispatch", group.group_id, arrays, SIZES, wire=np.int32(1))
    assert "wire is float8_e4m3fn, but the group's wire_dtype is not" in message


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_device_that_has_no_rank_is_refused(operation, fake, make_group):
    group = make_group()
    arrays = buffers(operation, SIZES)
    message = refusal(fake, operation, group.group_id, arrays, SIZES, device=2)
    assert message.startswith("FAILED_PRECONDITION: "), message
    assert "has no rank on CUDA device 2" in message


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_group_that_was_closed_is_refused(operation, fake, make_group):
    group = make_group()
    group.close()
    message = refusal(fake, operation, group.group_id, buffers(operation, SIZES), SIZES)
    assert message.startswith("FAILED_PRECONDITION: "), message
    assert operation in message
    assert not fake.launches()


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_group_that_is_not_connected_yet_is_refused(operation, fake, make_group, monkeypatch):
    refusals = []

    def connect(self, *args):
        for device in range(2):
            arrays = buffers(operation, SIZES)
            refusals.append(refusal(fake, operation, self.group_id, arrays, SIZES, device=device))
        real(self, *args)

    real = cuda_group.CudaGroup._connect
    monkeypatch.setattr(cuda_group.CudaGroup, "_connect", connect)
    group = make_group()
    assert refusals == [f"FAILED_PRECONDITION: {group.name} is not connected to its peers"] * 2
    assert not fake.launches()


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_group_that_never_was_is_refused(operation, fake):
    message = refusal(fake, operation, 987654321, buffers(operation, SIZES), SIZES)
    assert message.startswith("FAILED_PRECONDITION: "), message
    assert not fake.launches()


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("function", ["launch", "cudaGetDevice", "cudaSetDevice"])
def test_a_failed_launch_is_reported_with_its_call(operation, function, fake, make_group):
    group = make_group()
    function = f"launch_{operation}" if function == "launch" else function
    fake.fail(function)
    arrays = buffers(operation, SIZES)
    message = refusal(fake, operation, group.group_id, arrays, SIZES, device=1)
    assert message.startswith("INTERNAL: cudaErrorUnknown "), message
    assert function in message
    assert not fake.launches()
    call(fake, operation, group.group_id, arrays, SIZES, device=1)
