# SPDX-License-Identifier: Apache-2.0
"""Exchanges to which some ranks do not come, in groups that go on without them."""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_ep
from ep_testing import assertions, halves
from ep_testing.problems import EpProblem
from ep_testing.programs import make_group, over_ranks
from jax_ep import reference

SOON, NEVER = 2.0, 600.0  # seconds; all that come do so within the first
PROBLEM = EpProblem(
    name="missing", num_ranks=8, num_tokens=5, num_topk=3, num_experts=16, hidden=12
)  # fmt: skip


def masking_group(problem: EpProblem, backend: str = "ffi", **kwargs: Any) -> jax_ep.EpGroup:
    """One with a short timeout, unless one is given."""
    return make_group(problem, backend, on_timeout="mask", **{"timeout": SOON, **kwargs})


def came(problem: EpProblem, *absent: int) -> np.ndarray:
    """`[R]` bool: all ranks but these."""
    return ~np.isin(np.arange(problem.num_ranks), absent)


def missing_of(here: np.ndarray, rank_mask: np.ndarray | None = None) -> np.ndarray:
    """`[R, R]` bool: whom each rank misses if these ranks meet, and any other runs alone."""
    missing = ~(here[:, None] & here[None, :])
    np.fill_diagonal(missing, False)
    return missing if rank_mask is None else missing & rank_mask[None, :]


def only_if(is_here: jax.Array, f: Callable, *args: Any) -> Any:
    """`f(*args)` on a rank that is here, else zeros."""
    shapes = jax.eval_shape(f, *args)

    def absent(*args: Any) -> Any:
        del args
        return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    return jax.lax.cond(is_here, f, absent, *args)


def round_trip(group: jax_ep.EpGroup, x: Any, idx: Any, w: Any, y: Any, *mask: Any) -> Any:
    """A dispatch, and what two combines of `y` give, with and without weights."""
    received = jax_ep.dispatch(x, idx, w, group=group, rank_mask=mask[0] if mask else None)
    weighted = jax_ep.combine_with_status(y, received.handle, received.weights, group=group)
    return received, weighted, jax_ep.combine_with_status(y, received.handle, group=group)


def expert_outputs(problem: EpProblem) -> np.ndarray:
    """`y` of all ranks."""
    return problem.random((problem.num_ranks, problem.plan.capacity, problem.hidden), salt=3)


def run_without(
    problem: EpProblem, here: np.ndarray, *masks: np.ndarray, **kwargs: Any
) -> tuple[Any, float]:
    """What all ranks have of an exchange to which some do not come; and how long it took."""
    with masking_group(problem, **kwargs) as group:

        def on_rank(here: Any, *args: Any) -> Any:
            return only_if(here, lambda *args: round_trip(group, *args), *args)

        each = [np.broadcast_to(m, (problem.num_ranks, problem.num_ranks)) for m in masks]
        args = (here, *halves.arguments(problem), expert_outputs(problem), *each)
        program = over_ranks(group, on_rank, check_vma=False)
        began = time.monotonic()
        outs = jax.tree.map(np.asarray, program(*args))
        return outs, time.monotonic() - began


def check(
    problem: EpProblem,
    outs: Any,
    here: np.ndarray,
    rank_mask: np.ndarray | None = None,
    *,
    of: np.ndarray | None = None,
) -> None:
    """That the ranks which are here have what the oracle says, bit by bit.

    Args:
        problem: that was solved.
        outs: of `round_trip`, of all ranks.
        here: the ranks that came.
        rank_mask: that they had.
        of: the ranks whose results are looked at; None: those that came.
    """
    looked_at = here if of is None else of
    received, (weighted, lost), (unweighted, _) = outs
    missing = missing_of(here, rank_mask)
    want = reference.dispatch(
        problem.x, problem.topk_idx, problem.topk_weights, **problem.dispatch_kwargs(),
        rank_mask=rank_mask, missing=missing,
    )  # fmt: skip
    np.testing.assert_array_equal(received.missing_ranks[looked_at], missing[looked_at])
    assert not lost.any()  # they are left out of the combine
    names = ("weights", "topk_idx", "group_sizes", "tokens_per_expert", "num_dropped")
    pairs = [(name, getattr(received, name), getattr(want, name)) for name in names]
    pairs += [
        (n, getattr(received.handle, n), getattr(want.plan, n)) for n in ("slot", "row_source")
    ]
    got_x, want_x = (jax.tree.leaves(tuple(a) if isinstance(a, tuple) else a)
                     for a in (received.x, want.x))  # fmt: skip
    pairs += [("x", got, wanted) for got, wanted in zip(got_x, want_x, strict=True)]
    sums = {"dtype": problem.np_dtype, "domain_size": problem.domain_size, "missing": missing}
    y = expert_outputs(problem)
    pairs += [("unweighted", unweighted, reference.combine(y, want.plan, **sums))]
    pairs += [("weighted", weighted, reference.combine(y, want.plan, want.weights, **sums))]
    for name, got, wanted in pairs:
        if wanted is None:
            assert got is None
            continue
        got, wanted = np.asarray(got)[looked_at], np.asarray(wanted)[looked_at]
        np.testing.assert_array_equal(assertions.bits(got), assertions.bits(wanted), name)
