# SPDX-License-Identifier: Apache-2.0
"""The event model: its parts by hand, and the kernels' measured lines."""

import dataclasses
import json
import pathlib
import re
import sys

import numpy as np
import pytest

from ep_bench import fit, kernel_work, predictions
from ep_bench.bounds import port_bytes
from ep_bench.bytes_moved import FP8_ROW, ROW
from ep_bench.cases import FP8, GpuCase
from ep_bench.exchange_model import Launch, Machine, Receive, Step, Tail, Work, simulate
from ep_bench.kernel_work import Instructions, combine_work, dispatch_work
from ep_testing import program_files
from marked_part import replaced

ROOT = pathlib.Path(__file__).resolve().parents[1]

# --- the engine --------------------------------------------------------------------------------

MACHINE = Machine(
    num_sms=1,
    into=100.0,
    out=50.0,
    into_of_sm=100.0,
    out_of_sm=50.0,
    link=10.0,
    instructions=8.0,
    warp_instructions=2.0,
    load_us=1.0,
    release_us=3.0,
    flag_us=0.5,
    poll_us=0.25,
    fixed_us=20.0,
)
LAUNCH = Launch(num_warps=1, num_senders=0, ahead=2, waits_for_stores=False)


def _step(**kwargs):
    return Step(**{"into": 0.0, "instructions": 0.0, "out": 0.0, "link": 0.0, **kwargs})


def _receives(*items):
    return Work(sends=[], receives=[Receive(needs=[], steps=steps) for steps in items])


@pytest.mark.parametrize(
    ("step", "us"),
    [
        (_step(into=200), 2 + 1),  # the port, and the latency
        (_step(into=200, out=100), 2 + 1 + 2),
        (_step(instructions=4), 1 + 2),  # a warp alone is slower than its SM
        (_step(link=40), 1 + 4),  # the link is slower than the port
    ],
)
def test_a_step_takes_its_parts(step, us):
    assert simulate(_receives([step]), MACHINE, LAUNCH) == pytest.approx(20 + 0.25 + us)


def test_loads_run_ahead_and_ports_are_shared():
    load = _step(into=200, out=10)
    # Five loads of 2 us one after another, the latency once, and the last store of 0.2 us.
    assert simulate(_receives([load] * 5), MACHINE, LAUNCH) == pytest.approx(20.25 + 10 + 1 + 0.2)
    two = dataclasses.replace(LAUNCH, num_warps=2)
    work = _receives(*[[_step(out=100)]] * 2)
    assert simulate(work, MACHINE, two) == pytest.approx(20.25 + 1 + 4)
    sms = dataclasses.replace(MACHINE, num_sms=2, out=1000.0)
    assert simulate(work, sms, LAUNCH) == pytest.approx(20.25 + 1 + 2)
    # But they share the memory.
    sms = dataclasses.replace(MACHINE, num_sms=2)
    assert simulate(work, sms, LAUNCH) == pytest.approx(20.25 + 1 + 4)


def test_warps_issue_together_what_one_of_them_does_not():
    work = _receives(*[[_step(instructions=4)]] * 6)
    six = dataclasses.replace(LAUNCH, num_warps=6)
    assert simulate(work, MACHINE, six) == pytest.approx(20.25 + 1 + 6 * 4 / 8)


def test_a_receiver_waits_for_what_is_sent():
    work = Work(
        sends=[[_step(link=40)]],
        receives=[Receive(needs=[0], steps=[_step(out=50)])],
    )
    two = dataclasses.replace(LAUNCH, num_warps=2, num_senders=1)
    arrived = 1 + 4 + 3 + 0.5
    assert simulate(work, MACHINE, two) == pytest.approx(20 + arrived + 0.25 + 1 + 1)
    nobody = dataclasses.replace(work, sends=[])
    with pytest.raises(RuntimeError, match=r"nobody sends what is waited for: \[0\]"):
        simulate(nobody, MACHINE, two)


def test_nobody_receives_before_the_plan_is_there():
    work = Work(
        sends=[[_step(link=40)]],
        receives=[Receive(needs=[], steps=[_step(out=50)]) for _ in range(2)],
    )
    launch = Launch(num_warps=2, num_senders=1, ahead=2, waits_for_stores=False, planned_us=6.0)
    # Who has sent, by 1 + 4 + 3, takes the second item; the other has had the first since 6.
    assert simulate(work, MACHINE, launch) == pytest.approx(20 + 8 + 0.25 + 1 + 1)
    late = dataclasses.replace(launch, planned_us=9.0)
    assert simulate(work, MACHINE, late) == pytest.approx(20 + 9 + 0.25 + 1 + 2)
    alone = dataclasses.replace(launch, planned_us=0.0)
    assert simulate(work, MACHINE, alone) < 20 + 6  # when all has been sent


def test_a_ticket_taken_ahead_keeps_an_item_from_who_is_idle():
    long, short = [_step(out=500)], [_step(out=5)]
    machine = dataclasses.replace(MACHINE, num_sms=2, out=1e9)
    work = _receives(long, short, long)  # two warps, and the first reserves the third item
    ahead = simulate(work, machine, dataclasses.replace(LAUNCH, tickets_ahead=True))
    when_done = simulate(work, machine, LAUNCH)
    assert ahead == pytest.approx(20 + 2 * (0.25 + 1 + 10))
    assert when_done == pytest.approx(20 + 2 * (0.25 + 1) + 10 + 0.1)


def test_a_tail_takes_what_is_left_when_all_has_been_sent():
    receives = [Receive(needs=[0], steps=[_step(out=500)])] * 10
    work = Work(sends=[[_step(link=1000)]], receives=receives)
    machine = dataclasses.replace(MACHINE, into=1e9, out=1e9)
    launch = dataclasses.replace(LAUNCH, num_senders=1)
    arrived, item = 1 + 100 + 3 + 0.5, 0.25 + 1 + 10
    assert simulate(work, machine, launch) == pytest.approx(20 + arrived + 10 * item)
    tail = Tail(num_sms=9, into=1e9, out=1e9, launch_us=5)
    assert simulate(work, machine, launch, tail) == pytest.approx(20 + arrived + 5 + item)
    slower = dataclasses.replace(tail, out=100)  # of all ten SMs together
    assert simulate(work, machine, launch, slower) > 20 + arrived + 9 * 5


# --- the kernels' work -------------------------------------------------------------------------


def _constant(file, name):
    found = re.search(rf"\b{name} = (\d+);", (ROOT / "csrc" / file).read_text())
    return int(found[1])


def test_the_model_has_the_kernels_constants():
    of = {
        "CHUNK_TARGET": "kChunkTarget",
        "MAX_CHUNKS": "kMaxChunks",
    }
    for ours, theirs in of.items():
        assert getattr(kernel_work, ours) == _constant("core/work_partition.h", theirs)
    for operation in ("dispatch", "combine"):
        name = operation.title()
        chunk = _constant("core/work_partition.h", f"kMax{name}ChunkTokens")
        segment = _constant("core/work_partition.h", f"k{name}SegmentBytes")
        assert kernel_work.MAX_CHUNK_TOKENS[operation] == chunk
        assert kernel_work.SEGMENT_BYTES[operation] == segment
    configs = (ROOT / "csrc/tuning/warps_and_stages.h").read_text()
    compiled = r"kCompiled(Dispatch|Combine)\{\.num_warps = (\d+), \.num_stages = (\d+)\}"
    dispatch, combine = kernel_work.DISPATCH_WARPS, kernel_work.COMBINE_WARPS
    sizes = re.findall(compiled, configs)
    assert sizes == [("Dispatch", str(dispatch), "4"), ("Combine", str(combine), "4")]


def test_senders_are_those_of_tuning():
    source = (ROOT / "csrc/tuning/heuristics.cc").read_text()
    body = re.search(r"int32_t num_senders\(.*?\n}", source, re.DOTALL)[0]
    assert "small ? kCompiledCombine.num_warps / 2 : is_rank_major ? 8 : 10;" in body
    assert "if (has_tail && shape.num_ranks <= 2) return wire == Wire::kSame ? 8 : 12;" in body
    assert "if (wire == Wire::kSame) return 5;\n  return is_rank_major ? 8 : 6;" in body
    case = GpuCase(num_tokens=4096, num_ranks=2, num_sms=24)
    by_rank = dataclasses.replace(case, layout="rank")
    found = [kernel_work.num_senders("combine", c) for c in (case, by_rank)]
    few = GpuCase(num_tokens=256, num_ranks=2, num_sms=24)
    assert [*found, kernel_work.num_senders("combine", few)] == [10, 8, 8]


def test_tails_are_those_of_tuning():
    source = (ROOT / "csrc/tuning/heuristics.cc").read_text()
    for name, value in (
        ("kSmStoreRate", f"{kernel_work.SM_STORE_RATE // 1000}'000"),
        ("kLinkRate", f"{kernel_work.LINK_RATE // 1000}'000"),
        ("kFp8Share", f"{FP8_ROW / ROW:.3f}"),
        ("kMinTailBytes", f"{kernel_work.MIN_TAIL_BYTES / 1e6:.0f}e6"),
    ):
        assert f"double {name} = {value};" in source
    case = GpuCase(num_tokens=4096, num_ranks=2, num_sms=24)
    # As Tuning.IdleSmsHelpWhereMuchIsLeftWhenAllHasBeenSent has it.
    for more, expected in (
        ({}, True),
        ({"tail": False}, False),
        ({"layout": "rank"}, False),
        ({"num_ranks": 8}, False),
        ({"num_ranks": 8, "wire_dtype": FP8}, True),
    ):
        assert kernel_work.has_tail(dataclasses.replace(case, **more)) == expected


@pytest.mark.parametrize("layout", ["expert", "rank"])
@pytest.mark.parametrize("wire", [None, FP8])
def test_the_works_bytes_are_those_of_the_bounds(layout, wire):
    case = GpuCase(num_tokens=1024, num_ranks=4, layout=layout, wire_dtype=wire)
    cost = Instructions(quantize=1, restore=1, add=1, add_again=1)
    for operation, make in (("dispatch", dispatch_work), ("combine", combine_work)):
        if operation == "combine" and wire:
            continue
        moved, work = port_bytes(operation, case), make(case, cost)
        # A bound is the busiest rank's.
        assert work.total("into") == pytest.approx(moved.into, rel=0.02)
        assert work.total("out") + work.total("link") == pytest.approx(moved.out, rel=0.02)
        assert work.total("link") == pytest.approx(moved.link, rel=0.02)


def test_instructions_are_counted_for_what_is_converted_and_summed():
    case = GpuCase(num_tokens=1024, num_ranks=2, wire_dtype=FP8, layout="rank")
    ones = Instructions(quantize=1, restore=0, add=0, add_again=0)
    assert dispatch_work(case, ones).total("instructions") == 1024 * 7168 / 256
    restore = dataclasses.replace(ones, quantize=0, restore=1)
    rows = np.sum(case.topk_idx // 128 == 0, axis=2).astype(bool).sum()
    assert dispatch_work(case, restore).total("instructions") == rows * 7168 / 256
    # Each selection is a term: once for a row, and again for what else the row stands for.
    both = Instructions(quantize=0, restore=0, add=1, add_again=1)
    plain = dataclasses.replace(case, wire_dtype=None)
    held = (case.topk_idx // 128 == 0).sum()
    staged = (case.topk_idx[0] // 128 == 1).any(axis=1).sum()
    found = combine_work(plain, both).total("instructions")
    assert found == pytest.approx((held + staged) * 7)


# --- the measured lines ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def modeled():
    return predictions.modeled_lines(predictions.read())


@pytest.mark.slow
def test_the_model_reproduces_what_was_measured(modeled):
    lines = predictions.read().lines
    far = {
        line.name: f"{us:.0f} instead of {line.us:.0f} us"
        for line, us in zip(lines, modeled, strict=True)
        if abs(us / line.us - 1) > 0.1
    }
    assert not far
    assert {line.fitted for line in lines} == {True, False}


@pytest.mark.slow
def test_the_page_has_the_models_tables(modeled):
    predict = program_files.load(ROOT / "benchmarks" / "predict.py")
    page = (ROOT / "docs/measurements/performance.md").read_text()
    text = predict.text(predictions.read(), modeled, "github")
    assert page == replaced(page, predict.MARK, text), (
        "python benchmarks/predict.py --markdown docs/measurements/performance.md"
    )


def test_lines_are_measured_again_by_the_programs(tmp_path):
    # On GPUs that are not there, with numbers that are made up.
    known = predictions.read()
    rates = {name: {str(n): r for n, r in of.items()} for name, of in known.probe["rates"].items()}
    printed = json.dumps({**known.probe, "num_gpus": 8, "rates": rates})
    programs = {
        "csrc/probe/link_probe": [
            "assert sys.argv[1:] == ['gpus=8', 'sms=8,24,64']",
            f"print({printed!r})",
        ],
        "csrc/kernels/virtual_ranks": [
            "assert sys.argv[2] == '8' and sys.argv[-1] == 'gpus=8'",
            "for i, name in enumerate(('plan', 'dispatch', 'combine', 'plan_dispatch')):",
            "    print(f'  {name:13} {10 * i + int(sys.argv[7]) / 10:8.1f} us')",
        ],
    }
    for name, lines in programs.items():
        program = tmp_path / name
        program.parent.mkdir(parents=True)
        program.write_text("\n".join([f"#!{sys.executable}", "import sys", *lines, ""]))
        program.chmod(0o755)
    again = predictions.measure_again(known, tmp_path, 8)
    assert [line.us for line in again.lines[:3]] == [12.4, 12.4, 22.4]
    assert {line.case.num_ranks for line in again.lines} == {8}
    assert again.calibration == known.calibration
    file = tmp_path / "lines.json"
    file.write_text(json.dumps(predictions.to_json(again)))
    assert predictions.read(file) == again


def test_a_fit_finds_the_rate_that_the_lines_were_made_with(monkeypatch):
    known = dataclasses.replace(predictions.read(), tickets_ahead=False)
    case = GpuCase(num_tokens=1024, num_ranks=2, num_sms=24)
    true = dataclasses.replace(known.calibration, instructions_per_cycle=1.0)
    made = predictions.predict("combine", case, dataclasses.replace(known, calibration=true))
    line = predictions.Line(operation="combine", case=case, us=made, fitted=True)
    monkeypatch.setattr(fit, "FITTED", ("instructions_per_cycle",))
    monkeypatch.setattr(fit, "MAX_TRIES", 15)
    found = fit.fit(dataclasses.replace(known, lines=[line]))
    assert found.instructions_per_cycle == pytest.approx(1.0, rel=0.05)
