# SPDX-License-Identifier: Apache-2.0
"""Runs cases on ranks on the GPU, and compares each with the oracle and the CPU backend."""

import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from ep_launch.ranks import Case, RankRun, failure_report, stacked
from ep_testing import assertions, rank_programs
from ep_testing.oracle_checks import assert_matches_oracle
from ep_testing.problems import EpProblem
from ep_testing.programs import Exchanged, make_mesh


def case_of(function: Callable[..., Any], problem: EpProblem, **kwargs: Any) -> Case:
    """A case of `rank_programs` for a problem."""
    name = f"{function.__name__}[{problem.name}]"
    return Case(name, function, {"problem": problem, **kwargs})


def collective_cases(num_ranks: int, backend: str = "ffi") -> list[Case]:
    """XLA's collectives beside our calls: small tokens, and rows as long as a model's."""
    small = EpProblem(
        name="psum", num_ranks=num_ranks, num_tokens=7, hidden=24, num_topk=3, num_experts=16
    )
    large = small.replace(name="psum_large", num_tokens=64, hidden=2048, routing="zipf")
    return [case_of(rank_programs.beside_collectives, p, backend=backend) for p in (small, large)]


def check_cases(run: Callable[..., list[RankRun]], cases: Sequence[Case], num_ranks: int) -> None:
    """Runs the cases and fails with the names of all that went wrong."""
    start = time.monotonic()
    runs = run(cases, num_ranks=num_ranks)
    on_gpu = time.monotonic() - start
    done = min(len(run.outcomes) for run in runs)
    failures = []
    for index, case in enumerate(cases[:done]):
        if any(run.outcomes[index].error for run in runs):
            break
        try:
            _compare(case, stacked(runs, index), num_ranks)
        except AssertionError:
            failures.append(f"{case.name}:\n{traceback.format_exc(limit=-1)}")
    if report := failure_report(runs, cases):
        failures.append(report)
    total = time.monotonic() - start
    print(f"{num_ranks} ranks: {done} cases; {on_gpu:.1f} s on the GPU, {total:.1f} s in all")
    assert not failures, "\n".join(failures)


def _compare(case: Case, got: Any, num_ranks: int) -> None:
    mesh = make_mesh((num_ranks,), ("expert",))
    want = jax.tree.map(np.asarray, case.function(mesh, **case.kwargs))
    if case.function is rank_programs.exchange:
        _compare_exchanges(case.kwargs["problem"], Exchanged(*got), Exchanged(*want))
    elif isinstance(want, dict):
        _assert_same_bits(got["exact"], want["exact"])
        jax.tree.map(_assert_close, got["close"], want["close"])
    else:
        _assert_same_bits(got, want)


def _compare_exchanges(problem: EpProblem, got: Exchanged, want: Exchanged) -> None:
    assert_matches_oracle(problem, got, "ffi")
    assertions.assert_received_rows_equal(got.received.x, want.received.x, problem)
    for name in ("weights", "topk_idx", "group_sizes", "tokens_per_expert", "num_dropped"):
        _assert_same_bits(getattr(got.received, name), getattr(want.received, name))
    assertions.assert_sums_equal(got.weighted, want.weighted, problem)
    assertions.assert_sums_equal(got.unweighted, want.unweighted, problem)


def _assert_same_bits(got: Any, want: Any) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert (g.shape, g.dtype) == (w.shape, w.dtype)
        np.testing.assert_array_equal(assertions.bits(g), assertions.bits(w))


def _assert_close(got: np.ndarray, want: np.ndarray) -> None:
    rtol = {"float32": 1e-4, "bfloat16": 0.04, "float16": 4e-3}[want.dtype.name]
    want = want.astype(np.float64)
    size = max(1e-3, float(np.max(np.abs(want), initial=0.0)))
    np.testing.assert_allclose(got.astype(np.float64), want, rtol=rtol, atol=rtol * size)
