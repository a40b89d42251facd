# SPDX-License-Identifier: Apache-2.0
"""MoE blocks of published models by `moe_with_experts` and `sharded_moe`, against dense ones."""

import pytest

from ep_testing.model_blocks import running
from ep_testing.model_blocks.functions import CALLS
from ep_testing.model_blocks.placements import DATA, PLACEMENTS


@pytest.mark.parametrize("name", CALLS)
def test_in_a_shard_map_of_ones_own(name):
    with running.make_group(name, DATA.mesh()) as group:
        running.assert_is_dense(name, running.shard_map_function(name, group))


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("name", CALLS)
def test_on_global_arrays(name, placement):
    where = PLACEMENTS[placement]
    with running.make_group(name, where.mesh()) as group:
        running.assert_is_dense(name, running.sharded_function(name, group, **where.axes))
