# SPDX-License-Identifier: Apache-2.0
"""The handlers of halves for platform CUDA: what they launch, and what they refuse.

They are called as XLA would call them; the kernels' launches are written down.
"""

import dataclasses

import numpy as np
import pytest

from ep_testing import fake_cudart
from ep_testing.cuda_calls import HALVES, Sizes, buffers, call, groups_of_two, refusal
from jax_ep._src.groups.group import backend_group

FP8 = "float8_e4m3fn"
SIZES = Sizes(scalars=False)
VARIANTS = {
    "expert": SIZES,
    "rank": Sizes(layout="rank", recv_capacity=12, scalars=False),
    "bfloat16": Sizes(dtype="bfloat16", scalars=False),
    "unweighted": Sizes(scalars=False, weighted=False),
    "masked": Sizes(scalars=False, masked=True),
    "no_tokens": Sizes(num_tokens=0, scalars=False),
    "fp8": Sizes(x_dtype=FP8, rows_dtype=FP8, dtype="bfloat16", scalars=False),
}
FIRST, SECOND = 1, 2  # as the kernels number them


@pytest.fixture
def fake(monkeypatch):
    fake = fake_cudart.install(monkeypatch, devices=2)
    yield fake
    fake.check_clean()


@pytest.fixture
def make_group(fake):
    with groups_of_two(low_latency_tokens=3) as make:

        def make_for(sizes=SIZES, **config):
            of_sizes = {
                "dtype": sizes.dtype, "layout": sizes.layout, "wire_dtype": sizes.wire_dtype,
            }  # fmt: skip
            return make(**of_sizes, **config)

        yield make_for


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_kernel_gets_what_the_half_was_given(half, variant, fake, make_group):
    sizes = VARIANTS[variant]
    group = make_group(sizes)
    arrays = buffers(half, sizes)
    call(fake, half, group.group_id, arrays, sizes, device=1, stream=0x5000)

    (launch,) = fake.launches()
    assert (launch["operation"], launch["device"], launch["stream"]) == (HALVES[half], 1, 0x5000)
    assert [line for line in fake.lines("calls") if line.startswith("launch_low_latency")]
    assert launch["half"] == (FIRST if half.endswith("_start") else SECOND)
    for name, array in arrays.items():
        is_absent = name.endswith("_scales") and not array.size
        assert name == "after" or is_absent or launch[name] == array.ctypes.data, name
    assert launch["recv_capacity"] == sizes.recv_capacity
    assert launch["num_tokens"] == sizes.num_tokens


@pytest.mark.parametrize("operation", ["plan_dispatch", "combine"])
def test_a_whole_exchange_has_no_ticket(operation, fake, make_group):
    call(fake, operation, make_group().group_id, buffers(operation, SIZES), SIZES)
    (launch,) = fake.launches()
    assert (launch["half"], launch["ticket"]) == (0, 0)


@pytest.mark.parametrize("operation", ["dispatch", "combine"])
def test_ranks_whose_first_halves_differ_are_told_apart(operation, fake, make_group):
    """As of calls in one piece, and the same from one run to the next."""
    half = f"{operation}_start"
    group = make_group()
    for tokens, capacity, site in [(3, 10, 1), (3, 10, 1), (2, 10, 1), (3, 12, 1), (3, 10, 2)]:
        sizes = dataclasses.replace(SIZES, num_tokens=tokens, recv_capacity=capacity)
        call(fake, half, group.group_id, buffers(half, sizes), sizes, call_site=np.int32(site))
    first, again, *others = (launch["call_tag"] for launch in fake.launches())
    assert first == again
    assert len({first, *others}) == 4


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize(
    ("config", "changes"),
    [
        ({"low_latency_tokens": None}, {}),
        ({"low_latency_tokens": 2}, {}),
        ({"hidden": 15}, {"hidden": 15}),
    ],
)
def test_a_call_that_has_no_halves_is_refused(half, config, changes, fake, make_group):
    """Python asks before it traces halves; a program may have been made for another group."""
    sizes = dataclasses.replace(SIZES, **changes)
    group = make_group(**config)
    message = refusal(fake, half, group.group_id, buffers(half, sizes), sizes)
    assert message == (
        f"FAILED_PRECONDITION: half of a {HALVES[half]} of a call that has none: the program was "
        "traced with a group of another config"
    )
    assert not fake.launches()


@pytest.mark.parametrize("half", HALVES)
def test_a_bad_ticket_is_named(half, fake, make_group):
    arrays = buffers(half, SIZES) | {"ticket": np.zeros(3, np.uint32)}
    message = refusal(fake, half, make_group().group_id, arrays, SIZES)
    assert message.startswith("INVALID_ARGUMENT: buffer 'ticket' is"), message
    assert not fake.launches()


@pytest.mark.parametrize("half", ["dispatch_done", "combine_done"])
def test_a_second_half_without_ticket_is_refused(half, fake, make_group):
    arrays = buffers(half, SIZES)
    del arrays["ticket"], arrays["after"]
    message = refusal(fake, half, make_group().group_id, arrays, SIZES)
    assert "operands; expected at least" in message
    assert not fake.launches()


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("name", ["program_rank", "topk_idx"])
def test_a_bad_operand_is_named(half, name, fake, make_group):
    arrays = buffers(half, SIZES)
    arrays[name] = arrays[name].astype(np.uint16)
    message = refusal(fake, half, make_group().group_id, arrays, SIZES)
    assert message.startswith(f"INVALID_ARGUMENT: buffer '{name}' is"), message
    assert not fake.launches()


# --- which calls have halves ---------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("low_latency_tokens", [None, 2, 3])
def test_the_group_knows_which_calls_have_halves(variant, low_latency_tokens, fake, make_group):
    """What it says, by which programs are traced, is what the handlers do."""
    sizes = VARIANTS[variant]
    group = make_group(sizes, low_latency_tokens=low_latency_tokens)
    backend = backend_group(group)
    quantized = sizes.x_dtype is not None
    said = {
        "plan_dispatch": backend.dispatches_in_halves(sizes.num_tokens, quantized=quantized),
        "combine": backend.combines_in_halves(sizes.num_tokens),
    }
    for operation, in_halves in said.items():
        call(fake, operation, group.group_id, buffers(operation, sizes), sizes)
        launched = [line for line in fake.lines("calls") if line.startswith("launch_")][-1]
        assert in_halves == launched.startswith("launch_low_latency"), operation
    assert all(said.values()) == (
        low_latency_tokens is not None and sizes.num_tokens <= low_latency_tokens
    )
