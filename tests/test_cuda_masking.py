# SPDX-License-Identifier: Apache-2.0
"""Handlers for platform CUDA whose calls say who was missing; launches are written down."""

import ctypes
import dataclasses

import numpy as np
import pytest

import jax_ep
from ep_testing import fake_cudart
from ep_testing.cuda_calls import Sizes, buffers, call, groups_of_two

OPERATIONS = ("plan_dispatch", "combine")
SIZES = Sizes(masks=True, scalars=False)


@pytest.fixture
def fake(monkeypatch):
    fake = fake_cudart.install(monkeypatch, devices=4)
    yield fake
    fake.check_clean()


@pytest.fixture
def make_group(fake):
    with groups_of_two() as make:
        yield make


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_kernel_knows_where_to_say_who_is_missing(operation, masked, fake, make_group):
    sizes = dataclasses.replace(SIZES, masked=masked)
    group = make_group(on_timeout="mask", low_latency_tokens=4)
    arrays = buffers(operation, sizes)
    call(fake, operation, group.group_id, arrays, sizes)
    (launch,) = fake.launches()
    assert launch["missing_ranks"] == arrays["missing_ranks"].ctypes.data
    assert (launch["rank_mask"] != 0) == masked
    assert launch["given_up"] != 0


@pytest.mark.parametrize("operation", OPERATIONS)
def test_without_that_a_missing_rank_is_an_error(operation, fake, make_group):
    sizes = dataclasses.replace(SIZES, masks=False)
    group = make_group(low_latency_tokens=4)
    call(fake, operation, group.group_id, buffers(operation, sizes), sizes)
    (launch,) = fake.launches()
    assert launch["missing_ranks"] == 0
    assert launch["given_up"] == 0


@pytest.mark.parametrize("operation", OPERATIONS)
def test_other_kernels_miss_nobody(operation, fake, make_group):
    """Of more tokens than the low-latency kernels serve: these wait as in a group that fails."""
    group = make_group(on_timeout="mask", low_latency_tokens=2)
    few = dataclasses.replace(SIZES, num_tokens=2)
    call(fake, operation, group.group_id, buffers(operation, few), few)
    # The fake runtime writes to its own memory alone: some of the rank's heap stands for a result.
    address = fake.launches()[-1]["heap"][0]
    missing = np.ctypeslib.as_array((ctypes.c_bool * 2).from_address(address))
    before = len(fake.lines("calls"))
    arrays = buffers(operation, SIZES) | {"missing_ranks": missing}
    call(fake, operation, group.group_id, arrays, SIZES)
    calls = fake.lines("calls")[before:]
    assert not [line for line in calls if line.startswith("launch_low_latency")]
    assert len([line for line in calls if line.startswith("launch_")]) == 1
    assert [line for line in calls if line.startswith("cudaMemsetAsync")]


@pytest.mark.parametrize(
    ("config", "refused"),
    [
        ({"low_latency_tokens": 4}, False),
        ({"low_latency_tokens": 4, "hidden": 6}, True),
        ({"low_latency_tokens": 4, "hidden": 6, "dtype": "bfloat16"}, True),
        ({"low_latency_tokens": 4, "hidden": 8, "wire_dtype": "float8_e4m3fn"}, True),
        ({"low_latency_tokens": 4, "layout": "rank"}, False),
    ],
)
def test_rows_that_the_kernels_do_not_take_are_refused_with_the_group(config, refused, make_group):
    if not refused:
        make_group(on_timeout="mask", **config)
        return
    with pytest.raises(jax_ep.EpUnavailable, match="do not serve calls of 4 tokens of this config"):
        make_group(on_timeout="mask", **config)


def test_a_rank_is_given_up_in_groups_that_go_on(fake, make_group):
    group = make_group(on_timeout="mask", low_latency_tokens=4)
    group.give_up_on([1])
    call(fake, "combine", group.group_id, buffers("combine", SIZES), SIZES)
    assert fake.launches()[0]["given_up"] != 0
