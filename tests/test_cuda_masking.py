# SPDX-License-Identifier: Apache-2.0
"""Handlers for platform CUDA whose calls say who was missing; launches are written down."""

import dataclasses

import pytest

from ep_testing import fake_cudart
from ep_testing.cuda_calls import Sizes, buffers, call, groups_of_two, refusal

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
    group = make_group(low_latency_tokens=4)
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


@pytest.mark.parametrize("tokens", [0, 2])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_other_kernels_refuse_to_leave_ranks_out(operation, tokens, fake, make_group):
    group = make_group(low_latency_tokens=tokens)
    message = refusal(fake, operation, group.group_id, buffers(operation, SIZES), SIZES)
    assert 'on_timeout is "mask"' in message
    assert "low_latency_tokens" in message
    assert fake.launches() == []
