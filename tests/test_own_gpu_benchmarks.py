# SPDX-License-Identifier: Apache-2.0
"""The benchmark with a GPU for each rank, as far as CPU devices can run it: all but one collective.

Nothing here looks at how long anything takes.
"""

import json
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from ep_bench import (
    bytes_moved,
    comparison_programs,
    link_probe,
    on_own_gpus,
    on_ranks,
    own_gpu_tables,
    plot,
    report,
)
from ep_bench.cases import FP8, MEASURED, GpuCase, own_gpu_cases, routings_of
from ep_bench.cases import Case as CpuCase
from ep_bench.checks import Expected, WrongResultError, check_against_oracle
from ep_bench.variants import as_numpy, ep_config, open_variant, put
from ep_launch.placement import Placement
from ep_launch.ranks import Case
from ep_testing import program_files
from ep_testing.programs import make_mesh

ROOT = pathlib.Path(__file__).resolve().parents[1]


# --- ragged_all_to_all, which XLA does not compile for CPUs ------------------------------------

CASE = CpuCase.parse("13x40x24x3")


def _emulated(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """What `lax.ragged_all_to_all` is documented to do, by all-gathers; NaN if sizes disagree."""
    me = jax.lax.axis_index(axis_name)
    rows, starts, sizes, ends = (
        jax.lax.all_gather(a, axis_name)
        for a in (operand, input_offsets, send_sizes, output_offsets)
    )
    row = jnp.arange(output.shape[0])
    for source in range(rows.shape[0]):
        offset = row - ends[source, me]
        taken = rows[source, jnp.clip(starts[source, me] + offset, 0, rows.shape[1] - 1)]
        is_sent = (offset >= 0) & (offset < sizes[source, me])
        output = jnp.where(is_sent[:, None], taken, output)
    agree = jnp.all(recv_sizes == sizes[:, me])
    return jnp.where(agree, output, jnp.full((), jnp.nan, output.dtype))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_ragged_baseline_computes_the_dense_result(dtype, monkeypatch):
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", _emulated)
    inputs, mesh = CASE.inputs(dtype), make_mesh((8,), ("expert",))
    with open_variant("ragged_all_to_all", CASE, ep_config(CASE, dtype), mesh) as variant:
        out = variant.compile(with_gradient=False)(*put(inputs, mesh))
    Expected.of(CASE, inputs, dtype).check("ragged", ["out"], as_numpy(out))


def test_the_ragged_baseline_is_lowered_for_gpus_to_two_collectives():
    mesh = make_mesh((8,), ("expert",))
    args = put(CASE.inputs("bfloat16"), mesh)
    with open_variant("ragged_all_to_all", CASE, ep_config(CASE, "bfloat16"), mesh) as variant:
        traced = variant.compile(with_gradient=False).trace(*args)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@ragged_all_to_all") == 2


# --- cases, bytes, checks ----------------------------------------------------------------------


def test_the_default_cases_are_part_of_the_product():
    full = own_gpu_cases(8, 4096, full=True)
    throughout = [c for c in full if not c.tail]  # on so many SMs
    assert [(c.layout, c.wire_dtype, c.num_sms) for c in throughout] == [
        ("expert", wire, 24) for wire in (None, FP8)
    ]
    assert len(full) == len(set(full)) == 3 * 2 * 3 + len(throughout)
    some = own_gpu_cases(8, 4096, full=False)
    assert set(some) < set(full)
    assert {c.num_sms for c in some} == {24, 64, 132}
    assert {c.layout for c in some if c.num_sms == 64} == {"expert", "rank"}
    few = own_gpu_cases(8, 128, full=False)
    assert {c.num_sms for c in few if not c.low_latency} == {24}
    assert [(c.layout, c.routing, c.wire_dtype, c.num_sms) for c in few if c.low_latency] == [
        (layout, "uniform", wire, 64) for layout in ("expert", "rank") for wire in (None, FP8)
    ]
    of_routings = routings_of(some)
    assert [(c.routing, c.wire_dtype, c.num_sms) for c in of_routings] == [
        ("uniform", None, 24),
        ("zipf", None, 24),
    ]


def test_buckets_that_would_fill_a_gpu_are_left_out():
    uniform, zipf = routings_of(own_gpu_cases(8, 4096, full=False))
    assert "all_to_all" in on_own_gpus.compared_in(uniform)
    assert zipf.bucket_capacity > 10 * uniform.bucket_capacity
    assert "all_to_all" not in on_own_gpus.compared_in(zipf)


def test_traffic_counts_each_token_once_for_each_rank():
    case = GpuCase(num_tokens=2, num_ranks=2)
    idx = np.zeros((2, 2, 8), np.int32)
    idx[0, 0] = np.arange(8)  # stays
    idx[0, 1] = np.arange(124, 132)  # half of it goes
    idx[1] = np.arange(8)  # both go
    case.__dict__["topk_idx"] = idx
    found = bytes_moved.traffic("combine", case)
    # 5 rows and 32 selections, 3 and 20 of them to another rank; two ranks.
    assert found.logical == (5 * 14336 + 32 * 12) / 2
    assert found.wire == (3 * 14336 + 20 * 12) / 2
    wire = GpuCase(num_tokens=2, num_ranks=2, wire_dtype=FP8)
    wire.__dict__["topk_idx"] = idx
    assert bytes_moved.traffic("dispatch", wire).wire == (3 * (7168 + 224) + 20 * 12) / 2
    assert bytes_moved.traffic("plan", case) is None


def test_results_on_an_fp8_wire_are_checked_within_its_rounding():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((6, 256)).astype(ml_dtypes.bfloat16).astype(np.float64)
    weights = rng.uniform(0.1, 1.0, (6, 4)).astype(np.float32)
    total = weights.astype(np.float64).sum(axis=1, keepdims=True)
    blocks = x.reshape(6, 2, 128)
    scale = np.abs(blocks).max(axis=2, keepdims=True) / 448
    sent = ((blocks / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * scale).reshape(
        x.shape
    )
    of_fp8 = Expected.of_outputs(x, weights, "bfloat16", 8, fp8_wire=True)
    assert 0.3 < of_fp8.check("fp8", ["out"], [sent * total]) <= 1
    exact = Expected.of_outputs(x, weights, "bfloat16", 2)
    assert exact.check("exact", ["out"], [x * total]) == 0
    coarse = (x * total).astype(ml_dtypes.float8_e4m3fn).astype(np.float64)
    for expected, wrong in ((of_fp8, sent[::-1] * total), (of_fp8, sent * 1.2), (exact, coarse)):
        with pytest.raises(WrongResultError):
            expected.check("wrong", ["out"], [wrong])


def test_the_closed_form_is_confirmed_by_the_oracle(monkeypatch):
    case = GpuCase(num_tokens=16, num_ranks=4, routing="zipf")
    check_against_oracle(case)
    monkeypatch.setattr(GpuCase, "recv_capacity", case.rows.busiest - 1)
    with pytest.raises(WrongResultError, match="nothing may be dropped"):
        check_against_oracle(case)


def test_a_token_in_the_wrong_place_is_noticed():
    mesh, case = make_mesh((2,), ("expert",)), GpuCase(num_tokens=4, num_ranks=2)
    x, _, weights, _ = comparison_programs._arguments(mesh, case)
    total = weights.astype(jnp.float32).sum(axis=1, keepdims=True)
    out = (x.astype(jnp.float32) * total).astype(jnp.bfloat16)
    assert comparison_programs._worst("mine", case, out) < 1
    swapped = jax.device_put(out[jnp.array([0, 1, 2, 4, 3, 5, 6, 7])], out.sharding)
    with pytest.raises(WrongResultError, match="mine, rank 0"):
        comparison_programs._worst("mine", case, swapped)


# --- processes ---------------------------------------------------------------------------------


@pytest.mark.multiprocess
def test_links_and_baselines_run_in_processes_of_their_own():
    case = GpuCase(num_tokens=4, num_ranks=2)
    keys = ["gather_scatter", "all_to_all"]
    work = [
        Case("links", comparison_programs.measure_links, {"num_bytes": 2**12, "num_samples": 2}),
        Case(
            "baselines",
            comparison_programs.compare,
            {"case": case, "keys": keys, "num_samples": 3, "num_calls": 2},
        ),
    ]
    links, compared = on_ranks.run_on_ranks(work, 2, Placement.OWN, {"JAX_PLATFORMS": "cpu"})
    assert [set(of_rank) for of_rank in links] == [{"ring", "pair"}] * 2
    entry = own_gpu_tables.comparison(case, compared, "own")
    assert {key: len(entry["seconds"][key]["samples"]) for key in keys} == dict.fromkeys(keys, 3)
    assert all(0 <= entry["error_of_allowed"][key] <= 1 for key in keys)


@pytest.mark.multiprocess
def test_a_failure_names_the_rank():
    work = [
        Case("links", comparison_programs.measure_links, {"num_bytes": "many", "num_samples": 2})
    ]
    with pytest.raises(RuntimeError, match="rank 0 failed in links"):
        on_ranks.run_on_ranks(work, 2, Placement.ONE_PROCESS, {"JAX_PLATFORMS": "cpu"})


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_smoke_run_writes_every_number(tmp_path):
    numbers, page, plot = (tmp_path / name for name in ("out.json", "page.md", "plot.svg"))
    marks = [
        f"<!-- {word}: written by benchmarks/run.py, placement own -->" for word in ("begin", "end")
    ]
    page.write_text("\n".join(["before", *marks, "after"]))
    done = program_files.run_benchmarks(
        "--placement",
        "one_process",
        "--smoke",
        "--json",
        numbers,
        "--markdown",
        page,
        "--plot",
        plot,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(numbers.read_text())
    assert found["links"].keys() == {"2 ranks, one_process"}
    assert found["links"]["2 ranks, one_process"].keys() == {"ring", "pair", "device_put"}
    ours = [r for r in found["results"] if not r["case"]["low_latency"]]
    kinds = [(r["case"]["layout"], r["case"]["routing"], r["case"]["wire_dtype"]) for r in ours]
    assert kinds == [
        (layout, routing, wire)
        for layout, routing in (("expert", "uniform"), ("expert", "zipf"), ("rank", "uniform"))
        for wire in (None, FP8)
    ]
    for result in found["results"]:
        operations = {"dispatch"} if result["case"]["wire_dtype"] else {*MEASURED}
        if result["case"]["low_latency"]:
            operations = {"dispatch", "combine", "there_and_back"}
        assert result["seconds"].keys() == operations
        assert result["traffic"].keys() == operations - {"plan", "there_and_back"}
    for entry in found["comparisons"]:
        assert entry["seconds"].keys() == {"ours", "ours_fp8", "gather_scatter", "all_to_all"}
        assert all(0 <= error <= 1 for error in entry["error_of_allowed"].values())
    assert "XLA does not compile it for CPUs" in done.stdout
    assert "all-gather + reduce-scatter" in page.read_text()
    assert plot.stat().st_size > 1000


def test_numbers_are_written_as_soon_as_they_are_there(tmp_path):
    """All that was measured before a rank failed, and that it did."""
    code = f"""
import json, sys
sys.path.insert(0, {str(ROOT / "benchmarks")!r})
import numpy as np
import run
from ep_bench import on_own_gpus

def run_on_ranks(work, num_ranks, placement, variables, each):
    plan = {{"plan": np.full(2, 4e-5)}}
    for index, values in enumerate([[{{"ring": np.full(2, 4e11)}}] * 2, [plan] * 2]):
        each(index, values)
        found = json.loads(args.json.read_text())
        print(len(found["links"]), len(found["results"]), len(found["comparisons"]))
    raise RuntimeError("rank 1 did not end something:\\nxla.SomeError: why")

on_own_gpus.on_ranks.run_on_ranks = run_on_ranks
on_own_gpus.check_against_oracle = lambda case: None
sizes = ["--placement", "own", "--ranks", "2", "--tokens", "128"]
args = run.parse_args([*sizes, "--json", {str(tmp_path / "x.json")!r}])
try:
    on_own_gpus.measure(args)
except RuntimeError:
    print("raised")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.split("\n")[:3] == ["1 0 0", "1 1 0", "raised"], done.stderr
    found = json.loads((tmp_path / "x.json").read_text())
    assert found["failures"] == ["T 128: rank 1 did not end something: xla.SomeError: why"]
    assert "Did not run: T 128: rank 1 did not end something" in report.to_text(found)
    assert "measured: links" in done.stderr


# --- reports -----------------------------------------------------------------------------------


def _canned(placement, combine_s, gather_s):
    """Made-up numbers of the goals' size."""
    case = GpuCase(num_tokens=4096, num_ranks=8, num_sms=24)
    fp8 = GpuCase(num_tokens=4096, num_ranks=8, num_sms=24, wire_dtype=FP8)
    times = {"plan": 4e-5, "dispatch": 7e-4, "combine": combine_s}
    slower = [{op: np.full(3, s * part) for op, s in times.items()} for part in (0.9, 1)]
    there = {"ours": 1.5e-3, "gather_scatter": gather_s}
    compared = {
        "seconds": {key: np.full(3, s) for key, s in there.items()},
        "error_of_allowed": dict.fromkeys(there, 0.5),
    }
    found = {
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
        "results": [
            own_gpu_tables.result(case, slower, placement),
            own_gpu_tables.result(fp8, [{"dispatch": np.full(3, 4.1e-4)}], placement),
        ],
        "comparisons": [own_gpu_tables.comparison(case, [compared], placement)],
        "failures": [],
    }
    links = [{"ring": np.full(2, 4e11)}, {"ring": np.full(2, 3.9e11)}]
    return found | {
        "links": {own_gpu_tables.where_of(found["results"][0]): own_gpu_tables.links(links)}
    }


def test_goals_are_met_or_missed():
    text = report.to_text(_canned("own", 8e-4, 3.5e-3))
    assert "FP8 plan + dispatch, T 4096, R 8, at most 24 SMs: 410 µs; the goal, 420, is met" in text
    assert "BF16 combine, T 4096, R 8, at most 24 SMs: 800 µs; the goal, 830, is met" in text
    assert "takes 2.33 times as long as jax_ep; the goal, 2, is met" in text
    text = report.to_text(_canned("own", 9e-4, 2.5e-3))
    assert "900 µs; the goal, 830, is missed" in text
    assert "takes 1.67 times as long as jax_ep; the goal, 2, is missed" in text


def test_low_latency_times_stand_beside_their_goals():
    found = _canned("own", 8e-4, 3.5e-3)
    assert "low-latency" not in report.to_text(found)
    sizes = {"num_tokens": 16, "num_sms": 64, "low_latency": True}
    times = {"dispatch": 12e-6, "combine": 7e-6, "there_and_back": 19e-6}
    values = [{op: np.full(3, s) for op, s in times.items()}]
    found["results"] = [
        own_gpu_tables.result(GpuCase(num_ranks=ranks, **sizes), values, "own") for ranks in (2, 4)
    ]
    found["links"]["2 ranks, own"] = found["links"]["4 ranks, own"] = {"ring": 3.9e11}
    lines = [line for line in report.to_text(found).splitlines() if line.startswith("16, ")]
    of_two = "12.0; goal 10.0 7.0; goal 11.0 19.0; goal 20.0"
    assert of_two in " ".join(lines[0].split())
    assert "goal" not in lines[1]


def test_rates_are_those_of_the_issues_arithmetic():
    found = _canned("own", 8e-4, 3.5e-3)
    assert found["links"] == {"8 ranks, own": {"ring": 3.9e11}}
    fp8 = found["results"][1]
    # 4096 tokens go to 5.3 of 8 ranks each.
    assert fp8["traffic"]["dispatch"]["logical"] == pytest.approx(160e6, rel=0.02)
    assert own_gpu_tables.rate(fp8, "dispatch", "logical") == pytest.approx(390e9, rel=0.02)
    assert own_gpu_tables.rate(fp8, "dispatch", "wire") == pytest.approx(390e9 * 7 / 8, rel=0.03)


def test_the_report_has_the_bounds_of_its_own_run():
    text = json.dumps(
        {
            "gpu": "a GPU",
            "num_gpus": 8,
            "num_sms": 132,
            "rates": {
                **{name: {"24": 2e12} for name in link_probe.LOCAL},
                **{name: {"24": 3e11} for name in link_probe.PEER},
            },
            "copy_engine": {"one": 3.9e11, "all": 3.8e11},
            "flag_latency": 6e-7,
        }
    )
    probe = link_probe.parse(text)
    found = _canned("own", 8e-4, 3.5e-3)
    assert "by the probe" not in report.to_text(found)
    case = GpuCase(num_tokens=4096, num_ranks=8, num_sms=24)
    values = [{"plan": np.full(3, 4e-5), "combine": np.full(3, 1.8e-3)}]
    found["results"] = [own_gpu_tables.result(case, values, "own", probe)]
    found["probes"] = {"8 ranks, own": json.loads(json.dumps(probe))}
    text = report.to_text(found)
    # 4096 tokens go to 4.6 of 7 peers each, at 300 GB/s.
    assert re.search(r"4096, 8 +BF16 +expert +24 +own +9\d\d \(link\): 0\.5\d", text)
    assert re.search(r"8 ranks, own +24 +2000 +2000 +2000 +2000 +300 +300 +300 +300", text)


def test_runs_are_reported_together(tmp_path):
    files = []
    for placement in ("own", "one_process"):
        found = _canned(placement, 8e-4, 3.5e-3) | {"failures": [f"something, {placement}"]}
        files.append(tmp_path / f"{placement}.json")
        files[-1].write_text(json.dumps(found))
    done = program_files.run_benchmarks("--report", *files, "--json", tmp_path / "both.json")
    assert done.returncode == 0, done.stderr
    both = json.loads((tmp_path / "both.json").read_text())
    assert both["links"].keys() == {"8 ranks, own", "8 ranks, one_process"}
    assert len(both["results"]) == 4
    for placement in ("own", "one_process"):
        assert f"Did not run: something, {placement}" in done.stdout
    plot.draw(both, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
