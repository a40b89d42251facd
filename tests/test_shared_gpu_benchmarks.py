# SPDX-License-Identifier: Apache-2.0
"""The benchmark on one GPU, as far as it needs none: cases, bytes, chains, and reports.

Nothing here looks at how long anything takes.
"""

import argparse
import importlib
import json
import pathlib
import re
from unittest import mock

import jax
import numpy as np
import pytest
from matplotlib.figure import Figure

from ep_bench import bytes_moved, kernel_times, on_shared_gpu, plot, report, shared_gpu_tables
from ep_bench.cases import (
    FP8,
    LOW_LATENCY_OPERATIONS,
    OPERATIONS,
    SIZES,
    GpuCase,
    Rows,
    all_shared_cases,
    some_shared_cases,
)
from ep_testing import program_files
from ep_testing.programs import make_mesh, over_ranks

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))


# --- cases and bytes ---------------------------------------------------------------------------


def test_rows_are_counted_by_rank_and_token():
    idx = np.zeros((2, 2, 8), np.int32)
    idx[0, 0] = np.arange(8)  # stays
    idx[0, 1] = np.arange(124, 132)  # half of it goes
    idx[1] = np.arange(8)  # both go
    counts = {"tokens": 4, "away": 3, "home": 2}
    assert Rows.of(idx, "expert") == Rows(held=32, busiest=28, **counts)
    assert Rows.of(idx, "rank") == Rows(held=5, busiest=4, **counts)


@pytest.mark.parametrize("kind", ["uniform", "zipf"])
def test_a_routing_has_distinct_experts_and_is_not_dropped(kind):
    case = GpuCase(num_tokens=64, num_ranks=4, routing=kind)
    assert case.topk_idx.shape == (4, 64, 8)
    assert all(len(set(token)) == 8 for token in case.topk_idx.reshape(-1, 8).tolist())
    assert case.rows.held == 4 * 64 * 8
    assert case.recv_capacity >= case.rows.busiest
    even = 1.25 * 64 * 8
    assert case.recv_capacity == even if kind == "uniform" else case.recv_capacity > even


@pytest.mark.parametrize(
    ("operation", "fp8", "name"),
    [
        ("dispatch", False, "dispatch, BF16"),
        ("dispatch", True, "dispatch, FP8 wire"),
        ("combine", False, "combine, BF16"),
        ("dispatch_vjp", False, "combine, BF16"),
    ],
)
def test_bytes_through_the_heap_are_those_of_the_kernels_page(operation, fp8, name, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools" / "docs"))
    traffic = importlib.import_module("kernel_traffic")
    p = traffic.EXAMPLE
    sizes = {"tokens": p.num_tokens, "held": p.held, "away": p.away, "home": p.home}
    got = bytes_moved.floor(operation, Rows(busiest=0, **sizes), fp8_wire=fp8)
    assert got.through_heap == pytest.approx(sum(step[2] for step in traffic.memory_steps(p)[name]))
    assert got.own == (p.num_tokens + p.held) * p.row < got.through_heap


def test_a_plan_has_no_rows_and_the_backward_of_combine_has_most():
    rows = Rows(tokens=10, held=80, busiest=20, away=40, home=6)
    assert bytes_moved.floor("plan", rows) is None
    vjp, sent = (bytes_moved.floor(name, rows) for name in ("combine_vjp", "dispatch"))
    assert vjp.through_heap - sent.through_heap == 80 * bytes_moved.ROW
    assert vjp.own - sent.own == 80 * bytes_moved.ROW


def test_the_product_has_all_of_the_subset():
    everything = all_shared_cases()
    assert len(everything) == len(set(everything)) == len(SIZES) * 2 * 2 * 3 * 2 + 1
    assert set(some_shared_cases()) < set(everything)
    for case in some_shared_cases():
        assert all(4 <= bytes_moved.chain_length(op, case) <= 300 for op in case.operations)


# --- chains ------------------------------------------------------------------------------------

CALLS = {
    "plan": {"plan": 10},
    "dispatch": {"plan_dispatch": 10},
    "combine": {"combine": 10},
    "dispatch_vjp": {"combine": 10},
    "combine_vjp": {"dispatch": 10},
    "there_and_back": {"plan_dispatch": 10, "combine": 10},
    "chain": {},
}


def test_the_loop_of_a_chain_has_all_calls():
    """XLA could move them out of a loop whose turns do not depend on each other."""
    programs = importlib.import_module("ep_bench.operation_programs")
    assert CALLS.keys() == {*OPERATIONS, *LOW_LATENCY_OPERATIONS, "chain"}
    case = GpuCase(num_tokens=4, num_ranks=2)
    with programs._opened(make_mesh((2,), ("expert",)), case) as exchange:
        for name, op in programs.operations(exchange.group).items():
            run = over_ranks(exchange.group, exchange.chained(op, 21), jit=False)
            args = [exchange.prepared[key] for key in op.arguments]
            text = jax.jit(run).lower(*args).compile().as_text()
            loop = max(
                re.split(r"^(?:ENTRY )?%?[\w.\-]+ \(.*\{$", text, flags=re.MULTILINE),
                key=lambda part: part.count("jax_ep_"),
            )
            calls = re.findall(r'custom_call_target="jax_ep_(\w+)"', loop)
            assert {call: calls.count(call) for call in calls} == CALLS[name], name


# --- reports -----------------------------------------------------------------------------------


def _canned():
    """All that is reported, in made-up numbers."""
    cases = [
        GpuCase(num_tokens=4096, num_ranks=8),
        GpuCase(num_tokens=4096, num_ranks=8, wire_dtype=FP8),
        GpuCase(num_tokens=1, num_ranks=8),
    ]
    results = []
    for case in cases:
        slower = [{op: np.full(3, 1e-3 * rank) for op in case.operations} for rank in (1, 2)]
        results.append(shared_gpu_tables.result(case, slower) | {"kernels": None})
    results[0]["kernels"] = {"plan": 1e-4, "dispatch": 1.8e-3, "combine": 2.5e-3}
    xla = {name: np.full(2, 3e-3) for name in ("gather", "segment_sum", "gather_back")}
    copies = [{"all": np.array([1e12, 2e12, 3e12])}] * 2
    copies[0] = copies[0] | {"one": np.array([3.5e12])}
    return {
        "environment": {
            "gpu": "a GPU",
            "driver": "1.2",
            "machine": "a machine",
            "versions": {"jax": "9.9"},
            "commit": "abc",
            "command": "python benchmarks/run.py",
            "date": "today",
            "xla_flags": "",
        },
        "copy": {"8": shared_gpu_tables.copy_bandwidths(copies)},
        "results": results,
        "baselines": [shared_gpu_tables.baseline(cases[0], [xla])],
    }


def test_each_number_of_ranks_runs_once_and_mps_is_removed(tmp_path, monkeypatch):
    """What ranks return is made up; what becomes of it is written after each number of ranks."""
    daemon, started = mock.Mock(environment={"PIPE": "a pipe"}), []

    def run_on_ranks(work, num_ranks, placement, variables):
        started.append((num_ranks, placement, variables["PIPE"]))
        written = json.loads(out.read_text())["results"] if out.exists() else []
        assert {r["case"]["num_ranks"] for r in written} == {ranks for ranks, *_ in started[:-1]}
        values = {name: np.full(3, 1e-3) for name in (*OPERATIONS, "chain", "all", "one")}
        values |= {name: np.full(3, 1e-3) for name in ("gather", "segment_sum", "gather_back")}
        return [[values] * num_ranks for _ in work]

    monkeypatch.setattr(on_shared_gpu, "MpsDaemon", lambda: daemon)
    monkeypatch.setattr(on_shared_gpu.on_ranks, "run_on_ranks", run_on_ranks)
    out = tmp_path / "numbers.json"
    args = argparse.Namespace(smoke=False, full=False, commit="abc", virtual_ranks=None, json=out)
    found = on_shared_gpu.measure(args)
    assert started == [(8, "shared", "a pipe"), (4, "shared", "a pipe")]
    assert [GpuCase(**r["case"]) for r in found["results"]] == sorted(
        some_shared_cases(), key=lambda case: -case.num_ranks
    )
    assert found["copy"].keys() == {"8", "4"}
    assert len(found["baselines"]) == 3
    assert json.loads(out.read_text()) == json.loads(json.dumps(found))
    assert daemon.method_calls == [mock.call.start(), mock.call.remove()]


def test_the_slowest_rank_counts_and_shares_are_of_the_fastest_copy():
    found = _canned()
    assert found["copy"]["8"] == {"all": 4e12, "one": 3.5e12}
    first = found["results"][0]
    assert first["seconds"]["combine"] == {
        "median": 2e-3,
        "p10": 2e-3,
        "p90": 2e-3,
        "samples": [2e-3] * 3,
    }
    size = first["bytes"]["combine"]["own"]
    share = shared_gpu_tables.share(
        first, "combine", "own", shared_gpu_tables.copy_bandwidth(found)
    )
    assert share == pytest.approx(size / 2e-3 / 4e12)
    assert shared_gpu_tables.overheads(first) == pytest.approx(
        {"plan": 1.9e-3, "dispatch": 1e-4, "combine": -5e-4}
    )
    first["kernels"]["plan_dispatch"] = 1.5e-3  # as kernels are now
    assert shared_gpu_tables.overheads(first)["dispatch"] == pytest.approx(5e-4)


def test_a_report_is_made_of_a_json(tmp_path):
    numbers, page = tmp_path / "numbers.json", tmp_path / "page.md"
    numbers.write_text(json.dumps(_canned()))
    marks = [
        f"<!-- {word}: written by benchmarks/run.py, placement shared -->"
        for word in ("begin", "end")
    ]
    page.write_text(f"before\n{marks[0]}\nold\n{marks[1]}\nafter\n")
    done = program_files.run_benchmarks("--report", numbers, "--markdown", page)
    assert done.returncode == 0, done.stderr
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    for part in ("one a GPU, driver 1.2", "the goal, 0.6, is met", "| 4096, 8 | FP8"):
        assert part in text
    assert "Of that, beyond" not in done.stdout  # kernels were not timed at T 1


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_a_plot_is_drawn(suffix, tmp_path):
    plot.draw(_canned(), tmp_path / f"plot{suffix}")
    assert (tmp_path / f"plot{suffix}").stat().st_size > 1000


def test_spread_is_drawn_in_percent_of_the_median():
    case = _canned()["results"][0]["case"]
    entries = [
        {"case": case, "seconds": {"plan": {"median": 2.0, "p10": 1.8, "p90": 2.5}}},
        {"case": case, "seconds": {"combine": {"median": 4.0, "p10": 3.9, "p90": 4.2}}},
    ]
    axes = Figure().subplots()
    plot.draw_spread(axes, entries, {"plan": "a", "combine": "b"}, ["red", "blue"])
    drawn = [segment for lines in axes.collections for segment in lines.get_segments()]
    assert np.concatenate(drawn).tolist() == [
        pytest.approx(point) for point in [(-0.2, -10), (-0.2, 25), (1.2, -2.5), (1.2, 5)]
    ]


@pytest.mark.parametrize("path", RESULTS, ids=[path.stem for path in RESULTS])
def test_committed_results_can_be_reported(path):
    assert "goal" in report.to_text(json.loads(path.read_text()))


def test_the_page_shows_the_last_results():
    page = (ROOT / "docs" / "measurements" / "benchmarks.md").read_text()
    shown = [report.to_markdown(json.loads(path.read_text())) in page for path in RESULTS]
    assert sum(shown) == 1


def test_times_of_kernels_are_parsed():
    text = (
        "expert, 8 ranks\n  plan              89.6 us\n  dispatch        2469.1 us\n"
        "  plan_dispatch   2501.0 us\n  combine         2544.0 us\n"
    )
    assert kernel_times.parse(text)["dispatch"] == pytest.approx(2469.1e-6)
    assert kernel_times.parse(text)["plan_dispatch"] == pytest.approx(2501e-6)
    with pytest.raises(ValueError, match="no times of four kernels"):
        kernel_times.parse("  plan          89.6 us\n")
