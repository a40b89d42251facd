# SPDX-License-Identifier: Apache-2.0
"""Whether all ranks' results of an exchange are the oracle's, bit by bit."""

import numpy as np

from ep_testing import assertions
from ep_testing.problems import EpProblem
from ep_testing.programs import Exchanged
from jax_ep import reference


def assert_received_matches_oracle(problem: EpProblem, received) -> None:
    """What was dispatched, and the plan in its handle."""
    want = problem.dispatched
    for field in ("group_sizes", "tokens_per_expert", "num_dropped"):
        np.testing.assert_array_equal(getattr(received, field), getattr(want, field), field)
    np.testing.assert_array_equal(received.handle.slot, want.plan.slot, "slot")
    np.testing.assert_array_equal(received.handle.row_source, want.plan.row_source, "row_source")
    assertions.assert_received_rows_equal(received.x, want.x, problem)
    np.testing.assert_array_equal(received.weights, want.weights, "weights")
    if problem.layout == "rank":
        np.testing.assert_array_equal(received.topk_idx, want.topk_idx, "topk_idx")
    else:
        assert received.topk_idx is None


def assert_unweighted_matches_oracle(problem: EpProblem, got: np.ndarray) -> None:
    """Sums of rows."""
    want = reference.combine(
        problem.expert_outputs(), problem.plan, dtype=problem.np_dtype,
        domain_size=problem.domain_size,
    )  # fmt: skip
    assertions.assert_sums_equal(got, want, problem)


def assert_weighted_matches_oracle(problem: EpProblem, got: np.ndarray, backend: str) -> None:
    """Sums of rows times weights."""
    y, weights = problem.expert_outputs(), problem.dispatched.weights
    sums = {"dtype": problem.np_dtype, "domain_size": problem.domain_size}
    if backend == "ffi":
        want = reference.combine(y, problem.plan, weights, **sums)
        assertions.assert_sums_equal(got, want, problem)
        return
    # XLA decides whether it fuses a product and a sum, so the last bit is not defined.
    value = reference.combine(y, problem.plan, weights, exact_bits=False)
    bound = reference.combine_error_bound(y, problem.plan, weights, **sums)
    off = np.abs(got.astype(np.float64) - value) - bound
    assert np.all(off <= 0), f"{problem.name}: off the derived bound by {np.max(off)}"


def assert_matches_oracle(problem: EpProblem, got: Exchanged, backend: str) -> None:
    """All of it."""
    assert_received_matches_oracle(problem, got.received)
    assert_unweighted_matches_oracle(problem, got.unweighted)
    assert_weighted_matches_oracle(problem, got.weighted, backend)
