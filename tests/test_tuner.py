# SPDX-License-Identifier: Apache-2.0
"""What finds the best launches: the search, and the command that measures; no clock is asked."""

import contextlib
import dataclasses

import pytest

from ep_testing import fake_cuda
from ep_testing.tuning_tables import GRID, FakeMeasure, key
from jax_ep import __main__ as main
from jax_ep._src.tuner import cells
from jax_ep._src.tuner.search import WrongBitsError, search
from jax_ep._src.tuning import files
from jax_ep._src.tuning.table import Choice, Point, knee


def test_the_search_finds_the_planted_optimum():
    measure = FakeMeasure()
    entry = search(key(), GRID, measure)
    assert entry.use == Choice(num_sms=48, num_senders=4, tail=True)
    assert entry.us == pytest.approx(165, rel=0.02)
    assert entry.default_us == pytest.approx(270 * 1.12 * 1.2, rel=0.02)
    assert [point.choice.num_sms for point in entry.by_sms] == list(GRID.num_sms)
    assert entry.samples == 60
    assert measure.calls[-1][1] == 60
    candidates = sum(choices for choices, _ in measure.calls)
    assert candidates < 6 * 6 * 3, "fewer than there are combinations"


def test_what_is_best_already_stays_the_models_choice():
    measure = FakeMeasure(senders=8, tail=None, noise=0.0)
    grid = dataclasses.replace(GRID, default_sms=48, tail=False)
    assert search(key(), grid, measure).use == Choice()


def test_fewer_sms_are_not_taken_where_that_is_slower_than_the_models_choice():
    # 64 SMs are the model's choice, and the best; 48 are within 5 %, but slower.
    measure = FakeMeasure(senders=8, tail=None, noise=0.0)
    grid = dataclasses.replace(GRID, default_sms=64, tail=False)
    assert search(key(), grid, measure).use == Choice()
    # With fewer senders 48 are as fast as the model's choice.
    better = FakeMeasure(senders=4, tail=None, noise=0.0)
    assert search(key(), grid, better).use == Choice(num_sms=48, num_senders=4)


def test_other_bits_end_the_search():
    wrong = Choice(num_sms=24, num_senders=6, tail=True)
    with pytest.raises(WrongBitsError, match=r"num_senders=6.* gives other bits .* report"):
        search(key(), GRID, FakeMeasure(wrong=wrong))


def test_the_knee_is_the_fewest_sms_within_5_percent():
    points = [
        Point(us=us, choice=Choice(num_sms=n)) for n, us in ((8, 105.1), (16, 104), (64, 100))
    ]
    assert knee(points).num_sms == 16
    assert knee(points, most_us=103).num_sms == 64
    assert knee(points, most_us=90).num_sms == 64


def test_a_smaller_budget_takes_what_is_best_within_it():
    entry = search(key(op="dispatch"), GRID, FakeMeasure())
    assert entry.choice(None).num_sms == 48
    assert entry.choice(50).num_sms == 48
    assert entry.choice(40).num_sms == 32
    assert entry.choice(8).num_sms == 8
    assert entry.choice(7) == Choice()


# --- the command ---------------------------------------------------------------------------------


@pytest.fixture
def planted(monkeypatch):
    """The command measures a formula."""
    fake_cuda.install(monkeypatch)
    asked = []

    def measure(programs, op, path, tokens):
        del programs, path
        asked.append((op, tokens))
        if asked[-1] == measure.interrupted_at:
            raise KeyboardInterrupt
        return _Planted()

    measure.interrupted_at = None
    measure.asked = asked
    monkeypatch.setattr(cells, "GroupMeasure", measure)
    monkeypatch.setattr(cells, "open_programs", lambda *_: contextlib.nullcontext())
    return measure


class _Planted(FakeMeasure):
    """More SMs are always faster, in proportion to their number up to 30."""

    def exact(self, choice):
        return 1000 / min(choice.num_sms or 24, 30)


def _tune(*arguments):
    sizes = ["--hidden", "64", "--topk", "2", "--experts", "16", "--ranks", "2", "--samples", "8"]
    return main.main(["tune", *sizes, *arguments])


def test_the_command_measures_goes_on_and_draws(planted, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XLA_FLAGS", "")
    path = tmp_path / "t.json"
    planted.interrupted_at = ("combine", 2)
    assert _tune("--tokens", "1:4", "--out", str(path)) == 0
    assert "interrupted" in capsys.readouterr().err
    assert len(files.read(path).entries) == 3
    planted.asked.clear()
    planted.interrupted_at = None
    picture = tmp_path / "t.svg"
    assert _tune("--tokens", "1:4", "--out", str(path), "--plot", str(picture)) == 0
    assert "9 of 12 to measure" in capsys.readouterr().out
    assert len(planted.asked) == 9, "what was there is not measured again"
    table = files.read(path)
    assert len(table.entries) == 12
    assert {entry.use.num_sms for entry in table.entries} == {32}
    assert picture.read_text().lstrip().startswith("<?xml")
    planted.asked.clear()
    assert _tune("--tokens", "1:4", "--out", str(path), "--dry-run") == 0
    assert "0 of 12 to measure" in capsys.readouterr().out
    assert not planted.asked
    assert _tune("--tokens", "1:4", "--out", str(path), "--again", "--minutes", "0.000001") == 0
    assert len(planted.asked) == 1


def test_the_command_keeps_to_a_budget_and_names_bad_arguments(
    planted, tmp_path, monkeypatch, capsys
):
    del planted
    monkeypatch.setenv("XLA_FLAGS", "")
    path = tmp_path / "t.json"
    assert _tune("--tokens", "4:4", "--out", str(path), "--num-sms", "16") == 0
    sms = {point.choice.num_sms for e in files.read(path).entries for point in e.by_sms}
    assert sms == {8, 16}
    for arguments, message in (
        (("--tokens", "0:4"), "--tokens is 0:4; allowed: A:B with 1 <= A <= B"),
        (("--tokens", "x"), "--tokens is x; allowed: A:B with 1 <= A <= B"),
        (("--wire", "none,fp7"), "--wire is fp7; allowed: none, fp8"),
        (("--plot", "x.pdf"), "--plot is x.pdf; allowed: a name that ends in .svg or .png"),
        (("--ranks", "999"), "ranks is 999; allowed: 1 to "),
    ):
        assert _tune("--out", str(path), *arguments) == 1
        assert f"python -m jax_ep tune: {message}" in capsys.readouterr().err


def test_without_gpus_the_command_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XLA_FLAGS", "")
    assert _tune("--tokens", "1:1", "--out", str(tmp_path / "t.json")) == 1
    assert "python -m jax_ep tune: the devices here are no GPUs" in capsys.readouterr().err


def test_cells_are_those_of_both_paths_and_a_combine_knows_no_wire():
    sizes = cells.Sizes(
        num_experts=256, num_topk=8, hidden=64, tokens=(1, 256, 512), wires=(None, "float8_e4m3fn")
    )
    keys = [cell.key for cell in cells.cells(sizes, 2)]
    assert len(set(keys)) == len(keys) == 3 * 3 + 2 * 3
    assert {k.tokens for k in keys if k.path == "low_latency"} == {1, 256}
    # With 16 ranks fewer tokens fit the low-latency kernels.
    assert {c.key.tokens for c in cells.cells(sizes, 16) if c.key.path == "low_latency"} == {1}
