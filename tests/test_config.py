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
    assert config.expert_alignment == 1
    assert config.zero_fill is True
    assert config.max_num_sms is None
    assert config.tail_num_sms is None


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
    room = config.worst_case_rows(num_ranks)
    assert room >= worst
    assert room % align == 0
    if align == 1 or min(config.num_topk, num_local) == 1:
        assert room == worst
    assert room - worst <= num_local * (align - 1)
    assert config.capacity(num_ranks) == room
    assert dataclasses.replace(config, recv_capacity=5).capacity(num_ranks) == 5


def test_worst_case_rows_by_hand():
    # 2 ranks * 4 tokens, of which each has 2 selections; and 3 more rows for each of 4 experts.
    assert make().worst_case_rows(2) == 16
    assert make(expert_alignment=4).worst_case_rows(2) == 28
    # One local expert: a token can select it once.
    assert make().worst_case_rows(8) == 32
    assert make(layout="rank").worst_case_rows(8) == 32
    assert make(layout="rank", num_topk=8).worst_case_rows(2) == 8


@pytest.mark.parametrize("problem", problems.params())
def test_capacity_is_the_oracles(problem):
    config = EpConfig(**problem.config_kwargs())
    assert config.capacity(problem.num_ranks) == problem.plan.capacity


@hypothesis.given(strategies.problems())
def test_capacity_is_the_oracles_for_any_problem(problem):
    config = EpConfig(**problem.config_kwargs())
    assert config.capacity(problem.num_ranks) == problem.plan.capacity
    unlimited = dataclasses.replace(config, recv_capacity=None)
    kwargs = {**problem.plan_kwargs(), "recv_capacity": unlimited.capacity(problem.num_ranks)}
    plan = reference.plan(problem.topk_idx, **kwargs)
    assert not plan.num_dropped.any()


@pytest.mark.parametrize(
    ("fields", "factor", "num_ranks", "rows"),
    [
        ({}, 1.0, 1, 8),
        ({}, 1, 8, 8),
        ({}, 1.25, 1, 10),
        ({}, 1.01, 1, 9),
        ({}, 0.01, 1, 1),
        ({}, np.float32(2.0), 1, 16),
        ({"layout": "rank"}, 1.5, 2, 12),
        # 8 rows in at most 8 groups, each of which can need 3 more: 32.
        ({"expert_alignment": 4}, 1.0, 1, 32),
        # At most 4 groups: 20.
        ({"expert_alignment": 4}, 1.0, 2, 20),
        # One group: 9 + 3 = 12, and 16 is a multiple of 8 that holds 9 + 7.
        ({"expert_alignment": 4}, 1.1, 8, 12),
        ({"expert_alignment": 8}, 1.1, 8, 16),
        # Fewer rows than groups: 1 row.
        ({"expert_alignment": 8}, 0.1, 1, 8),
    ],
)
def test_with_capacity_factor_by_hand(fields, factor, num_ranks, rows):
    config = make(**fields)
    got = config.with_capacity_factor(factor, num_ranks=num_ranks)
    assert got.recv_capacity == rows
    assert dataclasses.replace(got, recv_capacity=None) == config


@pytest.mark.parametrize("align", [1, 3, 8])
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_a_capacity_factor_holds_its_rows_however_they_are_spread(align, num_ranks):
    config = make(num_experts=4, expert_alignment=align)
    room = config.with_capacity_factor(0.75, num_ranks=num_ranks).recv_capacity
    for counts in itertools.product(range(7), repeat=4 // num_ranks):
        if sum(counts) <= 6:  # 0.75 * 4 tokens * 2
            assert rows_needed(counts, align) <= room


@pytest.mark.parametrize("factor", [0, -1.0, float("nan"), float("inf"), "2", None])
def test_a_bad_capacity_factor_is_named(factor):
    message = f"capacity factor is {factor!r}; it must be a finite number above 0"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make().with_capacity_factor(factor)


@pytest.mark.parametrize("num_ranks", [0, -1, 3, 16])
def test_a_bad_number_of_ranks_is_named(num_ranks):
    message = f"num_ranks is {num_ranks}; it must divide num_experts (8)"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make().with_capacity_factor(1.0, num_ranks=num_ranks)
