# SPDX-License-Identifier: Apache-2.0
"""Bounds of operations: the bytes that they move, and the probe's rates."""

import argparse
import json
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest

from ep_bench import bounds, link_probe, on_own_gpus
from ep_bench.bounds import PortBytes, port_bytes
from ep_bench.cases import FP8, GpuCase, own_gpu_cases
from ep_launch.placement import Placement

ROOT = pathlib.Path(__file__).resolve().parents[1]
ROW, FP8_ROW = 14336, 7168 + 224

# --- bytes -------------------------------------------------------------------------------------


def _case(**kwargs):
    """Two ranks of two tokens, as below."""
    case = GpuCase(num_tokens=2, num_ranks=2, **kwargs)
    idx = np.zeros((2, 2, 8), np.int32)
    idx[0, 0] = np.arange(8)  # stays
    idx[0, 1] = np.arange(124, 132)  # half of it goes
    idx[1] = np.arange(8)  # both go
    case.__dict__["topk_idx"] = idx
    return case


def test_bytes_through_the_sms_are_those_of_the_busiest_rank():
    # Rank 0 loads token 1 to send it, tokens 0 and 1 to keep them, and 2 that came. It stores 1
    # in the heap of rank 1, and 28 rows. Rank 1 sends 2 rows.
    expected = PortBytes(into=5 * ROW, out=29 * ROW, link=2 * ROW)
    assert port_bytes("dispatch", _case()) == expected
    assert port_bytes("dispatch", _case(layout="rank")).out == 5 * ROW
    # On the FP8 wire what stays is staged too: rank 0 stages 3 rows and gets 4.
    assert port_bytes("dispatch", _case(wire_dtype=FP8)) == PortBytes(
        into=2 * ROW + 4 * FP8_ROW, out=3 * FP8_ROW + 28 * ROW, link=2 * FP8_ROW
    )
    # Rank 0 loads 28 rows, and 1 sum of rank 1; it stores 2 sums for rank 1, and its 2 tokens.
    expected = PortBytes(into=29 * ROW, out=4 * ROW, link=2 * ROW)
    for operation in ("combine", "dispatch_vjp"):
        assert port_bytes(operation, _case()) == expected
    assert port_bytes("combine", _case(layout="rank")).into == 5 * ROW


def test_the_backward_of_combine_is_a_dispatch_that_reads_its_rows_too():
    sent, back = port_bytes("dispatch", _case()), port_bytes("combine_vjp", _case())
    assert (back.out, back.link) == (sent.out, sent.link)
    assert back.into == sent.into + 28 * ROW


def test_what_moves_no_rows_has_no_bound():
    assert port_bytes("plan", _case()) is None


def test_the_bytes_of_even_routing_are_those_of_the_arithmetic():
    moved = port_bytes("dispatch", GpuCase(num_tokens=4096, num_ranks=2))
    assert moved.out == pytest.approx(528e6, rel=0.01)
    assert moved.into == pytest.approx(176e6, rel=0.01)
    assert moved.link == pytest.approx(58.5e6, rel=0.01)
    wire = port_bytes("dispatch", GpuCase(num_tokens=4096, num_ranks=8, wire_dtype=FP8))
    assert wire.link == pytest.approx(140e6, rel=0.02)


# --- the link probe ----------------------------------------------------------------------------

PROBED = {
    "gpu": "a GPU",
    "num_gpus": 2,
    "num_sms": 132,
    "rates": {
        **{name: {"24": 2e12, "132": 4e12} for name in link_probe.LOCAL},
        **{name: {"24": 3e11, "132": 4e11} for name in link_probe.PEER},
    },
    "copy_engine": {"one": 3.9e11, "all": 3.8e11},
    "flag_latency": 6e-7,
}


def test_the_bound_is_what_takes_longest():
    rates = link_probe.parse(json.dumps(PROBED))["rates"]
    rates["store"][24] = 1e12

    def found(**moved):
        least = bounds.bound(PortBytes(**moved), rates, 24)
        return round(least.seconds * 1e6, 3), least.by

    assert found(into=10**8, out=10**8, link=6 * 10**7) == (200, "link")
    # At the rate of stores of what was loaded, which is higher here.
    assert found(into=10**8, out=5 * 10**8, link=6 * 10**7) == (250, "out")
    assert found(into=10**9, out=5 * 10**8, link=6 * 10**7) == (500, "in")


def test_numbers_of_sms_that_were_not_probed_have_no_bound():
    probe = link_probe.parse(json.dumps(PROBED))
    case = GpuCase(num_tokens=16, num_ranks=2, num_sms=24)
    assert bounds.bounds_of(case, ["plan", "dispatch"], probe).keys() == {"dispatch"}
    other = GpuCase(num_tokens=16, num_ranks=2, num_sms=64)
    assert bounds.bounds_of(other, ["dispatch"], probe) == {}
    assert bounds.bounds_of(case, ["dispatch"], None) == {}


def test_what_the_probe_prints_is_read_or_refused():
    assert link_probe.parse(json.dumps(PROBED))["rates"]["copy"] == {24: 2e12, 132: 4e12}
    rates = {name: PROBED["rates"][name] for name in link_probe.LOCAL}
    alone = {"gpu": "a GPU", "num_gpus": 1, "num_sms": 132, "rates": rates}
    assert link_probe.parse(json.dumps(alone))["rates"].keys() == set(link_probe.LOCAL)
    stopped = {**PROBED, "rates": {**PROBED["rates"], "load": {"24": 0.0}}}
    for text in ("", "{}", json.dumps({**alone, "num_gpus": 2}), json.dumps(stopped)):
        with pytest.raises(ValueError, match="link probe"):
            link_probe.parse(text)


def _program(tmp_path, text):
    program = tmp_path / "link_probe"
    program.write_text(f"#!{sys.executable}\n{text}\n")
    program.chmod(0o755)
    return program


def test_the_probe_is_run_with_a_deadline(tmp_path, monkeypatch):
    check = "import sys\nassert sys.argv[1:] == ['gpus=2', 'sms=24,132']"
    program = _program(tmp_path, f"{check}\nprint('''{json.dumps(PROBED)}''')")
    assert link_probe.run(program, num_gpus=2, sms=[132, 24, 24])["num_gpus"] == 2
    with pytest.raises(RuntimeError, match=r"(?s)the link probe failed: .*AssertionError"):
        link_probe.run(program, num_gpus=4, sms=[24])
    monkeypatch.setattr(link_probe, "DEADLINE_S", 0.1)
    with pytest.raises(RuntimeError, match=r"did not end within 0\.1 s"):
        link_probe.run(_program(tmp_path, "import time; time.sleep(60)"), num_gpus=2, sms=[24])


def test_a_run_says_why_it_has_no_bounds(tmp_path):
    program = _program(tmp_path, "raise SystemExit('no peer access')")
    args = argparse.Namespace(link_probe=program, ranks=2, placement=Placement.OWN)
    found = {"probes": {}, "failures": []}
    on_own_gpus.add_probe(args, own_gpu_cases(2, 128, full=False), found)
    why = "link probe: the link probe failed: no peer access"
    assert found == {"probes": {}, "failures": [why]}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["link_probe", "lost_owner"])
def test_the_probes_compile(name, tmp_path):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc: `make gpu` and `make nvlink` compile it where there are GPUs")
    flags = ["-std=c++20", "-arch=sm_90a", "--expt-relaxed-constexpr", "-Xcompiler=-Wall,-Wextra"]
    source = ROOT / "csrc" / "probe" / f"{name}.cu"
    command = [nvcc, *flags, "-Werror=all-warnings", f"-I{ROOT}", "-o", tmp_path / "probe", source]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
