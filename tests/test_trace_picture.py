# SPDX-License-Identifier: Apache-2.0
"""Profiles of CPU devices say who waits for whom: tools/docs/trace_picture.py reads them."""

import gzip
import json
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jax_ep
from ep_testing import program_files
from ep_testing.programs import make_mesh

ROOT = pathlib.Path(__file__).resolve().parents[1]
RANKS, LATE, SECONDS = 4, 2, 0.5


@pytest.fixture(scope="module")
def program():
    return program_files.load(ROOT / "tools" / "docs" / "trace_picture.py")


# --- what JAX writes ---------------------------------------------------------------------------


def _late(x):
    """x, on one rank half a second later."""

    def sleep(x):
        time.sleep(SECONDS)
        return np.asarray(x)

    def slow(x):
        return jax.pure_callback(sleep, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    return jax.lax.cond(jax.lax.axis_index("expert") == LATE, slow, lambda x: x, x)


def _all_here(small, after):
    """As in docs/guide/profiling.md."""
    first = after.ravel()[0]
    count = jax.lax.psum((first == first).astype(jnp.int32), "expert")
    return jnp.where(count >= 0, small, 0)


def _profile(folder, body):
    """Profiles the second run of `body(x, topk_idx, topk_weights, group)` on ranks."""
    mesh = make_mesh((RANKS,), ("expert",))
    config = jax_ep.EpConfig(
        num_experts=8, num_topk=2, hidden=16, max_tokens_per_rank=8, dtype="float32"
    )
    x = jnp.ones((RANKS * 8, 16))
    logits = jax.random.normal(jax.random.key(0), (RANKS * 8, 8))
    with jax_ep.EpGroup(mesh, "expert", config, backend="ffi") as group:
        f = jax.jit(
            jax.shard_map(
                lambda *args: body(*args, group),
                mesh=mesh, in_specs=P("expert"), out_specs=P("expert"), check_vma=False,
            )
        )  # fmt: skip
        args = jax.device_put((x, *jax_ep.route(logits, num_topk=2)))
        jax.block_until_ready(f(*args))
        with jax.profiler.trace(folder):
            jax.block_until_ready(f(*args))


def _exchange(x, topk_idx, topk_weights, group):
    recv = jax_ep.dispatch(_late(x), topk_idx, topk_weights, group=group)
    return jax_ep.combine(recv.x, recv.handle, recv.weights, group=group)


def _exchange_once_all_are_here(x, topk_idx, topk_weights, group):
    x = _late(x)
    recv = jax_ep.dispatch(x, _all_here(topk_idx, x), topk_weights, group=group)
    return jax_ep.combine(recv.x, recv.handle, recv.weights, group=group)


def _exchange_in_halves(x, topk_idx, topk_weights, group):
    flight = jax_ep.dispatch_start(_late(x), topk_idx, topk_weights, group=group)
    recv = jax_ep.dispatch_done(flight, group=group)
    return jax_ep.combine(recv.x, recv.handle, recv.weights, group=group)


@pytest.mark.parametrize("body", [_exchange, _exchange_in_halves])
def test_a_rank_that_comes_late_is_found(body, program, tmp_path):
    _profile(tmp_path, body)
    dispatch, combine = program.exchanges(program.read(tmp_path), RANKS)
    assert "dispatch" in dispatch.name
    assert "combine" in combine.name
    assert dispatch.last.device == LATE
    assert set(dispatch.waits()) == set(range(RANKS)) - {LATE}
    assert max(dispatch.waits().values()) > SECONDS * 1e6 / 2
    assert dispatch.last.duration < SECONDS * 1e6 / 2, "copying"
    assert max(combine.waits().values()) < SECONDS * 1e6 / 2


def test_a_collective_before_an_exchange_takes_the_waiting(program, tmp_path):
    _profile(tmp_path, _exchange_once_all_are_here)
    events = program.read(tmp_path)
    dispatch, _ = program.exchanges(events, RANKS)
    assert max(dispatch.waits().values()) < SECONDS * 1e6 / 2
    waited = [event for event in events if event.name.startswith(program.COLLECTIVES)]
    assert max(event.duration for event in waited) > SECONDS * 1e6 / 2


# --- how it is read ----------------------------------------------------------------------------


def _write(folder, events):
    """A profile of (device, run, name, start, duration), and of what is no operation."""
    trace = [
        {
            "ph": "X", "name": name, "ts": start, "dur": duration,
            "args": {"device_ordinal": str(device), "run_id": run, "hlo_op": name},
        }
        for device, run, name, start, duration in events
    ]  # fmt: skip
    trace.append({"ph": "X", "name": "end: jax_ep_plan.1", "ts": 0, "dur": 1, "args": {}})
    of_none = {"device_ordinal": "0", "run_id": "7"}
    trace.append({"ph": "X", "name": "wait for completion", "ts": 0, "dur": 1, "args": of_none})
    (folder / "of.trace.json.gz").write_bytes(
        gzip.compress(json.dumps({"traceEvents": trace}).encode())
    )


TWICE_IN_A_LOOP = [
    (0, "7", "jax_ep_plan.1", 10, 2), (1, "7", "jax_ep_plan.1", 40, 30),
    (2, "7", "jax_ep_plan.1", 15, 5), (3, "7", "jax_ep_plan.1", 10, 3),
    (0, "7", "jax_ep_plan.1", 80, 9), (1, "7", "jax_ep_plan.1", 75, 1),
    (0, "7", "jax_ep_combine.2", 100, 12), (1, "7", "jax_ep_combine.2", 110, 20),
    (0, "7", "dot.1", 60, 20), (0, "7", "psum.1", 90, 7), (0, "6", "jax_ep_plan.1", 1, 1),
]  # fmt: skip


def test_groups_and_visits_are_told_apart(program, tmp_path):
    _write(tmp_path, TWICE_IN_A_LOOP)
    found = program.exchanges(program.read(tmp_path), ranks=2)
    assert [(e.last.device, e.last.duration, e.waits()) for e in found] == [
        (1, 30, {0: 28}),
        (2, 5, {3: 2}),
        (0, 9, {1: 4}),
        (1, 20, {0: 0}),
    ]
    assert [line.split()[2:] for line in program.lines(found)][1:] == [
        ["1", "0.03", "0.03", "0.03"],
        ["2", "0.00", "0.00", "0.01"],
        ["0", "0.00", "0.00", "0.01"],
        ["1", "0.00", "0.00", "0.02"],
    ]


def test_a_folder_without_exchanges_is_refused(program, tmp_path):
    with pytest.raises(ValueError, match=r"has no \*\.trace\.json\.gz"):
        program.read(tmp_path)
    _write(tmp_path, [(0, "7", "dot.1", 60, 20)])
    with pytest.raises(ValueError, match="no exchange on a CPU device"):
        program.read(tmp_path)


def test_spans_that_touch_are_one(program):
    assert program.merged([(5.0, 1.0), (0.0, 2.0), (1.0, 0.5), (2.01, 1.0)], gap=0.02) == [
        (0.0, pytest.approx(3.01)),
        (5.0, 1.0),
    ]


def test_what_devices_do_is_told_apart(program, tmp_path):
    _write(tmp_path, TWICE_IN_A_LOOP)
    events = program.read(tmp_path)
    kinds = program.spans(events, program.exchanges(events, ranks=2))
    in_us = {
        kind: {
            device: [(round(start * 1e3) + 10, round(duration * 1e3)) for start, duration in parts]
            for device, parts in lanes.items()
        }
        for kind, lanes in kinds.items()
    }
    assert in_us == {
        program.OWN: {0: [(60, 20)]},
        program.COLLECTIVE: {0: [(90, 7)]},
        program.WAITING: {0: [(12, 28)], 1: [(76, 4)], 3: [(13, 2)]},
        program.MEANWHILE: {0: [(40, 30), (112, 18)], 1: [(80, 9)], 3: [(15, 5)]},
        program.COPYING: {0: [(80, 9)], 1: [(40, 30), (110, 20)], 2: [(15, 5)]},
    }


def test_a_picture_has_a_lane_for_each_device(program, tmp_path):
    pytest.importorskip("matplotlib")
    _write(tmp_path, TWICE_IN_A_LOOP)
    events = program.read(tmp_path)
    program.draw(events, program.exchanges(events, ranks=2), "a title", tmp_path / "picture.svg")
    text = (tmp_path / "picture.svg").read_text()
    for words in (*(f"device {d}" for d in range(4)), "a title", *program.COLORS):
        assert words in text, words
