# SPDX-License-Identifier: Apache-2.0
"""Hypothesis strategies that draw exchanges: small ones, and ones that shrink to smaller ones.

A drawn problem carries its routing written out, so that a failure prints all there is to know.
"""

from collections.abc import Sequence

import hypothesis.strategies as st

from ep_testing.problems import EpProblem, Table

RANKS = (1, 2, 3, 4, 6, 8)


@st.composite
def tables(
    draw: st.DrawFn, num_ranks: int, num_tokens: int, num_topk: int, num_experts: int
) -> Table:
    """`topk_idx` of all ranks: distinct experts within a token, -1 anywhere."""
    # Drawn expert by expert, so that shrinking drops selections and lowers indices.
    choice = st.integers(-1, num_experts - 1)
    ranks = []
    for _ in range(num_ranks):
        tokens = []
        for _ in range(num_tokens):
            token: list[int] = []
            for _ in range(num_topk):
                expert = draw(choice)
                token.append(-1 if expert in token else expert)
            tokens.append(tuple(token))
        ranks.append(tuple(tokens))
    return tuple(ranks)


@st.composite
def problems(
    draw: st.DrawFn,
    *,
    ranks: Sequence[int] = RANKS,
    layouts: Sequence[str] = ("expert", "rank"),
    dtypes: Sequence[str] = ("float32", "bfloat16", "float16"),
    wire_dtypes: Sequence[str | None] = (None,),
    max_tokens: int = 4,
    max_local_experts: int = 3,
    max_topk: int = 4,
    max_hidden: int = 9,
) -> EpProblem:
    """Exchanges of any small size. Every new size compiles anew: see `reroutings` for JAX tests."""
    num_ranks = draw(st.sampled_from(tuple(ranks)))
    num_experts = num_ranks * draw(st.integers(1, max_local_experts))
    num_topk = draw(st.integers(1, min(max_topk, num_experts)))
    num_tokens = draw(st.integers(0, max_tokens))
    layout = draw(st.sampled_from(tuple(layouts)))
    rows = num_ranks * max(num_tokens, 1) * num_topk
    divisors = [d for d in range(1, num_ranks + 1) if num_ranks % d == 0]
    recv_capacity = draw(
        st.none() | st.sampled_from(("exact", "one_short")) | st.integers(1, rows + 2)
    )
    return EpProblem(
        name="drawn",
        num_ranks=num_ranks,
        num_tokens=num_tokens,
        hidden=draw(st.integers(1, max_hidden)),
        num_topk=num_topk,
        num_experts=num_experts,
        layout=layout,
        dtype=draw(st.sampled_from(tuple(dtypes))),
        wire_dtype=draw(st.sampled_from(tuple(wire_dtypes))),
        recv_capacity=recv_capacity,
        capacity_factor=draw(st.none() | st.floats(0.1, 4)) if recv_capacity is None else None,
        expert_alignment=draw(st.integers(1, 4)) if layout == "expert" else 1,
        zero_fill=draw(st.booleans()),
        routing="table",
        table=draw(tables(num_ranks, num_tokens, num_topk, num_experts)),
        max_tokens_per_rank=max(num_tokens, 1) + draw(st.integers(0, 2)),
        domain_size=draw(st.none() | st.sampled_from(divisors)),
    )


@st.composite
def reroutings(draw: st.DrawFn, problem: EpProblem) -> EpProblem:
    """`problem` with another routing and the same sizes: one compilation serves all of them."""
    sizes = (problem.num_ranks, problem.num_tokens, problem.num_topk, problem.num_experts)
    # The capacity is a size as well: "exact" would follow the routing.
    return problem.replace(
        routing="table", table=draw(tables(*sizes)), recv_capacity=problem.capacity
    )
