# SPDX-License-Identifier: Apache-2.0
"""Pictures of exchanges in halves, from profiles of GPUs."""

import gzip
import json

import pytest

from ep_bench import timeline

OURS = "void jax_ep::run_kernel<jax_ep::dev::LowLatencyDispatchKernel<...>>"
PRODUCT = "nvjet_sm90_tst_256x128"
EVENTS = [("MemcpyD2H", 0, 1), (OURS, 2, 7), (PRODUCT, 12, 157), (OURS, 180, 12), (OURS, 300, 5)]


def _write(path, events, pid=1):
    trace = [
        {"ph": "X", "pid": pid, "name": name, "ts": start, "dur": us} for name, start, us in events
    ]
    path.write_bytes(gzip.compress(json.dumps({"traceEvents": trace}).encode()))
    return path


def test_exchanges_are_found(tmp_path):
    (found,) = timeline.exchanges(_write(tmp_path / "trace.json.gz", EVENTS[::-1]))
    assert [k.duration for k in found] == [7, 157, 12]
    assert [k.start for k in found] == [2, 12, 180]


@pytest.mark.parametrize(("events", "pid"), [(EVENTS[:3], 1), (EVENTS, 701), ([], 1)])
def test_a_profile_without_exchange_is_refused(events, pid, tmp_path):
    with pytest.raises(ValueError, match=r"trace.json.gz: no product between two kernels"):
        timeline.exchanges(_write(tmp_path / "trace.json.gz", events, pid))


def test_a_picture_says_how_long_each_part_took(tmp_path):
    (found,) = timeline.exchanges(_write(tmp_path / "trace.json.gz", EVENTS))
    timeline.draw(found, "a title", tmp_path / "picture.svg")
    text = (tmp_path / "picture.svg").read_text()
    for part in ("first half, 7 µs", "matrix product, 157 µs", "second half, 12 µs", "a title"):
        assert part in text
