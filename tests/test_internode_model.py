# SPDX-License-Identifier: Apache-2.0
"""The model of exchanges between domains: its bytes, its events by hand, and its page."""

import dataclasses
import json
import math
import pathlib
import re

import numpy as np
import pytest

from ep_bench import rail_model
from ep_testing import program_files

ROOT = pathlib.Path(__file__).resolve().parents[1]

model = program_files.load(ROOT / "benchmarks" / "internode_model.py")

# Nothing takes time but a NIC's bytes.
NIC_ALONE = rail_model.Machine(
    nic_gb_s=10.0,
    hop_us=0.0,
    message_us=0.0,
    link_gb_s=1e9,
    flag_us=0.0,
    release_us=0.0,
    poll_us=0.0,
    load_us=1e-9,
    instructions_per_us=1e12,
    scan_us=0.0,
    post_us=0.0,
)


def _small(num_domains=3, **kwargs):
    return rail_model.Problem(num_domains=num_domains, num_tokens=256, hidden=1024, **kwargs)


def _design(operation, num_domains=3, **kwargs):
    built = rail_model.product_design(num_domains, operation)
    return dataclasses.replace(built, **{"num_sms": 2, "chunk_tokens": 16, **kwargs})


# --- bytes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_domains", "num_groups"), [(2, 2), (4, 4), (8, 4), (8, 8), (16, 4), (64, 4)]
)
def test_bytes_are_those_of_sampled_routing(num_domains, num_groups):
    problem = rail_model.Problem(num_domains=num_domains, num_groups=num_groups)
    tokens, topk, ranks = 4000, problem.num_topk, problem.domain_ranks
    rng = np.random.default_rng(1)
    groups = rng.permuted(np.tile(np.arange(num_domains), (tokens, 1)), axis=1)[:, :num_groups]
    per_domain = problem.num_experts // num_domains
    among = np.tile(np.arange(num_groups * per_domain), (tokens, 1))
    chosen = rng.permuted(among, axis=1)[:, :topk]
    domain = np.take_along_axis(groups, chosen // per_domain, axis=1)
    rank = domain * ranks + chosen % per_domain // (per_domain // ranks)

    def wanted(of, count):
        hit = np.zeros((tokens, count), bool)
        np.put_along_axis(hit, of, True, axis=1)
        return hit

    by_domain, by_rank = wanted(domain, num_domains), wanted(rank, problem.num_ranks)
    assert by_domain[:, 1:].sum(1).mean() == pytest.approx(problem.remote_domains, rel=0.03)
    holders = by_rank.sum() / by_domain.sum()
    assert holders == pytest.approx(problem.holders, rel=0.02)
    assert topk * tokens / by_rank.sum() == pytest.approx(problem.experts_of_holder, rel=0.02)
    # Rank 0's domain pulls each row once for each rank that wants it, 7 of 8 over NVLink.
    pulled = by_rank.sum(1).mean() * problem.num_tokens * 7 / 8 * 7392
    assert problem.link_bytes(fp8=True) == pytest.approx(pulled, rel=0.03)
    sent = by_domain[:, 1:].sum(1).mean() * problem.num_tokens * 14336
    assert problem.network_bytes(fp8=False) == pytest.approx(sent, rel=0.03)


def test_messages_have_as_many_rows_as_their_tokens_want():
    problem = rail_model.Problem(num_domains=8)
    rows = np.array(rail_model.sampled_rows(problem, 32, 20_000, seed=1))
    share = problem.of_domain
    assert rows.mean() == pytest.approx(32 * share, rel=0.01)
    assert rows.var() == pytest.approx(32 * share * (1 - share), rel=0.05)
    assert list(rows[:5]) == list(rail_model.sampled_rows(problem, 32, 5, seed=1))
    assert list(rows[:9]) != list(rail_model.sampled_rows(problem, 32, 9, seed=2))


# --- events ------------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", ["dispatch", "combine"])
@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"window": 1, "units": 1},
        {"window": 2, "units": 3, "rail_senders": 1, "num_sms": 4},
        {"relays": 2, "relays_as_sent": True},
        {"domain_first": False, "skew_us": 50.0},
        {"slow_nic": 0.1, "window": 2},
    ],
)
@pytest.mark.parametrize("num_domains", [2, 3, 5])
def test_all_messages_arrive_and_no_buffer_is_used_twice(operation, kwargs, num_domains):
    problem, design = _small(num_domains), _design(operation, num_domains, **kwargs)
    result = rail_model.simulate(problem, design)
    others, chunks = num_domains - 1, 256 // 16
    shape = (num_domains, chunks, others)
    started, credited = (np.reshape(x, shape) for x in (result.started, result.credited))
    assert np.isfinite(credited).all()
    assert (credited > started).all()
    window = design.window
    assert (started[:, window:] >= credited[:, :-window]).all()
    in_flight = (started[:, :, None] >= started[:, None]) & (
        started[:, :, None] < credited[:, None]
    )
    assert in_flight.sum(2).max() <= window
    sent = np.sum(np.array(result.rows)) * problem.row_bytes(fp8=design.fp8) / num_domains
    assert result.wire_gb_s == pytest.approx(sent / result.us / 1e3)
    assert result.us >= sent / 47e3
    assert rail_model.simulate(problem, design) == result
    assert rail_model.simulate(problem, design, seed=2) != result


def test_a_slow_network_fills_the_window():
    result = rail_model.simulate(
        _small(2), _design("dispatch", 2, window=3), rail_model.Machine(nic_gb_s=0.1)
    )
    started, credited = (np.reshape(x, (2, 16)) for x in (result.started, result.credited))
    assert ((started[:, 6] >= started[:, :6].T) & (started[:, 6] < credited[:, :6].T)).sum() == 4


@pytest.mark.parametrize("operation", ["dispatch", "combine"])
@pytest.mark.parametrize("num_domains", [2, 4])
def test_where_nothing_else_takes_time_nics_are_always_busy(operation, num_domains):
    problem = _small(num_domains)
    design = _design(operation, num_domains, window=16, units=48, num_sms=24, fp8=False)
    result = rail_model.simulate(problem, design, NIC_ALONE)
    rows = np.reshape(list(result.rows), (num_domains, 16, -1))
    us = (rows * 2048 + 16) / 10e3
    busiest = us.sum((1, 2)).max()
    assert result.us >= busiest * (1 - 1e-6)
    assert result.us == pytest.approx(busiest, rel=1e-4 if num_domains == 2 else 0.1)


def test_one_message_takes_the_sum_of_its_steps():
    problem = rail_model.Problem(num_domains=2, num_tokens=16)
    machine = rail_model.Machine()
    design = _design("dispatch", 2)
    result = rail_model.simulate(problem, design, machine)
    rows = max(result.rows)
    quantize = rows * 28 * 143 / (0.27 * 1755)
    packed = 1.0 + 2.0 + 1.7 + 1.0 + quantize
    delivered = packed + 0.05 + 3.0 + (rows * 7392 + 16) / 47e3
    relayed = delivered + 1.0 + 1.7 + 0.782
    of_rank = rows * problem.holders / 8
    warps = 2 * 6 - 2
    part = 1.0 + 1.0 + 1.26 + 1.7 + of_rank / 4 * 28 * 58 / (0.27 * 1755)
    pulled = relayed + max(part, 8 * 4 * part / warps)
    assert result.us == pytest.approx(pulled)


def test_one_sum_takes_the_sum_of_its_steps():
    problem = rail_model.Problem(num_domains=2, num_tokens=16)
    result = rail_model.simulate(problem, _design("combine", 2), rail_model.Machine())
    rows = max(result.rows)
    add = 7 * 111 / (0.27 * 1755)
    own = rows * problem.holders / 8
    gathered = max(
        1.0 + 2.0 + 1.7 + own * problem.experts_of_holder * add,
        rows * problem.holders * 7 / 8 * 14336 / 334e3 * 2,
    )
    sent = gathered + 0.782 + 1.0 + 1.0 + 1.7 + 1.0 + rows * problem.holders * add
    delivered = sent + 0.05 + 3.0 + (rows * 14336 + 16) / 47e3
    terms = 8 * problem.of_rank + problem.of_domain
    assert result.us == pytest.approx(delivered + 1.0 + 4 * terms * add + 1.7)


def test_the_slowest_nic_holds_up_all():
    problem, design = _small(4), _design("combine", 4, num_sms=24)
    machine = rail_model.Machine(nic_gb_s=1.0)
    whole = rail_model.simulate(problem, design, machine).us
    slow = rail_model.simulate(problem, dataclasses.replace(design, slow_nic=0.5), machine).us
    assert slow == pytest.approx(2 * whole, rel=0.1)


def test_tokens_must_fill_their_rail_chunks():
    with pytest.raises(ValueError, match="256 tokens are no whole number of rail chunks"):
        rail_model.simulate(_small(), _design("dispatch", chunk_tokens=48))


# --- what it is a model of -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def sources():
    names = ("core/network_layout.h", "tuning/warps_and_stages.h", "tuning/heuristics.cc")
    paths = [ROOT / "csrc" / name for name in names]
    if not all(path.exists() for path in paths):
        pytest.skip("the C++ sources are not here")
    return "\n".join(path.read_text() for path in paths)


def test_rings_are_those_of_the_library(sources):
    found = {name: int(value) for name, value in re.findall(r"\b(k\w+) = (\d+);", sources)}
    assert {name: found.get(name) for name in rail_model.RINGS} == rail_model.RINGS
    (few,) = re.findall(r"kManyDomains \? (\d+) : kMaxRailChunkTokens", sources)
    assert int(few) == rail_model.FEW_DOMAINS_CHUNK_TOKENS
    assert "window = buffers < kFewestBuffers ? kFewestBuffers : buffers" in sources
    assert "gather_units = kGatherTokens / tokens" in sources


def test_warps_are_those_of_the_library(sources):
    warps = dict(re.findall(r"kCompiledInternode(\w+){\.num_warps = (\d+)", sources))
    assert {name.lower(): int(n) for name, n in warps.items()} == rail_model.WARPS
    ((dispatch, combine),) = re.findall(
        r"of_role = op == OpKind::kDispatch \? (\d+) : (\d+);", sources
    )
    assert {"dispatch": int(dispatch), "combine": int(combine)} == rail_model.WARPS_OF_ROLE
    assert f"kTransferBlocks = {rail_model.NUM_SMS};" in sources


def test_times_within_a_domain_are_those_of_the_calibration():
    known = json.loads((ROOT / "benchmarks" / "calibration" / "two_h200.json").read_text())
    calibration, machine = known["calibration"], rail_model.Machine()
    assert machine.link_gb_s == known["probe"]["rates"]["peer_load_all"]["24"] / 1e9
    assert machine.flag_us == pytest.approx(known["probe"]["flag_latency"] * 1e6)
    for name in ("release_us", "poll_us", "load_us", "quantize_instructions"):
        assert getattr(machine, name) == calibration[name]
    for name in ("restore_instructions", "add_instructions"):
        assert getattr(machine, name) == calibration[name]
    per_us = calibration["warp_instructions_per_cycle"] * calibration["clock_ghz"] * 1e3
    assert machine.instructions_per_us == pytest.approx(per_us)


# --- the page ------------------------------------------------------------------------------------

COMMAND = "python benchmarks/internode_model.py --markdown docs/measurements/internode_model.md"


@pytest.fixture(scope="module")
def page():
    return (ROOT / "docs" / "measurements" / "internode_model.md").read_text()


def _table(page):
    rows = [tuple(line.strip("| ").split(" | ")) for line in page.splitlines() if "| " in line]
    return rows[rows.index(model.HEADER) + 2 :]


def test_the_page_has_the_first_rows_and_all_lines(page):
    problems = model.problems([2, 4, 8])
    assert _table(page)[: len(problems)] == [model.row(problem) for problem in problems], COMMAND
    assert model.lines() in page, COMMAND


def test_the_page_has_the_bytes_and_rings_of_all_rows(page, monkeypatch):
    # Large ones take minutes: what is predicted for them is not compared.
    nothing = rail_model.Result(
        us=math.inf, wire_gb_s=0.0, rows=bytearray(), started=(), credited=()
    )
    monkeypatch.setattr(model, "simulate", lambda *_: nothing)
    rows = [model.row(problem) for problem in model.problems(model.DOMAINS)]
    predicted = [i for i, cell in enumerate(rows[0]) if cell == "inf (0.0)"]
    assert len(predicted) == 4

    def known(row):
        return [cell for i, cell in enumerate(row) if i not in predicted]

    assert [known(row) for row in _table(page)] == [known(row) for row in rows], COMMAND
    for row in _table(page):
        assert all(re.fullmatch(r"\d+ \(\d+\.\d\)", row[i]) for i in predicted)


def test_the_program_prints_some_rows(monkeypatch, capsys):
    monkeypatch.setattr(model, "lines", lambda: "lines")
    monkeypatch.setattr("sys.argv", ["internode_model.py", "--nodes", "2"])
    model.main()
    printed = capsys.readouterr().out
    assert printed.startswith("MODEL: predicted, no network has been measured.")
    assert " | ".join(model.row(rail_model.Problem(num_domains=2))) in printed
    with pytest.raises(SystemExit):
        model.parse_args(["--nodes", "2", "--markdown", "page.md"])
