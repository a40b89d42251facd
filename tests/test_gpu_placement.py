# SPDX-License-Identifier: Apache-2.0
"""The launcher of the GPU tests, on CPU devices: ranks to processes and devices, and reports.

With `ffi` in one process, whose kernels are the CPU's there; with `xla` in several.
"""

import functools
import pathlib
import re
import signal

import jax
import numpy as np
import pytest

from ep_launch import ranks
from ep_launch.placement import VARIABLE, Placement
from ep_launch.ranks import Case, failure_report, run_ranks, stacked
from ep_testing import halves, masking_checks, masking_ranks, program_files
from ep_testing.placed_programs import fail_on, stall_but_on, where
from ep_testing.problems import PROBLEMS, EpProblem
from ep_testing.programs import make_mesh
from ep_testing.rank_cases import case_of, check_cases, collective_cases
from ep_testing.rank_halves import in_halves
from ep_testing.rank_masks import masked_calls
from ep_testing.rank_models import COPIED, copies
from ep_testing.rank_programs import chosen, exchange, gradients, turns

pytestmark = pytest.mark.multiprocess

CPU = {"JAX_PLATFORMS": "cpu"}
gpu_tests = program_files.load(pathlib.Path(__file__).parent / "gpu" / "run.py")


@pytest.fixture
def run(tmp_path):
    return functools.partial(run_ranks, folder=tmp_path, environment=CPU)


@pytest.mark.parametrize("placement", [Placement.SHARED, Placement.OWN])
def test_a_rank_has_a_process_of_its_own(placement, run):
    cases = [Case("where", where)]
    runs = run(cases, num_ranks=2, placement=placement)
    assert failure_report(runs, cases) is None, failure_report(runs, cases)
    for rank, done in enumerate(runs):
        value = done.outcomes[0].value
        assert (done.rank, done.process, done.exit_code) == (rank, rank, 0)
        assert (value["rank"], value["process"], value["num_processes"]) == (10 * rank, rank, 2)
        assert value["num_local"] == 1
        assert value["mine"] == value["ids"][rank : rank + 1]


def test_one_process_has_all_ranks(run):
    cases = [Case("where", where)]
    runs = run(cases, num_ranks=3, placement=Placement.ONE_PROCESS)
    assert failure_report(runs, cases) is None, failure_report(runs, cases)
    assert [done.rank for done in runs] == [0, 1, 2]
    for done in runs:
        value = done.outcomes[0].value
        assert (done.process, done.exit_code, value["rank"]) == (0, 0, 10 * done.rank)
        assert (value["num_processes"], value["num_local"]) == (1, 3)
        assert value["mine"] == value["ids"]


def test_gpus_are_shared_or_not():
    assert Placement.SHARED.local_device_ids(3) == [0]
    assert Placement.OWN.local_device_ids(3) == [3]
    assert Placement.ONE_PROCESS.local_device_ids(0) is None
    shares = {p: float(p.environment(8)["XLA_PYTHON_CLIENT_MEM_FRACTION"]) for p in Placement}
    assert 8 * shares[Placement.SHARED] < 0.75
    assert shares[Placement.OWN] == shares[Placement.ONE_PROCESS] > 0.5


def test_one_process_runs_the_cases_of_the_gpu_tests(run):
    # Without tokens, JAX gives every device all of the empty arrays.
    names = ("masked_half", "fp8_by_rank", "no_tokens")
    problems = [PROBLEMS[name].replace(num_ranks=4, num_experts=8) for name in names]
    cases = [case_of(exchange, p) for p in problems]
    cases += [case_of(gradients, p) for p in problems[:2]]
    cases += [case_of(chosen, problems[0], how=how) for how in ("cond", "switch")]
    cases += [case_of(in_halves, halves.PROBLEM.replace(low_latency_tokens=2))]
    masks = np.array([[True] * 4, [False] * 4, [True, False, True, True]])
    cases += [case_of(masked_calls, problems[0], masks=masks)]
    check_cases(functools.partial(run, placement=Placement.ONE_PROCESS), cases, 4)


# Of fewer ranks and a shorter row than on GPUs.
MISSING = EpProblem(
    name="missing", num_ranks=3, num_tokens=4, num_topk=3, num_experts=12, hidden=64,
    low_latency_tokens=4,
)  # fmt: skip


def test_ranks_go_on_without_one_that_makes_no_calls(run):
    """What the tests on GPUs do when they kill it, and what they check."""
    victim, timeout = 1, 2.0
    lost = {"victim": victim, "timeout": timeout}
    told = {"victim": victim, "timeout": 60.0, "after": 0.5}
    cases = [
        case_of(masking_ranks.nobody, MISSING, on_timeout="mask", timeout=60.0),
        case_of(masking_ranks.nobody, MISSING, on_timeout="error", timeout=60.0),
        case_of(masking_ranks.killed, MISSING, **lost),
        case_of(masking_ranks.given_up, MISSING, **told),
        case_of(masking_ranks.late, MISSING, **lost),
    ]
    runs = run(cases, num_ranks=3, placement=Placement.ONE_PROCESS)
    assert failure_report(runs, cases) is None, failure_report(runs, cases)
    masking, failing, killed, given_up, late = (stacked(runs, i) for i in range(len(cases)))
    masking_checks.check_nobody(MISSING, masking, failing)
    masking_checks.check_killed(MISSING, killed, victim, timeout)
    masking_checks.check_given_up(MISSING, given_up, victim, 60.0, 0.5)
    masking_checks.check_late(MISSING, late, victim, timeout)
    killed["left"][1]["outs"][1][0][2, 3, 5] += 1
    with pytest.raises(AssertionError, match="weighted"):
        masking_checks.check_killed(MISSING, killed, victim, timeout)


def test_a_rank_is_lost_in_a_loop_of_steps(run):
    problem = MISSING.replace(num_ranks=2, num_experts=8)
    kwargs = {"victim": 1, "timeout": 2.0}
    case = case_of(masking_ranks.killed_in_kernels, problem, **kwargs, delay=0.1)
    runs = run([case], num_ranks=2, placement=Placement.ONE_PROCESS)
    assert failure_report(runs, [case]) is None, failure_report(runs, [case])
    value = stacked(runs, 0)
    check = functools.partial(masking_checks.check_killed_in_kernels, problem, value, 1, 2.0)
    assert check() == ("missing", "there", "there")
    received, (weighted, _), _ = value["found"][0]["outs"]
    row = int(np.argmax(received.handle.row_source[0] >= 0))
    for array, at in ((received.x, (0, row, 3)), (weighted, (0, 2, 3))):
        kept = array[at]
        array[at] = kept + 1
        with pytest.raises(AssertionError):
            check()
        array[at] = kept
    check()


@pytest.mark.parametrize("how", ["cond", "switch"])
def test_a_branch_that_all_ranks_choose_has_the_bits_of_the_branch_alone(how):
    problem = PROBLEMS["masked_half"]
    mesh = make_mesh((problem.num_ranks,), ("expert",))
    got, want = (jax.tree.map(np.asarray, chosen(mesh, problem, h)) for h in (how, "python"))
    jax.tree.map(np.testing.assert_array_equal, got, want)
    # All three branches were taken, or every turn would have had the same results.
    assert len({out.tobytes() for out, _ in want[:3]}) == 3


def test_a_wrong_row_in_one_process_is_noticed(run):
    problem = PROBLEMS["masked_half"]

    def spoiled(cases, **kwargs):
        runs = run(cases, placement=Placement.ONE_PROCESS, **kwargs)
        received = runs[2].outcomes[0].value[0]
        row = np.argmax(received.handle.row_source >= 0)
        received.x[row, 3] += 1
        return runs

    with pytest.raises(AssertionError, match="exchange"):
        check_cases(spoiled, [case_of(exchange, problem)], problem.num_ranks)


def test_turns_of_one_process_are_checked_where_they_ran(run):
    problem = EpProblem(name="turns", num_ranks=4, num_tokens=8, num_topk=4, num_experts=64)
    cases = [case_of(turns, problem, rounds=2, turns_each=5)]
    runs = run(cases, num_ranks=4, placement=Placement.ONE_PROCESS)
    assert failure_report(runs, cases) is None, failure_report(runs, cases)
    rounds = stacked(runs, 0)
    assert len(rounds) == 2
    for wrong, _ in rounds:
        np.testing.assert_array_equal(wrong, np.zeros(4))


@pytest.mark.parametrize(
    ("placement", "backend"), [(Placement.ONE_PROCESS, "ffi"), (Placement.OWN, "xla")]
)
def test_gradients_are_summed_beside_exchanges(placement, backend, run):
    cases = collective_cases(2, backend)[:1]
    check_cases(functools.partial(run, placement=placement), cases, 2)


def test_copies_of_experts_in_several_processes(run):
    case = case_of(copies, COPIED, backend="xla")
    check_cases(functools.partial(run, placement=Placement.OWN), [case], 2)


# --- reports of failures -----------------------------------------------------------------------


@pytest.mark.parametrize("placement", [Placement.OWN, Placement.ONE_PROCESS])
def test_an_error_is_reported_once_for_each_process(placement, run):
    cases = [Case("where", where), Case("failing", fail_on, {"rank": 1}), Case("never", where)]
    runs = run(cases, num_ranks=2, placement=placement)
    report = failure_report(runs, cases)
    assert report.count("ArithmeticError: rank 1 cannot go on") == 1
    assert "failed in failing" in report
    assert runs[1].exit_code == 1
    assert len(runs[1].outcomes) == 2


def test_a_killed_process_is_reported_with_its_signal(run):
    cases = [Case("killed", fail_on, {"rank": 1, "with_signal": signal.SIGKILL})]
    report = failure_report(run(cases, num_ranks=2, placement=Placement.OWN), cases)
    assert "rank 1 did not end killed (exit code -9)" in report


def test_a_rank_that_does_not_end_is_reported_with_its_stack(run, tmp_path, monkeypatch):
    monkeypatch.setattr(ranks, "_GRACE_S", 0.2)
    cases = [Case("stalling", stall_but_on, {"rank": 1, "folder": tmp_path})]
    report = failure_report(run(cases, num_ranks=2, placement=Placement.OWN), cases)
    failed, stalled = report.split("\n\nrank 0 did not end stalling (exit code -9)")
    assert failed.startswith("rank 1 failed in stalling")
    assert re.search(r'placed_programs\.py", line \d+ in stall\n', stalled), stalled
    assert "Current thread" in stalled or "most recent call first" in stalled


def test_values_are_told_as_soon_as_all_ranks_have_them(run):
    told = []
    cases = [Case("where", where), Case("failing", fail_on, {"rank": 1}), Case("never", where)]
    run(
        cases,
        num_ranks=2,
        placement=Placement.ONE_PROCESS,
        each=lambda index, values: told.append((index, [int(value["rank"]) for value in values])),
    )
    assert told == [(0, [0, 10])]


def test_too_few_devices_are_reported(tmp_path):
    cases = [Case("where", where)]
    runs = run_ranks(
        cases,
        num_ranks=3,
        folder=tmp_path,
        environment=CPU | {"JAX_NUM_CPU_DEVICES": "2"},
        placement=Placement.ONE_PROCESS,
    )
    report = failure_report(runs, cases)
    assert "3 ranks, placement one_process, need as many devices; JAX has 2" in report
    assert all(done.exit_code == 1 for done in runs)


# --- options -----------------------------------------------------------------------------------


def test_the_environment_chooses(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    assert Placement.chosen() is Placement.SHARED
    monkeypatch.setenv(VARIABLE, "one_process")
    assert Placement.chosen() is Placement.ONE_PROCESS
    monkeypatch.setenv(VARIABLE, "mine")
    with pytest.raises(ValueError, match=f"{VARIABLE} is 'mine'; allowed: shared, own"):
        Placement.chosen()


def test_every_placement_has_pieces_and_every_piece_a_placement():
    assert list(gpu_tests.PIECES_OF) == list(Placement)
    assert {piece for pieces in gpu_tests.PIECES_OF.values() for piece in pieces} == set(
        gpu_tests.PIECES
    )
    files = {path.name for path in gpu_tests.HERE.glob("test_*.py")}
    assert {file for file, *_ in gpu_tests.PIECES.values()} == files


def test_pieces_are_those_of_the_placement(capsys):
    assert gpu_tests.parse_args([]).pieces == gpu_tests.PIECES_OF["shared"]
    args = gpu_tests.parse_args(["--placement", "own", "soak"])
    assert (args.placement, args.pieces) == ("own", ["soak"])
    with pytest.raises(SystemExit):
        gpu_tests.parse_args(["--placement", "one_process", "failures"])
    assert "unknown: failures; with placement one_process there are" in capsys.readouterr().err
