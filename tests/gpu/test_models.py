# SPDX-License-Identifier: Apache-2.0
"""Whole models on GPUs: published blocks on meshes, copies of experts, rows dropped evenly."""

import math

import pytest
from jax.sharding import PartitionSpec as P

from ep_launch.placement import Placement
from ep_launch.ranks import Case, failure_report
from ep_testing import even_drops
from ep_testing.rank_cases import case_of, check_cases
from ep_testing.rank_models import BLOCKS, COPIED, block, copies
from ep_testing.rank_programs import exchange

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(540),
    pytest.mark.parametrize("num_ranks", Placement.chosen().numbers_of_ranks()),
]

TENSOR, FSDP = {"tensor_axes": ("tensor",)}, {"fsdp_axes": ("fsdp",)}
# (fsdp, tensor, expert), tokens, axes of the weights: devices -> what is tried with so many.
MESHES = {
    2: [
        ((1, 1, 2), P("expert"), {}),
        ((1, 2, 1), P("expert"), TENSOR),
        ((2, 1, 1), P("fsdp"), FSDP),
    ],
    4: [((1, 2, 2), P("expert"), TENSOR), ((2, 1, 2), P(("fsdp", "expert")), FSDP)],
    8: [((2, 2, 2), P(("fsdp", "expert"), "tensor"), TENSOR | FSDP)],
}


@pytest.mark.skipif(
    Placement.chosen() is not Placement.ONE_PROCESS,
    reason="`make nvlink` runs it: global arrays are compared, and NCCL needs a GPU for each rank",
)
def test_published_blocks_on_meshes(num_ranks, on_ranks):
    cases = [
        Case(f"{name}{shape}", block, {"name": name, "shape": shape, "token_spec": spec, **axes})
        for shape, spec, axes in MESHES[num_ranks]
        for name in BLOCKS
    ]
    assert all(math.prod(case.kwargs["shape"]) == num_ranks for case in cases)
    runs = on_ranks(cases, num_ranks=num_ranks, deadline=480)
    assert failure_report(runs, cases) is None, failure_report(runs, cases)


def test_copies_of_experts(num_ranks, on_ranks):
    problem = COPIED.replace(num_ranks=num_ranks)
    variants = [problem, problem.replace(name="bfloat16", dtype="bfloat16")]
    check_cases(on_ranks, [case_of(copies, p) for p in variants], num_ranks)


def test_rows_dropped_evenly(num_ranks, on_ranks):
    if Placement.chosen() is Placement.SHARED:
        pytest.skip(
            "`make nvlink` runs it: counts are gathered, and NCCL needs a GPU for each rank"
        )
    problems = [
        p.replace(num_ranks=num_ranks)
        for p in even_drops.PROBLEMS.values()
        if p.num_ranks == even_drops.BASE.num_ranks and p.domain_size in (None, num_ranks)
    ]
    check_cases(on_ranks, [case_of(exchange, p) for p in problems], num_ranks)
