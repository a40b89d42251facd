# SPDX-License-Identifier: Apache-2.0
"""The dense MoE blocks: right, and on data that shows what is special about each of them."""

import functools

import jax
import numpy as np
import pytest

from ep_testing.model_blocks import deepseek_v2, running
from ep_testing.model_blocks.formulas import grouped, linear, top_k
from ep_testing.model_blocks.loops import LOOPS
from ep_testing.model_blocks.ports import PORTS


@functools.cache
def _dense(name, changed=None):
    """The dense block; compiled anew where a constant of its module is `changed`."""
    del changed
    dense = PORTS[name].block.dense
    return running.compiled(lambda params, x: dense(params, x))


@functools.cache
def _output(name):
    return np.asarray(_dense(name)(*running.arguments_of(name)))


def _relative(got, want):
    return np.abs(got - want).max() / np.abs(want).max()


@pytest.mark.parametrize("name", LOOPS)
def test_a_dense_block_is_its_loop_over_tokens(name):
    params, x = running.arguments_of(name)
    double = {key: np.asarray(value, np.float64) for key, value in params.items()}
    want = LOOPS[name](double, np.asarray(x, np.float64))
    assert _relative(_output(name), want) < 2e-6


@pytest.mark.parametrize("name", PORTS)
def test_every_parameter_counts(name):
    """Where it is 0, the output is another one."""
    params, x = running.arguments_of(name)
    for key, value in params.items():
        got = np.asarray(_dense(name)(params | {key: 0 * value}, x))
        assert _relative(got, _output(name)) > 0.01, key


CONSTANTS = [
    ("deepseek_v2", "TOPK_GROUPS", 4),
    ("deepseek_v3", "TOPK_GROUPS", 4),
    ("nemotron", "TOPK_GROUPS", 4),
    ("gpt_oss", "LIMIT", 1e9),
    ("gpt_oss", "ALPHA", 1.0),
    ("switch_capacity", "CAPACITY", 16),
    ("phi_moe", "JITTER", 0.01),
]


@pytest.mark.parametrize(("name", "constant", "value"), CONSTANTS)
def test_every_constant_counts(name, constant, value, monkeypatch):
    want = _output(name)
    monkeypatch.setattr(PORTS[name].block, constant, value)
    got = np.asarray(_dense(name, constant)(*running.arguments_of(name)))
    assert _relative(got, want) > 0.01


def test_groups_by_their_best_are_others_than_by_their_best_two():
    params, x = running.arguments_of("deepseek_v2")
    scores = grouped(jax.nn.softmax(linear(x, params["gate"]), axis=-1), deepseek_v2.GROUPS)
    best_two = jax.lax.top_k(scores, 2)[0]
    by_max, by_sum = (
        np.sort(top_k(values, deepseek_v2.TOPK_GROUPS), axis=-1)
        for values in (best_two[..., 0], best_two.sum(axis=-1))
    )
    assert (by_max != by_sum).any(axis=-1).sum() > 5
