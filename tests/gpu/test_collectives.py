# SPDX-License-Identifier: Apache-2.0
"""XLA's own collectives beside our calls, in one program; they need a GPU for each rank."""

import pytest

from gpu.comparison import case_of, check_cases
from gpu.placement import Placement
from gpu.rank_programs import beside_collectives
from gpu.ranks import Case
from problems import EpProblem

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(540),
    pytest.mark.skipif(
        Placement.chosen() is Placement.SHARED, reason="NCCL refuses several ranks on one GPU"
    ),
]
GRAPHS = "--xla_gpu_enable_command_buffer=FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,COLLECTIVES"


def cases(num_ranks: int, backend: str = "ffi") -> list[Case]:
    """Small tokens, and rows as long as a model's."""
    small = EpProblem(
        name="psum", num_ranks=num_ranks, num_tokens=7, hidden=24, num_topk=3, num_experts=16
    )
    large = small.replace(name="psum_large", num_tokens=64, hidden=2048, routing="zipf")
    return [case_of(beside_collectives, p, backend=backend) for p in (small, large)]


@pytest.mark.parametrize("flags", ["", GRAPHS], ids=["default", "graphs"])
@pytest.mark.parametrize("num_ranks", Placement.chosen().numbers_of_ranks())
def test_gradients_are_summed_beside_exchanges(num_ranks, flags, on_ranks):
    def run(cases, **kwargs):
        return on_ranks(cases, environment={"XLA_FLAGS": flags}, **kwargs)

    check_cases(run, cases(num_ranks), num_ranks)
