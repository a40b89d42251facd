# SPDX-License-Identifier: Apache-2.0
"""`python -m jax_ep.check_nodes`: its dry run, what it finds, what processes tell each other."""

import json

import numpy as np
import pytest

from ep_launch.processes import run_processes
from jax_ep import check_nodes, reference

SMALL = ["--turns", "12", "--tokens", "16", "--hidden", "64"]


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs it on four of the devices here; status, report and what it printed."""
    devices = check_nodes.jax.devices()[:4]
    monkeypatch.setattr(check_nodes.jax, "devices", lambda: devices)

    def run(*args):
        out = tmp_path / "report.json"
        status = check_nodes.main([*SMALL, *args, "--out", str(out)])
        return status, json.loads(out.read_text()), capsys.readouterr().out

    return run


def test_a_dry_run_finds_all_right_and_measures(run):
    status, report, printed = run("--domain-size", "2")
    assert status == 0
    assert report["mesh"] == {"host": 1, "device": 4}
    checks = {*(case.name for case in check_nodes.CASES), "12 turns", "measured at 16 tokens"}
    assert set(report["checks"]) == checks
    assert set(report["checks"].values()) == {"right"}
    (measured,) = report["measured"]
    assert measured["tokens"] == 16
    assert all(us > 0 for us in measured["microseconds"].values())
    assert "long rows: right" in printed
    assert "DRY RUN: one host" in printed
    assert "info" in report["processes"][0]


def test_a_wrong_sum_is_found_and_nothing_is_measured(run, monkeypatch):
    combine = reference.combine

    def off(*args, **kwargs):
        return combine(*args, **kwargs) + np.ones((), kwargs["dtype"])

    monkeypatch.setattr(check_nodes.reference, "combine", off)
    status, report, printed = run()
    assert status == 1
    assert report["measured"] == []
    assert "by rank: {'sums': [0, 1, 2, 3]" in report["checks"]["bfloat16"]["0"]
    assert report["checks"]["12 turns"] == "right"
    assert "sums" in printed


@pytest.mark.parametrize("missing", [["--process", "1"], ["--coordinator", "here:1"]])
def test_options_by_hand_go_together(missing, capsys):
    with pytest.raises(SystemExit):
        check_nodes.parse_args(missing)
    assert "go together" in capsys.readouterr().err


@pytest.mark.multiprocess
def test_what_goes_wrong_in_any_process_is_in_the_report(tmp_path):
    # On CPU no kernels reach another process, which each of them says.
    out = tmp_path / "report.json"
    code = f"""
from jax_ep import check_nodes
assert check_nodes.main([*{SMALL!r}, "--out", {str(out)!r}]) == 1
"""
    run_processes(code, num_processes=2, devices_each=2)
    report = json.loads(out.read_text())
    assert report["mesh"] == {"host": 1, "device": 4}
    for found in report["checks"].values():
        assert sorted(found) == ["0", "1"]
        assert all("EpUnavailable" in text and "spans several" in text for text in found.values())
