# SPDX-License-Identifier: Apache-2.0
"""The benchmark programs: what they compare is right, and they run and write what they should.

Nothing here looks at how long anything takes.
"""

import json

import jax
import numpy as np
import pytest

from ep_bench import on_host, report, timing
from ep_bench.cases import NUM_RANKS, Case
from ep_bench.checks import Expected, WrongResultError
from ep_bench.variants import (
    BASELINES,
    VARIANTS,
    as_numpy,
    ep_config,
    make_mesh,
    open_variant,
    put,
)
from ep_testing import program_files

# Sizes that no other size divides, so that a mixed-up axis shows.
CASE = Case.parse("13x40x24x3")


@pytest.mark.parametrize("with_gradient", [False, True], ids=["forward", "gradient"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("key", VARIANTS)
def test_every_variant_computes_the_dense_result(key, dtype, with_gradient):
    inputs = CASE.inputs(dtype)
    mesh = make_mesh()
    with open_variant(key, CASE, ep_config(CASE, dtype), mesh) as variant:
        result = variant.compile(with_gradient)(*put(inputs, mesh))
        names = ("x_bar", "topk_weights_bar") if with_gradient else ("out",)
        Expected.of(CASE, inputs, dtype).check(key, names, as_numpy(result))


def test_all_variants_exchange_rows_with_other_ranks():
    compiled = {}
    mesh = make_mesh()
    args = put(CASE.inputs("float32"), mesh)
    for key in BASELINES:
        with open_variant(key, CASE, ep_config(CASE, "float32"), mesh) as variant:
            compiled[key] = variant.compile(False).lower(*args).compile().as_text()
    assert " all-gather(" in compiled["gather_scatter"]
    assert " reduce-scatter(" in compiled["gather_scatter"]
    # There and back: the identity experts did not let XLA cancel the two.
    assert compiled["all_to_all"].count(" all-to-all(") == 2


@pytest.mark.parametrize("wrong", ["token", "weight", "nan"])
def test_a_wrong_result_is_noticed(wrong):
    inputs = CASE.inputs("float32")
    expected = Expected.of(CASE, inputs, "float32")
    out = expected.values["out"].copy()
    assert expected.check("same", ["out"], [out]) == 0
    assert expected.check("close", ["out"], [out * (1 + 2.0**-24)]) < 1
    if wrong == "token":
        out[[3, 40]] = out[[40, 3]]
    elif wrong == "weight":
        out[5] -= inputs.topk_weights[5, 0] * inputs.x[5]
    else:
        out[7, 0] = np.nan
    with pytest.raises(WrongResultError, match=r"mine: out\[\d+, \d+\] is .* expected .* within"):
        expected.check("mine", ["out"], [out])


def test_the_capacities_are_those_of_the_routing():
    received = np.bincount(CASE.topk_idx.reshape(-1) // (24 // NUM_RANKS), minlength=NUM_RANKS)
    assert CASE.max_received == received.max() <= CASE.recv_capacity == 49
    assert CASE.counts.shape == (NUM_RANKS, 24)
    assert CASE.counts.sum() == NUM_RANKS * 13 * 3
    assert CASE.bucket_capacity == CASE.counts.max()


@pytest.mark.parametrize("name", ["64x32", "64x32x16xtwo", "0x32x16x2", "8x8x12x2", "8x8x16x17"])
def test_a_bad_case_is_refused(name):
    with pytest.raises(ValueError, match=name):
        Case.parse(name)


def test_turns_pair_the_samples_of_a_round():
    calls = []

    def function(name):
        return lambda: calls.append(name) or jax.numpy.zeros(())

    samples = timing.time_in_turns(
        {"a": function("a"), "b": function("b")}, (), num_rounds=7, every={"b": 3}
    )
    assert np.isnan(samples["b"]).tolist() == [False, True, True, False, True, True, False]
    assert not np.isnan(samples["a"]).any()
    ratio = timing.paired_ratio(np.array([1.0, np.nan, 4.0]), np.array([2.0, 1.0, 2.0]))
    assert ratio.median == pytest.approx(1.25)


def _found():
    """The smallest results that can be reported, in made-up numbers."""
    spread = {"median": 2e-3, "p10": 1e-3, "p90": 3e-3}
    ratio = {"median": 0.5, "p10": 0.4, "p90": 0.6}
    timing_of = {key: {"label": name, "seconds": spread} for key, name in VARIANTS.items()}
    return {
        "environment": {
            "machine": "a CPU, 2 cores",
            "versions": {"jax": "9.9"},
            "commit": "abc",
            "command": "python benchmarks/run.py",
            "date": "today",
            "load_before": 0.1,
        },
        "num_pairs": 3,
        "results": [
            {
                **on_host._description(CASE, "float32", "forward"),
                "variants": timing_of,
                "ratios": dict.fromkeys(BASELINES, ratio),
                "ratio": ratio,
            }
        ],
    }


FOUND = _found()


def test_markdown_goes_between_the_markers_and_nowhere_else(tmp_path):
    path = tmp_path / "benchmarks.md"
    begin, end = (
        f"<!-- {word}: written by {report.marked_by(FOUND)} -->" for word in ("begin", "end")
    )
    path.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    report.write_markdown(path, FOUND)
    text = path.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "CPU, 2 cores" in text
    assert "old" not in text

    path.write_text("a page without markers")
    with pytest.raises(ValueError, match="must have"):
        report.write_markdown(path, FOUND)
    assert path.read_text() == "a page without markers"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_smoke_run_writes_every_number(tmp_path):
    out, page = tmp_path / "out.json", tmp_path / "page.md"
    options = ["--smoke", "--dtypes", "bfloat16", "--json", out, "--markdown", page]
    done = program_files.run_benchmarks(*options)
    assert done.returncode == 0, done.stderr
    written = json.loads(out.read_text())
    assert {"machine", "versions", "commit", "command", "date"} <= written["environment"].keys()
    results = written["results"]
    assert [(r["dtype"], r["direction"]) for r in results] == [
        ("bfloat16", "forward"),
        ("bfloat16", "forward + backward"),
    ]
    for result in results:
        # Without the compiled module, `ours` is `xla`, which is then not measured twice.
        assert result["variants"].keys() | {"xla"} == VARIANTS.keys()
        for variant in result["variants"].values():
            seconds = variant["seconds"]
            assert 0 < seconds["p10"] <= seconds["median"] <= seconds["p90"]
            assert 0 <= variant["error_of_allowed"] <= 1
            assert variant["planned_bytes"] > 0
            assert variant["peak_rss_bytes"] is None or variant["peak_rss_bytes"] >= 0
        assert len(result["variants"]["ours"]["samples"]) == written["num_pairs"]
        assert result["ratios"].keys() == set(BASELINES)
        assert result["ratio"] == result["ratios"][result["faster_baseline"]]
    for text in (done.stdout, page.read_text()):
        assert "all-gather + reduce-scatter" in text
        assert "times as long as the faster baseline" in text
    assert "begin: written by benchmarks/run.py, placement cpu -->" in page.read_text()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--dtypes", "int8"], "unknown dtypes ['int8']; allowed: bfloat16, float32"),
        (["--cases", "64x32"], "case '64x32' is not TxHxExK"),
        (["--pairs", "0"], "--pairs is 0; it must be at least 1"),
        (["--placement", "shared", "--plot", "x.pdf"], "allowed: a name that ends in .svg or .png"),
        (["--report", "nothing.json"], "nothing.json is not a file"),
        (["--full", "--smoke"], "not allowed with argument"),
        (["--ranks", "2"], "--ranks is not for placement cpu"),
        (["--plot", "x.svg"], "--plot is not for placement cpu"),
        (["--placement", "shared", "--no-memory"], "--no-memory is not for placement shared"),
        (["--placement", "own", "--virtual-ranks", __file__], "is not for placement own"),
        (["--placement", "own", "--smoke"], "placement one_process"),
        (["--placement", "one_process", "--smoke", "--ranks", "4"], "--smoke has its own ranks"),
        (["--placement", "own", "--ranks", "3"], "3 ranks; allowed"),
        (["--placement", "own", "--ranks", "1"], "1 ranks; allowed"),
        (
            ["--placement", "own", "--ranks", "2", "--tokens", "some"],
            "--tokens is some; allowed: numbers",
        ),
    ],
)
def test_a_bad_option_is_refused_before_anything_runs(args, message):
    done = program_files.run_benchmarks(*args)
    assert done.returncode == 2
    assert message in done.stderr
