# SPDX-License-Identifier: Apache-2.0
"""The command that runs all that needs several GPUs: its pieces, and what it says of their ends."""

import importlib.util
import os
import pathlib
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
PROGRAM = ROOT / "tools" / "run_nvlink.py"


def _load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tool = _load(PROGRAM)


@pytest.mark.parametrize("num_gpus", [2, 4, 5, 8])
def test_each_program_takes_its_piece(num_gpus, tmp_path, monkeypatch):
    """Which programs would refuse their options only shows once there are GPUs."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    from gpu.run import parse_args as tests_args
    from moe_lm.options import parse as example_args

    ranks = {2: 2, 4: 4, 5: 4, 8: 8}[num_gpus]
    measured, tested = [], []
    for program, *args in tool.pieces(num_gpus, tmp_path).values():
        assert (ROOT / program).is_file()
        if program.endswith("train_moe_lm.py"):
            options = example_args(args)
            assert (options.platform, options.num_devices) == ("cuda", ranks)
        elif program.endswith("run.py"):
            options = tests_args(args)
            tested += [(options.placement, piece) for piece in options.pieces]
        else:
            measured.append(dict(zip(args[::2], args[1::2], strict=True)))
    assert len(tested) == len(set(tested))
    needed = ("problems", "graphs", "collectives", "soak")
    assert set(tested) == {("own", "failures")} | {
        (placement, piece) for placement in ("own", "one_process") for piece in needed
    }
    assert {int(m["--ranks"]) for m in measured} == {ranks}
    sizes = [m["--tokens"] for m in measured if m["--placement"] == "own"]
    assert sorted(map(int, sizes)) == [128, 1024, 4096, 8192]
    assert len({m["--json"] for m in measured}) == len(measured)


def _benchmark_parses(args):
    code = f"import sys; sys.path.insert(0, 'benchmarks'); import nvlink; nvlink.parse_args({args})"
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


def test_a_piece_ends_with_the_command(tmp_path):
    """Otherwise it would keep the GPUs."""
    sleeper = tmp_path / "sleeper.py"
    sleeper.write_text("import os, time; print(os.getpid()); time.sleep(100)")
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'tools')!r}); import run_nvlink as tool; "
        f"tool.pieces = lambda *_: {{'sleep': [{str(sleeper)!r}]}}; sys.exit(tool.main())"
    )
    log = tmp_path / "out" / "sleep.log"
    command = [sys.executable, "-c", code, "--out", str(tmp_path / "out"), "sleep"]
    process = subprocess.Popen(command, env=_smi(tmp_path, 8), stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    while not (log.exists() and log.read_text().strip()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.terminate()
    assert process.wait(20) == 143
    with pytest.raises(ProcessLookupError):
        os.kill(int(log.read_text()), 0)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_real_program_finds_its_modules_and_the_library(tmp_path):
    assert tool.run(["benchmarks/nvlink.py", "--smoke"], tmp_path / "log") == "passed"
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
