# SPDX-License-Identifier: Apache-2.0
"""The benchmark of copies of experts, as far as CPU devices can run it."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from ep_bench import expert_copies
from ep_bench.expert_copies import WITHOUT, CopiesCase
from ep_testing import program_files

ROOT = pathlib.Path(__file__).resolve().parents[1]
PROGRAM = ROOT / "benchmarks" / "run.py"
SMALL = {"num_experts": 16, "num_topk": 2, "hidden": 8, "ffn": 4, "spares": (1, 3)}


def test_popular_experts_are_where_the_case_says():
    case = CopiesCase(num_tokens=256, num_ranks=2, kind="zipf, sorted", **SMALL)
    load = np.bincount(case.topk_idx.ravel(), minlength=16)
    assert load.argmax() == 0
    assert (
        np.sort(case.topk_idx, axis=-1)[..., 1:] != np.sort(case.topk_idx, axis=-1)[..., :-1]
    ).all()
    assert list(case.variants()) == [WITHOUT, "S 9", "S 11"]
    # Other tokens than those that are measured, of the same popularity.
    seen = case.load / case.load.sum()
    np.testing.assert_allclose(load / load.sum(), seen, atol=0.05)
    assert (load != case.load).any()
    rows = {name: case.rows(plan) for name, plan in case.variants().items()}
    assert {int(r.sum()) for r in rows.values()} == {2 * 256 * 2}
    assert rows[WITHOUT].tolist() == [load[:8].sum(), load[8:].sum()]
    for name in ("S 9", "S 11"):
        assert rows[name].max() < 1.05 * rows[name].mean() < 0.8 * rows[WITHOUT].max()


def test_lines_have_the_slowest_rank_and_ratios():
    case = CopiesCase(num_tokens=16, num_ranks=2, **SMALL)
    names = [f"{name}: {what}" for name in case.variants() for what in ("layer", "exchange")]
    first = {name: np.full(3, 2e-6 if WITHOUT in name else 1e-6) for name in names}
    second = {name: samples * 2 for name, samples in first.items()}
    lines = expert_copies.summary(case, [first, second])
    assert [line["layer"] for line in lines] == [4e-6, 2e-6, 2e-6]
    row = expert_copies.to_text(lines).splitlines()[3].split()
    assert row[-4:] == ["2", "2.000", "2", "2.000"]


@pytest.mark.multiprocess
def test_a_smoke_run_writes_every_number(tmp_path):
    out = tmp_path / "more" / "copies.json"
    command = [sys.executable, str(PROGRAM), "--copies", "--smoke", "--placement", "one_process"]
    done = subprocess.run(
        [*command, "--json", str(out)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = json.loads(out.read_text())["lines"]
    assert [line["case"] for line in lines] == ["zipf, T 32"] * 3 + ["zipf, sorted, T 32"] * 3
    assert [line["variant"] for line in lines[:3]] == [WITHOUT, "S 5", "S 6"]
    for line in lines:
        assert sum(line["rows_of_ranks"]) == 2 * 32 * 2
        assert {len(samples) for samples in line["samples"].values()} == {2}
    assert "hottest/mean" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ranks", "3"], "3 ranks; allowed: 2 or more, and a divisor of 256"),
        (["--ranks", "2", "--tokens", "many"], "--tokens is many; allowed: numbers"),
        (["--ranks", "2", "--tokens", "8,0"], "--tokens is 0; allowed: 1 or more"),
        (["--smoke", "--ranks", "16"], "--smoke has its own ranks and tokens"),
        (["--ranks", "2", "--full"], "--full is not for --copies"),
    ],
)
def test_bad_options(arguments, message, capsys):
    with pytest.raises(SystemExit):
        program_files.load(PROGRAM).parse_args(["--copies", "--placement", "own", *arguments])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--copies"], "--copies is not for placement cpu"),
        (["--placement", "own", "--ffn", "64"], "--ffn is for --copies alone"),
    ],
)
def test_options_of_copies_are_for_copies(arguments, message, capsys):
    with pytest.raises(SystemExit):
        program_files.load(PROGRAM).parse_args(arguments)
    assert message in capsys.readouterr().err
