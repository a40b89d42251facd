# SPDX-License-Identifier: Apache-2.0
"""Whether all ranks' results of an exchange are the oracle's, bit by bit."""

import numpy as np

import explain
from jax_ep import reference
from problems import EpProblem
from programs import Exchanged


def check_received(problem: EpProblem, received) -> None:
    """What was dispatched, and the plan in its handle."""
    want = problem.dispatched
    for field in ("group_sizes", "tokens_per_expert", "num_dropped"):
        np.testing.assert_array_equal(getattr(received, field), getattr(want, field), field)
    np.testing.assert_array_equal(received.handle.slot, want.plan.slot, "slot")
    np.testing.assert_array_equal(received.handle.row_source, want.plan.row_source, "row_source")
    explain.assert_same_rows(received.x, want.x, problem)
    np.testing.assert_array_equal(received.weights, want.weights, "weights")
    if problem.layout == "rank":
        np.testing.assert_array_equal(received.topk_idx, want.topk_idx, "topk_idx")
    else:
        assert received.topk_idx is None


def check_unweighted(problem: EpProblem, got: np.ndarray) -> None:
    """Sums of rows."""
    want = reference.combine(problem.expert_outputs(), problem.plan, dtype=problem.np_dtype)
    explain.assert_same_output(got, want, problem)


def check_weighted(problem: EpProblem, got: np.ndarray, backend: str) -> None:
    """Sums of rows times weights."""
    y, weights, dtype = problem.expert_outputs(), problem.dispatched.weights, problem.np_dtype
    if backend == "ffi":
        want = reference.combine(y, problem.plan, weights, dtype=dtype)
        explain.assert_same_output(got, want, problem)
        return
    # XLA decides whether it fuses a product and a sum, so the last bit is not defined.
    value = reference.combine(y, problem.plan, weights, exact_bits=False)
    bound = reference.combine_error_bound(y, problem.plan, weights, dtype=dtype)
    off = np.abs(got.astype(np.float64) - value) - bound
    assert np.all(off <= 0), f"{problem.name}: off the derived bound by {np.max(off)}"


def check_exchange(problem: EpProblem, got: Exchanged, backend: str) -> None:
    """All of it."""
    check_received(problem, got.received)
    check_unweighted(problem, got.unweighted)
    check_weighted(problem, got.weighted, backend)
