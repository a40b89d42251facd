# SPDX-License-Identifier: Apache-2.0
"""Problems whose rows are dropped evenly, or would be if there were too many."""

from ep_testing.problems import EpProblem

BASE = EpProblem(
    name="even", num_ranks=4, num_experts=16, num_topk=4, num_tokens=8, drop="even",
    capacity_factor=1.0,
)  # fmt: skip

PROBLEMS = {
    problem.name: problem
    for problem in (
        BASE.replace(name="uniform"),
        BASE.replace(name="zipf", routing="zipf"),
        BASE.replace(name="zipf_1.25", routing="zipf", capacity_factor=1.25),
        BASE.replace(name="aligned", routing="zipf", expert_alignment=8, num_tokens=24),
        BASE.replace(
            name="aligned_1.25", routing="zipf", expert_alignment=8, num_tokens=24,
            capacity_factor=1.25, seed=3,
        ),
        # The padding of the last group is past the last row.
        BASE.replace(
            name="cut", routing="zipf", expert_alignment=8, num_tokens=24, capacity_factor=None,
            recv_capacity=45,
        ),
        # Less than a group for each expert: in row order.
        BASE.replace(
            name="no_share", routing="zipf", expert_alignment=8, capacity_factor=None,
            recv_capacity=29,
        ),
        BASE.replace(name="masked", routing="masked_half", capacity_factor=0.4),
        BASE.replace(name="one_rank", num_ranks=1, num_experts=6),
        BASE.replace(name="to_one_rank", routing="all_to_one_rank"),
        BASE.replace(name="one_hot", routing="one_hot", capacity_factor=0.3),
        BASE.replace(name="a_row", capacity_factor=None, recv_capacity=1),
        BASE.replace(name="nothing", routing="all_masked"),
        BASE.replace(name="no_tokens", num_tokens=0, max_tokens_per_rank=4),
        BASE.replace(name="ample", capacity_factor=9.0),
        BASE.replace(name="unlimited", capacity_factor=None),
        BASE.replace(name="three_ranks", num_ranks=3, num_experts=12, capacity_factor=0.7),
        BASE.replace(name="eight_ranks", num_ranks=8, num_experts=16, routing="zipf"),
        BASE.replace(
            name="domains", routing="zipf", dtype="bfloat16", domain_size=2, zero_fill=False
        ),
        BASE.replace(
            name="fp8", routing="zipf", hidden=144, dtype="bfloat16", wire_dtype="float8_e4m3fn"
        ),
        BASE.replace(
            name="fp8_rows", routing="zipf", hidden=144, dtype="bfloat16",
            wire_dtype="float8_e4m3fn", recv_dtype="float8_e4m3fn",
        ),
    )
}  # fmt: skip
