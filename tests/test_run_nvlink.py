# SPDX-License-Identifier: Apache-2.0
"""The command that runs all that needs several GPUs: its pieces, and what it says of their ends."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest

from ep_launch.processes import free_port
from ep_testing import program_files

ROOT = pathlib.Path(__file__).resolve().parents[1]
PROGRAM = ROOT / "tools" / "run_nvlink.py"


tool = program_files.load(PROGRAM)
parse_tests = program_files.load(ROOT / "tests" / "gpu" / "run.py").parse_args
parse_predict = program_files.load(ROOT / "benchmarks" / "predict.py").parse_args
parse_benchmark = program_files.load(ROOT / "benchmarks" / "run.py").parse_args


@pytest.mark.parametrize("num_gpus", [2, 4, 5, 8])
def test_each_program_takes_its_piece(num_gpus, tmp_path, monkeypatch):
    """Which programs would refuse their options only shows once there are GPUs."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    from moe_lm.options import parse as example_args
    from moe_serve.options import parse as server_args

    ranks = {2: 2, 4: 4, 5: 4, 8: 8}[num_gpus]
    measured, tested = [], []
    for program, *args in tool.pieces(num_gpus, tmp_path).values():
        assert (ROOT / program).is_file()
        if program.endswith("train_moe_lm.py"):
            options = example_args(args)
            assert (options.platform, options.num_devices) == ("cuda", ranks)
        elif program.endswith("serve_moe_lm.py"):
            _, options = server_args(args)
            assert (options.platform, options.num_devices) == ("cuda", ranks)
            assert options.processes == ranks
        elif program.startswith("tests"):
            options = parse_tests(args)
            tested += [(options.placement, piece) for piece in options.pieces]
        elif program.endswith("predict.py"):
            options = parse_predict(args)
            assert options.ranks == ranks
            # Not where the report looks for what benchmarks/run.py has measured.
            assert options.json.parent != tmp_path
        elif "--copies" in args:
            options = parse_benchmark(args)
            assert options.ranks == ranks
            assert options.json.parent != tmp_path
        else:
            measured.append(dict(zip(args[::2], args[1::2], strict=True)))
    assert len(tested) == len(set(tested))
    needed = (
        *("problems", "halves", "masks", "models", "nodes", "nodes-by-counts"),
        *("nodes-low-latency", "graphs", "closed", "collectives", "soak"),
    )
    assert set(tested) == {("own", "failures"), ("own", "missing")} | {
        (placement, piece) for placement in ("own", "one_process") for piece in needed
    }
    assert {int(m["--ranks"]) for m in measured} == {ranks}
    sizes = [m["--tokens"] for m in measured if m["--placement"] == "own"]
    assert sorted(map(int, sizes)) == [1, 16, 128, 1024, 4096, 8192]
    assert len({m["--json"] for m in measured}) == len(measured)


def _benchmark_parses(args):
    code = f"import sys; sys.path.insert(0, 'benchmarks'); import run; run.parse_args({args})"
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_the_benchmark_takes_its_options(tmp_path):
    commands = [c for c in tool.pieces(8, tmp_path).values() if "benchmarks" in c[0]]
    for _, *args in commands[-2:]:
        done = _benchmark_parses(args)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("code", "result"),
    [
        ("print('fine')", "passed"),
        ("raise SystemExit(3)", "FAILED: exit status 3"),
        ("import time; time.sleep(60)", "FAILED: not done after 1 s"),
    ],
)
def test_the_end_of_a_piece_is_told(code, result, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(code)
    start = time.monotonic()
    limit_s = 1 if "sleep" in code else 60
    assert tool.run([str(program)], tmp_path / "log", limit_s) == result
    assert time.monotonic() - start < 30
    assert ("fine" in (tmp_path / "log").read_text()) == (result == "passed")


def _smi(folder: pathlib.Path, num_gpus: int) -> dict[str, str]:
    """Variables of a machine whose nvidia-smi lists so many GPUs."""
    fake = folder / "nvidia-smi"
    fake.write_text("#!/bin/sh\n" + "echo 'GPU 0: a GPU'\n" * num_gpus)
    fake.chmod(0o755)
    return {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}


def _start(folder: pathlib.Path, **programs: str) -> subprocess.Popen:
    """The command, with stand-ins for its pieces: name -> what it runs; "build" is one of them."""
    for name, code in ({"build": "print('built')"} | programs).items():
        (folder / f"{name}.py").write_text(code)
    every = {name: [os.path.relpath(folder / f"{name}.py", ROOT)] for name in programs}
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'tools')!r}); import run_nvlink as tool; "
        f"tool.BUILD = [{str(folder / 'build.py')!r}]; "
        f"tool.pieces = lambda *_: {every}; sys.exit(tool.main())"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, "--out", str(folder / "out")],
        env=_smi(folder, 8),
        stdout=subprocess.PIPE,
        text=True,
    )


SLEEPER = "import os, time; print(os.getpid()); time.sleep(100)"


def _lines_until(process: subprocess.Popen, found) -> list[str]:
    """What the command has printed up to a line for which `found` is true."""
    lines = []
    for line in process.stdout:
        lines.append(line.strip())
        if found(lines[-1]):
            return lines
    raise AssertionError(lines)


def test_a_piece_ends_with_the_command(tmp_path):
    """Otherwise it would keep the GPUs."""
    with _start(tmp_path, sleep=SLEEPER) as process:
        pid = int(_lines_until(process, str.isdigit)[-1])
        process.terminate()
        assert process.wait(20) == 143
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_what_a_piece_prints_appears_at_once_and_survives_the_end_of_all(tmp_path):
    with _start(tmp_path, first="print('done')", sleep=SLEEPER) as process:
        lines = _lines_until(process, str.isdigit)
        process.kill()
    pid = int(lines[-1])
    os.kill(pid, signal.SIGKILL)
    assert lines[1] == "built"
    assert "done" in lines
    assert (tmp_path / "out" / "first.log").read_text() == "done\n"
    assert (tmp_path / "out" / "sleep.log").read_text() == f"{pid}\n"
    summary = json.loads((tmp_path / "out" / tool.SUMMARY).read_text())
    results = {name: of_piece["result"] for name, of_piece in summary.items()}
    assert results == {"build": "passed", "first": "passed", "sleep": "did not end"}


def test_a_piece_knows_where_it_lies(tmp_path):
    """As under Python itself, to which a program may be named from where one stands."""
    with _start(tmp_path, first="print('it lies in', __file__)") as process:
        text = process.stdout.read()
    assert f"it lies in {tmp_path / 'first.py'}\n" in text


def test_without_the_modules_nothing_runs(tmp_path):
    with _start(tmp_path, build="raise SystemExit(7)", first="print('done')") as process:
        text = process.stdout.read()
    assert process.returncode == 1
    assert "done" not in text
    assert text.splitlines()[-1].endswith("FAILED: exit status 7")


def test_a_piece_that_fails_does_not_stop_the_others(tmp_path):
    with _start(tmp_path, first="raise SystemExit(3)", second="print('done')") as process:
        text = process.stdout.read()
    assert process.returncode == 1
    assert re.search(r"^first +\d+ s  FAILED: exit status 3\nsecond +\d+ s  passed$", text, re.M)


def test_pieces_build_what_they_need():
    program, *args = tool.BUILD
    assert program == "tests/gpu/run.py"
    assert parse_tests(args).build_only
    assert not parse_tests([]).build_only


def _wait_until_ended(pid: int) -> None:
    """A child of nobody may stay for a while, or in a container for ever, as a zombie."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            state = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]
        except FileNotFoundError:
            return
        if state in "ZX":
            return
        time.sleep(0.05)
    raise AssertionError(f"process {pid} runs on")


def test_the_system_gives_a_free_port_to_nobody_else():
    """A group that starts takes a second to use its port; connections come and go meanwhile."""
    given = pathlib.Path("/proc/sys/net/ipv4/ip_local_port_range")
    if not given.exists():
        pytest.skip("only Linux says which ports it gives; `make test` on Linux runs this")
    first, last = map(int, given.read_text().split())
    if first < 32_768:
        pytest.skip(f"here the system gives all from {first}; `make test` elsewhere runs this")
    assert not first <= free_port() <= last


@pytest.mark.multiprocess
def test_at_the_limit_each_rank_says_where_it_stands(tmp_path, monkeypatch, capsys):
    program, ranks_folder = tmp_path / "stalling.py", tmp_path / "ranks"
    ranks_folder.mkdir()
    program.write_text(
        "import pathlib, sys\n"
        f"sys.path.insert(0, {str(ROOT / 'testing')!r})\n"
        "from ep_launch.placement import Placement\n"
        "from ep_launch.ranks import Case, run_ranks\n"
        "from ep_testing.placed_programs import stall\n"
        f"folder = pathlib.Path({str(ranks_folder)!r})\n"
        "run_ranks([Case('stalling', stall, {'folder': folder})], num_ranks=2, folder=folder,\n"
        "          environment={'JAX_PLATFORMS': 'cpu'}, placement=Placement.OWN)\n"
    )

    def until_both_stall(process, shown, deadline):
        while len(list(ranks_folder.glob("stalled*"))) < 2:
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)

    monkeypatch.setattr(tool, "_wait", until_both_stall)
    assert tool.run([str(program)], tmp_path / "log", 200) == "FAILED: not done after 200 s"
    text = (tmp_path / "log").read_text()
    assert capsys.readouterr().out == text
    # The program's own stack comes first, then the ranks', each with what the library logged.
    own, said = text.split("=== not done after 200 s; where each process stands:\n")
    assert re.search(r'ranks\.py", line \d+ in run_ranks\n.*stalling\.py", line \d+', own, re.S), (
        own
    )
    zero, one = said[said.index("--- rank 0") :].split("--- rank 1")
    assert "--- stalling.py (process" in said
    for rank, of_rank in enumerate((zero, one)):
        assert "): stalling\n" in of_rank
        assert f"WARNING:jax_ep:process {rank} of 2 stalls" in of_rank
        assert re.search(r'placed_programs\.py", line \d+ in stall\n', of_rank), of_rank
        _wait_until_ended(int(re.search(r"\(process (\d+)\)", of_rank)[1]))


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_real_program_finds_its_modules_and_the_library(tmp_path):
    smoke = ["benchmarks/run.py", "--placement", "one_process", "--smoke"]
    assert tool.run(smoke, tmp_path / "log") == "passed"
    train = ["examples/train_moe_lm.py", "--help"]
    assert tool.run(train, tmp_path / "log").startswith("FAILED: it learned nothing")
    assert "--platform" in (tmp_path / "log").read_text()


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("below it by      0.7123 nats", "passed"),
        ("below it by      0.0123 nats", "FAILED: it learned 0.0123, not 0.5 nats"),
        ("below it by      -1.5 nats", "FAILED: it learned -1.5, not 0.5 nats"),
        ("", "FAILED: it learned nothing, not 0.5 nats"),
    ],
)
def test_training_has_to_learn(text, result, tmp_path):
    program = tmp_path / "train_moe_lm.py"
    program.write_text(f"print({text!r})")
    assert tool.run([str(program)], tmp_path / "log") == result


@pytest.mark.parametrize(
    ("num_gpus", "args", "message"),
    [
        (1, [], "this machine has 1 GPUs; 2, 4 or 8 are needed"),
        (8, ["everything"], "unknown: everything; there are own, bench-4096"),
    ],
)
def test_what_cannot_run_is_refused_at_once(num_gpus, args, message, tmp_path):
    done = subprocess.run(
        [sys.executable, str(PROGRAM), *args],
        env=_smi(tmp_path, num_gpus),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert message in done.stderr
