# SPDX-License-Identifier: Apache-2.0
"""The numbers that the example server's benchmark gives, against NumPy on made-up records."""

import json

import numpy as np
import pytest

from moe_serve.loadgen import Planned, Record, plan
from moe_serve.plots import latency_picture, load_picture
from moe_serve.report import latencies, summary, table
from moe_serve.telemetry import Load, Telemetry

TEXT = np.frombuffer(bytes(range(256)) * 4, np.uint8)


def _record(sent: float, *times: float, written: int | None = None, error: str = "") -> Record:
    planned = Planned(second=sent, prompt=b"x" * 10, max_tokens=9, seed=0)
    number = len(times) if written is None else written
    return Record(planned, sent, list(times), number, error)


RECORDS = [
    _record(1.0, 1.1, 1.15, 1.25),
    _record(1.5, 2.0),
    # Two bytes came together, as one character.
    _record(2.0, 2.2, 2.25, 2.45, written=4),
    _record(2.1, error="429: full"),
    _record(2.2, 2.5, error="ReadError: "),
]


def test_percentiles_are_those_of_numpy():
    numbers = summary(RECORDS, {})
    want = {
        "ttft": [0.1, 0.5, 0.2],
        "itl": [0.05, 0.1, 0.05, 0.2],
        "tpot": [0.15 / 2, 0.25 / 3],
        "e2e": [0.25, 0.5, 0.45],
    }
    for name, values in want.items():
        found = numbers[name]
        assert found["mean"] == pytest.approx(np.mean(values))
        for share in (50, 90, 99):
            assert found[f"p{share}"] == pytest.approx(np.percentile(values, share))


def test_throughput_counts_what_was_served_over_the_whole_time():
    numbers = summary(RECORDS, {})
    assert (numbers["requests"], numbers["failed"]) == (3, 2)
    assert numbers["errors"] == ["429: full", "ReadError: "]
    assert numbers["seconds"] == pytest.approx(1.45)
    assert numbers["requests_per_s"] == pytest.approx(3 / 1.45)
    assert numbers["written_bytes_per_s"] == pytest.approx(8 / 1.45)
    assert numbers["bytes_per_s"] == pytest.approx(38 / 1.45)
    json.dumps(numbers)


@pytest.mark.parametrize(
    ("slo", "kept"),
    [
        ({}, 3),
        ({"ttft": 300}, 2),
        ({"ttft": 300, "itl": 150}, 1),
        ({"tpot": 80}, 2),  # one byte has none
        ({"e2e": 400}, 1),
        ({"ttft": 1}, 0),
    ],
)
def test_goodput_is_what_kept_all_limits(slo, kept):
    numbers = summary(RECORDS, slo)
    assert numbers["goodput_requests_per_s"] == pytest.approx(kept / 1.45)
    assert numbers["slo_share"] == pytest.approx(kept / 5)


def test_the_table_says_it_all_in_milliseconds():
    text = table({**summary(RECORDS, {"ttft": 300}), "server": {"steps": 17}})
    rows = {line.split("  ")[0]: line.split() for line in text.splitlines()}
    assert rows["time to first byte (TTFT)"][-4:] == ["266.67", "200.00", "440.00", "494.00"]
    assert rows["requests that failed"][-1] == "2"
    assert rows["of these within ttft 300 ms"][-1] == "1.38"
    assert rows["steps"][-1] == "17"


def test_nothing_served_is_no_division_by_zero():
    numbers = summary([_record(1.0, error="503: down")], {})
    assert numbers["requests_per_s"] == 0
    assert numbers["ttft"] == {}
    assert "requests that failed" in table(numbers)


def test_a_plan_is_a_poisson_process_of_prompts_from_the_text():
    sizes = {"prompt": (5, 20), "output": (3, 4), "seed": 1}
    planned = plan(TEXT, requests=2000, rate=10, **sizes)
    assert planned == plan(TEXT, requests=2000, rate=10, **sizes)
    gaps = np.diff([one.second for one in planned])
    # Five standard errors; mean and standard deviation of the gaps are 0.1.
    assert abs(gaps.mean() - 0.1) < 5 * 0.1 / np.sqrt(2000)
    assert abs(gaps.std() - 0.1) < 5 * 0.1 * np.sqrt(2) / np.sqrt(2000)
    assert {len(one.prompt) for one in planned} == set(range(5, 21))
    assert {one.max_tokens for one in planned} == {3, 4}
    assert all(one.prompt in TEXT.tobytes() for one in planned)
    assert planned[0].second == 0
    assert {one.second for one in plan(TEXT, requests=9, rate=0, **sizes)} == {0}


def test_pictures_are_drawn_of_little_and_of_much():
    first, between = latencies(RECORDS)
    assert len(first) == 4  # what failed later, too
    marks = [(1.2, "rank 1 leaves"), (99.0, "after all")]
    pictures = [latency_picture(first, between, marks), latency_picture(first, [], [])]
    counts, ranks, alive = np.arange(16).reshape(2, 8), np.ones((2, 4)), np.ones(4, bool)
    loads = [Load(s, counts * s, ranks * s, alive) for s in (1, 2, 3)]
    pictures += [load_picture(loads, marks), load_picture(loads[:1], [])]
    assert all(picture.startswith(b"\x89PNG") for picture in pictures)


def test_imbalance_is_over_ranks_that_take_part():
    ranks = np.array([[4, 2, 0, 3], [0, 9, 0, 0], [0, 0, 5, 0]])
    load = Load(1.0, np.ones((3, 8)), ranks, np.array([True, True, False, True]))
    # Of the third layer, all was served by the rank that has left since.
    np.testing.assert_allclose(load.imbalance, [4 / 3, 3, 1])


def test_what_is_kept_does_not_grow_for_ever():
    telemetry = Telemetry()
    for number in range(1000):
        telemetry.mark(f"{number}")
    assert [text for _, text in telemetry.marks] == [f"{number}" for number in range(600, 1000)]
