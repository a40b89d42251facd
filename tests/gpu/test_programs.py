# SPDX-License-Identifier: Apache-2.0
"""Transformations, CUDA graphs, two groups in a program, XLA's collective stream; many turns."""

import os
import pathlib

import numpy as np
import pytest

from ep_launch.placement import Placement
from ep_launch.ranks import failure_report, stacked
from ep_testing.graph_flags import FLAGS, GRAPHS, SHORT
from ep_testing.rank_cases import case_of, check_cases
from ep_testing.rank_layers import LAYER, MIXED_TURNS, TURNS, check_turns, layer_cases
from ep_testing.rank_programs import launches, on_collective_stream, turns

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(540),
    pytest.mark.parametrize("num_ranks", Placement.chosen().numbers_of_ranks()),
]

# So large that dispatch has a tail with two ranks: see Tuning.* in csrc/tuning/tests.
LARGE_TURNS = TURNS.replace(name="large_turns", num_tokens=1024, hidden=2048, num_topk=8)


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
def test_transformed_layers_have_the_cpus_bits(flags, num_ranks, on_ranks):
    def run(cases, **kwargs):
        return on_ranks(cases, environment={"XLA_FLAGS": flags}, **kwargs)

    check_cases(run, layer_cases(num_ranks), num_ranks)


def test_calls_on_the_collective_stream_have_the_cpus_bits(num_ranks, on_ranks, tmp_path):
    def run(cases, **kwargs):
        return on_ranks(cases, environment=_dumping(tmp_path), **kwargs)

    problem = LAYER.replace(num_ranks=num_ranks)
    check_cases(run, [case_of(on_collective_stream, problem)], num_ranks)
    asked = _dumped(tmp_path, "before_optimizations").splitlines()
    for call in ("plan_dispatch", "combine"):
        lines = [line for line in asked if f'custom_call_target="jax_ep_{call}"' in line]
        assert lines, call
        assert all('_xla_stream_annotation="collective"' in line for line in lines), call
    for line in _dumped(tmp_path, "after_optimizations").splitlines():
        if "-start(" in line:
            print(line.strip()[:200])


def _dumping(folder: pathlib.Path, flags: str = "") -> dict[str, str]:
    """Variables that make XLA write into a folder what it compiles."""
    return {"XLA_FLAGS": f"{flags} --xla_dump_to={folder} --xla_dump_hlo_as_text"}


def _dumped(folder: pathlib.Path, kind: str) -> str:
    return "\n".join(path.read_text() for path in sorted(folder.glob(f"*{kind}.txt")))


@pytest.mark.parametrize("flags", [SHORT, GRAPHS], ids=["short", "graphs"])
def test_graphs_hold_our_calls_and_replay_with_changing_routing(
    flags, num_ranks, on_ranks, tmp_path
):
    problem = TURNS.replace(num_ranks=num_ranks)
    cases = [
        case_of(launches, problem, count=1000),
        case_of(turns, problem, rounds=2, turns_each=500),
        case_of(turns, MIXED_TURNS.replace(num_ranks=num_ranks), rounds=2, turns_each=500),
    ]
    runs = on_ranks(cases, num_ranks=num_ranks, environment=_dumping(tmp_path, flags))
    assert failure_report(runs, cases) is None, failure_report(runs, cases)
    turn, wrong = stacked(runs, 0)
    np.testing.assert_array_equal(turn, 1000)
    np.testing.assert_array_equal(wrong, 0)
    for index in (1, 2):
        check_turns(problem, runs, index, turns_each=500)
    # What is in a graph is indented under it: plan_dispatch, combine.
    thunks = _dumped(tmp_path, "thunk_sequence_after_thunk_passes").splitlines()
    lines = [line for line in thunks if "kCustomCall" in line]
    assert len(lines) >= 4, "a program of one turn, and one with two places for turns"
    assert all(line.startswith("  ") for line in lines), "\n".join(lines)


@pytest.mark.parametrize("flags", [SHORT, GRAPHS], ids=["short", "graphs"])
def test_large_dispatches_end_on_idle_sms(flags, num_ranks, on_ranks):
    # Eight ranks that share a GPU leave no SM idle.
    ranks = 2 if Placement.chosen() is Placement.SHARED else num_ranks
    problem = LARGE_TURNS.replace(num_ranks=ranks)
    cases = [case_of(turns, problem, rounds=2, turns_each=100)]
    runs = on_ranks(cases, num_ranks=ranks, environment={"XLA_FLAGS": flags})
    assert failure_report(runs, cases) is None, failure_report(runs, cases)
    check_turns(problem, runs, 0, turns_each=100)


def test_soak(num_ranks, on_ranks):
    problem = MIXED_TURNS.replace(num_ranks=num_ranks)
    total = int(os.environ.get("JAX_EP_SOAK", "5000"))
    cases = [case_of(turns, problem, rounds=total // 1000, turns_each=1000)]
    runs = on_ranks(cases, num_ranks=num_ranks, deadline=480)
    assert failure_report(runs, cases) is None, failure_report(runs, cases)
    assert check_turns(problem, runs, 0, turns_each=1000) == total // 1000
    seconds = max(run.outcomes[0].seconds for run in runs)
    print(f"{total} iterations, {seconds:.1f} s")
