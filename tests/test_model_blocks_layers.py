# SPDX-License-Identifier: Apache-2.0
"""MoE blocks of published models by the Flax layers, against dense ones."""

import pytest

from ep_testing.model_blocks.layers import linen_function, nnx_function
from ep_testing.model_blocks.placements import (
    BATCH_AND_SEQUENCE,
    DATA,
    SEQUENCE,
    TENSOR,
    TENSOR_SEQUENCE,
)
from ep_testing.model_blocks.ports import PORTS
from ep_testing.model_blocks.running import assert_is_dense, make_group


@pytest.mark.parametrize("name", PORTS)
def test_over_data(name):
    """Where tokens are is the layer's choice."""
    with make_group(name, DATA.mesh()) as group:
        assert_is_dense(name, nnx_function(name, group))


@pytest.mark.parametrize("name", PORTS)
def test_with_split_weights(name):
    with make_group(name, TENSOR.mesh()) as group:
        assert_is_dense(name, nnx_function(name, group, **TENSOR.axes))


# Of biases, of weighed inputs, and of a shared expert with a gate.
@pytest.mark.parametrize("name", ["gpt_oss", "llama4", "qwen2_moe"])
def test_with_tokens_over_the_tensor_axis(name):
    with make_group(name, TENSOR_SEQUENCE.mesh()) as group:
        assert_is_dense(name, nnx_function(name, group, **TENSOR_SEQUENCE.axes))


# Two ways to split the tokens: each is that of every other block.
SPLITS = [(n, (SEQUENCE, BATCH_AND_SEQUENCE)[i % 2]) for i, n in enumerate(PORTS)]


@pytest.mark.parametrize(("name", "where"), SPLITS, ids=list(PORTS))
def test_along_the_sequence(name, where):
    with make_group(name, where.mesh()) as group:
        assert_is_dense(name, nnx_function(name, group, **where.axes))


# Of biases, of groups with a bias of the choice, of another input, and of a choice from outside.
@pytest.mark.parametrize("name", ["gpt_oss", "deepseek_v3", "gemma4", "switch_capacity"])
def test_in_linen(name):
    with make_group(name, TENSOR.mesh()) as group:
        assert_is_dense(name, linen_function(name, group, **TENSOR.axes))
