# SPDX-License-Identifier: Apache-2.0
"""EpConfig: what it accepts, what it says when it does not, and how many rows it makes room for."""

import dataclasses
import itertools
import os
import pathlib
import pickle
import re
import subprocess
import sys

import hypothesis
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jax_ep
from ep_testing import problems, strategies
from jax_ep import EpConfig, reference

SIZES = {"num_experts": 8, "num_topk": 2, "hidden": 16, "max_tokens_per_rank": 4}
INT32_MAX = 2**31 - 1


def make(**fields):
    return EpConfig(**{**SIZES, **fields})


def test_defaults():
    config = make()
    assert config.dtype == np.dtype(ml_dtypes.bfloat16)
    assert config.wire_dtype is None
    assert config.recv_dtype is None
    assert config.layout == "expert"
    assert config.recv_capacity is None
    assert config.capacity_factor is None
    assert config.expert_alignment == 1
    assert config.zero_fill is True
    assert config.drop == "rows"
    assert config.pad_experts is False
    assert config.max_num_sms is None
    assert config.tail_num_sms is None
    assert config.low_latency_tokens is None


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (jnp.float32, "float32"),
        (np.float32, "float32"),
        ("float32", "float32"),
        (np.dtype(np.float32), "float32"),
        (jnp.bfloat16, "bfloat16"),
        (ml_dtypes.bfloat16, "bfloat16"),
        ("bfloat16", "bfloat16"),
        (jnp.float16, "float16"),
        (np.zeros(0, np.float16).dtype, "float16"),
    ],
)
def test_dtypes_may_be_given_in_any_form(dtype, name):
    config = make(dtype=dtype)
    assert isinstance(config.dtype, np.dtype)
    assert config.dtype.name == name


@pytest.mark.parametrize("wire", [jnp.float8_e4m3fn, ml_dtypes.float8_e4m3fn, "float8_e4m3fn"])
def test_wire_dtypes_may_be_given_in_any_form(wire):
    assert make(wire_dtype=wire).wire_dtype == np.dtype(ml_dtypes.float8_e4m3fn)
    config = make(wire_dtype=wire, recv_dtype=wire)
    assert config.recv_dtype == np.dtype(ml_dtypes.float8_e4m3fn)
    assert config != make(wire_dtype=wire)


def test_an_old_name_is_refused_with_the_new_one():
    with pytest.raises(TypeError, match=r"EpConfig has no 'num_sms' .*'max_num_sms'"):
        make(num_sms=8)
    with pytest.raises(TypeError, match="'max_num_sms'"):
        dataclasses.replace(make(), num_sms=8)
    with pytest.raises(TypeError, match="no_such_field"):
        make(no_such_field=8)


_INT = f"an int from 1 to {INT32_MAX}"
_DTYPES = "allowed: float32, bfloat16, float16"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        *[
            ({field: value}, f"EpConfig.{field} is {value!r}; allowed: {_INT}")
            for field in (*SIZES, "expert_alignment")
            for value in (0, -1, 2.0, True, np.True_, "4", None, INT32_MAX + 1)
        ],
        *[
            (
                {"recv_capacity": value},
                f"EpConfig.recv_capacity is {value!r}; allowed: None or {_INT}",
            )
            for value in (0, -1, 2.5, False, INT32_MAX + 1)
        ],
        ({"max_num_sms": 0}, f"EpConfig.max_num_sms is 0; allowed: None or {_INT}"),
        (
            {"low_latency_tokens": -1},
            f"EpConfig.low_latency_tokens is -1; allowed: None or an int from 0 to {INT32_MAX}",
        ),
        (
            {"low_latency_tokens": 5},
            "EpConfig.low_latency_tokens is 5; allowed: None or an int from 0 to 4",
        ),
        (
            {"low_latency_tokens": 257, "max_tokens_per_rank": 512},
            "EpConfig.low_latency_tokens is 257; allowed: None or an int from 0 to 256",
        ),
        (
            {"tail_num_sms": -1},
            f"EpConfig.tail_num_sms is -1; allowed: None or an int from 0 to {INT32_MAX}",
        ),
        ({"max_num_sms": 1.5}, f"EpConfig.max_num_sms is 1.5; allowed: None or {_INT}"),
        (
            {"num_topk": 9},
            "EpConfig.num_topk is 9; it must be at most num_experts (8), because a token's "
            "experts are distinct",
        ),
        ({"dtype": jnp.float64}, f"EpConfig.dtype is 'float64'; {_DTYPES}"),
        ({"dtype": jnp.int32}, f"EpConfig.dtype is 'int32'; {_DTYPES}"),
        ({"dtype": "float8"}, f"EpConfig.dtype is 'float8'; {_DTYPES}"),
        ({"dtype": "float8_e4m3fn"}, f"EpConfig.dtype is 'float8_e4m3fn'; {_DTYPES}"),
        ({"dtype": None}, f"EpConfig.dtype is 'float64'; {_DTYPES}"),
        (
            {"wire_dtype": jnp.float8_e5m2},
            "EpConfig.wire_dtype is 'float8_e5m2'; allowed: None, float8_e4m3fn",
        ),
        (
            {"wire_dtype": "bfloat16"},
            "EpConfig.wire_dtype is 'bfloat16'; allowed: None, float8_e4m3fn",
        ),
        (
            {"wire_dtype": "float8_e4m3fn", "recv_dtype": "bfloat16"},
            "EpConfig.recv_dtype is 'bfloat16'; allowed: None, float8_e4m3fn",
        ),
        (
            {"recv_dtype": "float8_e4m3fn"},
            "EpConfig.recv_dtype is 'float8_e4m3fn' and wire_dtype None; allowed: recv_dtype None, "
            "or float8_e4m3fn for both, because rows are received as they travel",
        ),
        ({"layout": "row"}, "EpConfig.layout is 'row'; allowed: 'expert', 'rank'"),
        ({"layout": None}, "EpConfig.layout is None; allowed: 'expert', 'rank'"),
        (
            {"layout": "rank", "expert_alignment": 8},
            "EpConfig.expert_alignment is 8; layout 'rank' has no groups of experts to align, so "
            "it must be 1 there",
        ),
        ({"zero_fill": 1}, "EpConfig.zero_fill is 1; allowed: True, False"),
        ({"zero_fill": None}, "EpConfig.zero_fill is None; allowed: True, False"),
        ({"pad_experts": 1}, "EpConfig.pad_experts is 1; allowed: True, False"),
        ({"drop": "fair"}, "EpConfig.drop is 'fair'; allowed: 'rows', 'even'"),
        ({"drop": None}, "EpConfig.drop is None; allowed: 'rows', 'even'"),
        ({"drop": ["even"]}, "EpConfig.drop is ['even']; allowed: 'rows', 'even'"),
        (
            {"drop": "even", "layout": "rank"},
            "EpConfig.drop is 'even' and layout 'rank'; allowed: drop 'rows', or layout 'expert', "
            "whose rows belong to one expert each",
        ),
    ],
)
def test_a_bad_field_is_named(fields, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make(**fields)


def test_fields_are_keyword_only():
    with pytest.raises(TypeError, match="positional argument"):
        EpConfig(8, 2, 16, 4)


def test_is_frozen_hashable_and_equal_by_value():
    one = make(dtype="bfloat16", wire_dtype="float8_e4m3fn", num_topk=np.int64(2))
    other = make(dtype=jnp.bfloat16, wire_dtype=jnp.float8_e4m3fn, zero_fill=np.True_)
    assert one == other
    assert hash(one) == hash(other)
    assert len({one, other, make()}) == 2
    assert type(one.num_topk) is int
    assert type(other.zero_fill) is bool
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.hidden = 3  # pyrefly: ignore
    assert pickle.loads(pickle.dumps(one)) == one


def test_replace_checks_again():
    with pytest.raises(ValueError, match=r"EpConfig\.hidden is 0"):
        dataclasses.replace(make(), hidden=0)


def test_no_jax_is_needed():
    code = "import sys; sys.modules['jax'] = None; import jax_ep; print(jax_ep.EpConfig(**{}))"
    done = subprocess.run(
        [sys.executable, "-c", code.format(SIZES)],
        env={**os.environ, "PYTHONPATH": str(pathlib.Path(jax_ep.__file__).parent.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.startswith("EpConfig(num_experts=8"), done.stderr


def rows_needed(tokens_per_expert, align):
    return sum(-(-n // align) * align for n in tokens_per_expert)


@pytest.mark.parametrize("align", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("num_topk", [1, 2, 3])
@pytest.mark.parametrize(("num_tokens", "num_local"), [(1, 1), (1, 4), (2, 2), (3, 3), (4, 2)])
def test_worst_case_rows_hold_every_routing(num_tokens, num_local, num_topk, align):
    # Against all counts that routings can give: a token selects an expert once, and K experts.
    num_ranks = 2
    config = EpConfig(
        num_experts=num_ranks * num_local,
        num_topk=min(num_topk, num_ranks * num_local),
        hidden=1,
        max_tokens_per_rank=num_tokens,
        expert_alignment=align,
    )
    tokens = num_ranks * num_tokens
    most = tokens * min(config.num_topk, num_local)
    worst = max(
        rows_needed(counts, align)
        for counts in itertools.product(range(tokens + 1), repeat=num_local)
        if sum(counts) <= most
    )
    room = config.capacity(num_ranks=num_ranks, num_tokens=num_tokens)
    assert room >= worst
    assert room % align == 0
    if align == 1 or min(config.num_topk, num_local) == 1:
        assert room == worst
    assert room - worst <= num_local * (align - 1)
    fixed = dataclasses.replace(config, recv_capacity=5)
    assert fixed.capacity(num_ranks=num_ranks, num_tokens=num_tokens) == 5


@pytest.mark.parametrize(
    ("fields", "num_ranks", "num_tokens", "rows"),
    [
        # 2 ranks * 4 tokens, of which each has 2 selections; and 3 more rows for each of 4 experts.
        ({}, 2, 4, 16),
        ({"expert_alignment": 4}, 2, 4, 28),
        # Of fewer tokens, as many as the call has; of one, two experts with 4 rows each.
        ({}, 2, 1, 4),
        ({"expert_alignment": 4}, 1, 1, 8),
        ({}, 2, 0, 0),
        ({"expert_alignment": 4}, 2, 0, 0),
        # One local expert: a token can select it once.
        ({}, 8, 4, 32),
        ({"layout": "rank"}, 8, 4, 32),
        ({"layout": "rank"}, 8, 1, 8),
        ({"layout": "rank", "num_topk": 8}, 2, 4, 8),
        ({"recv_capacity": 5}, 2, 4, 5),
        ({"recv_capacity": 5}, 2, 0, 5),
        # 8 selections of 4 tokens, 2 of one.
        ({"capacity_factor": 1.0}, 1, 4, 8),
        ({"capacity_factor": 1}, 8, 4, 8),
        ({"capacity_factor": 1.0}, 8, 1, 2),
        ({"capacity_factor": 1.25}, 1, 4, 10),
        ({"capacity_factor": 1.25}, 1, 1, 3),
        ({"capacity_factor": 1.01}, 1, 4, 9),
        ({"capacity_factor": 0.01}, 1, 4, 1),
        ({"capacity_factor": 0.01}, 1, 0, 0),
        ({"capacity_factor": np.float32(2.0)}, 1, 4, 16),
        # As float64 multiplies: 1.06 * 50 is 53, and (1.06 * 10) * 5 is 53 and a bit.
        ({"capacity_factor": 1.06, "num_topk": 5, "max_tokens_per_rank": 10}, 1, 10, 53),
        ({"capacity_factor": 1.5, "layout": "rank"}, 2, 4, 12),
        # 8 rows in at most 8 groups, each of which can need 3 more: 32.
        ({"capacity_factor": 1.0, "expert_alignment": 4}, 1, 4, 32),
        # At most 4 groups: 20.
        ({"capacity_factor": 1.0, "expert_alignment": 4}, 2, 4, 20),
        # One group: 9 + 3 = 12, and 16 is a multiple of 8 that holds 9 + 7.
        ({"capacity_factor": 1.1, "expert_alignment": 4}, 8, 4, 12),
        ({"capacity_factor": 1.1, "expert_alignment": 8}, 8, 4, 16),
        # Padded experts: 3 on each rank, then 1. "even" drops other rows, not other numbers.
        ({"pad_experts": True, "num_topk": 4}, 3, 4, 36),
        ({"pad_experts": True, "num_topk": 4, "expert_alignment": 4}, 3, 4, 44),
        ({"pad_experts": True, "capacity_factor": 1.0, "expert_alignment": 4}, 3, 4, 20),
        ({"pad_experts": True}, 16, 4, 64),
        ({"pad_experts": True}, 2, 4, 16),
        ({"drop": "even", "capacity_factor": 1.25}, 1, 4, 10),
        # Fewer rows than groups: 1 row.
        ({"capacity_factor": 0.1, "expert_alignment": 8}, 1, 4, 8),
    ],
)
def test_the_capacity_by_hand(fields, num_ranks, num_tokens, rows):
    assert make(**fields).capacity(num_ranks=num_ranks, num_tokens=num_tokens) == rows


def _oracles(problem, **changed):
    return reference.plan(problem.topk_idx, **{**problem.plan_kwargs(), **changed})


@pytest.mark.parametrize("problem", problems.params())
def test_the_capacity_is_the_oracles(problem):
    config = EpConfig(**problem.config_kwargs())
    sizes = {"num_ranks": problem.num_ranks, "num_tokens": problem.num_tokens}
    assert config.capacity(**sizes) == problem.plan.capacity


@hypothesis.given(strategies.problems())
def test_the_capacity_is_the_oracles_for_any_problem(problem):
    config = EpConfig(**problem.config_kwargs())
    sizes = {"num_ranks": problem.num_ranks, "num_tokens": problem.num_tokens}
    assert config.capacity(**sizes) == problem.plan.capacity
    unlimited = dataclasses.replace(config, recv_capacity=None, capacity_factor=None)
    room = unlimited.capacity(**sizes)
    assert not _oracles(problem, recv_capacity=room).num_dropped.any()


def test_with_capacity_factor_replaces_what_there_is():
    assert make(recv_capacity=5).with_capacity_factor(1.5) == make(capacity_factor=1.5)
    assert make(capacity_factor=3).with_capacity_factor(1.5) == make(capacity_factor=1.5)
    assert make(capacity_factor=np.float64(1.5)) == make(capacity_factor=1.5)
    assert isinstance(make(capacity_factor=2).capacity_factor, float)


@pytest.mark.parametrize("align", [1, 3, 8])
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_a_capacity_factor_holds_its_rows_however_they_are_spread(align, num_ranks):
    config = make(num_experts=4, expert_alignment=align, capacity_factor=0.75)
    room = config.capacity(num_ranks=num_ranks, num_tokens=4)
    for counts in itertools.product(range(7), repeat=4 // num_ranks):
        if sum(counts) <= 6:  # 0.75 * 4 tokens * 2
            assert rows_needed(counts, align) <= room


@pytest.mark.parametrize("factor", [0, -1.0, float("nan"), float("inf"), "2", True])
def test_a_bad_capacity_factor_is_named(factor):
    message = f"EpConfig.capacity_factor is {factor!r}; allowed: None, or a finite number above 0"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make(capacity_factor=factor)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make().with_capacity_factor(factor)


def test_a_capacity_is_said_once():
    message = "EpConfig.recv_capacity is 5 and capacity_factor 1.5; allowed: one of them"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        make(recv_capacity=5, capacity_factor=1.5)


@pytest.mark.parametrize("num_ranks", [3, 16])
def test_a_number_of_ranks_that_does_not_divide_is_named(num_ranks):
    message = (
        f"num_ranks is {num_ranks}; it must divide num_experts (8), or EpConfig.pad_experts be True"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make().capacity(num_ranks=num_ranks, num_tokens=4)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make().num_local_experts(num_ranks=num_ranks)


@pytest.mark.parametrize("pad_experts", [False, True])
@pytest.mark.parametrize("num_ranks", [0, -1, 2.0, True])
def test_what_is_no_number_of_ranks_is_named(num_ranks, pad_experts):
    message = f"num_ranks is {num_ranks!r}; allowed: an int from 1 to {INT32_MAX}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make(pad_experts=pad_experts).capacity(num_ranks=num_ranks, num_tokens=4)


@pytest.mark.parametrize("num_tokens", [-1, 5, 2.0])
def test_a_bad_number_of_tokens_is_named(num_tokens):
    message = (
        f"num_tokens is {num_tokens!r}; allowed: an int from 0 to max_tokens_per_rank, which is 4"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make(recv_capacity=5).capacity(num_ranks=2, num_tokens=num_tokens)
