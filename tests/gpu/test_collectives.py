# SPDX-License-Identifier: Apache-2.0
"""XLA's own collectives beside our calls, in one program; they need a GPU for each rank."""

import pytest

from ep_launch.placement import Placement
from ep_testing.rank_cases import check_cases, collective_cases

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(540),
    pytest.mark.skipif(
        Placement.chosen() is Placement.SHARED, reason="NCCL refuses several ranks on one GPU"
    ),
]
GRAPHS = "--xla_gpu_enable_command_buffer=FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,COLLECTIVES"


@pytest.mark.parametrize("flags", ["", GRAPHS], ids=["default", "graphs"])
@pytest.mark.parametrize("num_ranks", Placement.chosen().numbers_of_ranks())
def test_gradients_are_summed_beside_exchanges(num_ranks, flags, on_ranks):
    def run(cases, **kwargs):
        return on_ranks(cases, environment={"XLA_FLAGS": flags}, **kwargs)

    check_cases(run, collective_cases(num_ranks), num_ranks)
