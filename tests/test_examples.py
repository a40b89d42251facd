# SPDX-License-Identifier: Apache-2.0
"""The programs of examples/ run, and the language model learns what it says it learns."""

import importlib
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from ep_launch import slurm

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"
SMALL = [
    *("--layers", "1", "--hidden", "64", "--heads", "2", "--ffn", "64", "--seq-len", "64"),
    *("--eval-every", "0", "--sample-bytes", "40"),
]
TINY = [*SMALL, "--batch", "8"]

pytestmark = pytest.mark.example


def _environment(**variables: str) -> dict[str, str]:
    """Without the test suite's own devices: the programs ask for what they need."""
    path = os.pathsep.join(p for p in sys.path if p)
    kept = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"}
    flags = [f for f in kept.pop("XLA_FLAGS").split() if "device_count" not in f]
    own = {"PYTHONPATH": path, "MPLBACKEND": "Agg", "XLA_FLAGS": " ".join(flags)}
    return {**kept, **own, **variables}


def _start(*args: object, out: pathlib.Path | None = None, **variables: str) -> subprocess.Popen:
    command = [sys.executable, str(EXAMPLES / "train_moe_lm.py"), *map(str, args)]
    if out is not None:
        command += ["--out", str(out)]
    return subprocess.Popen(
        command,
        env=_environment(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _run(
    *args: object, out: pathlib.Path | None = None, status: int = 0, **variables: str
) -> tuple[str, str]:
    process = _start(*args, out=out, **variables)
    stdout, stderr = process.communicate(timeout=250)
    assert process.returncode == status, f"{stdout[-2000:]}\n{stderr[-3000:]}"
    return stdout, stderr


def _metrics(out: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def _losses(out: pathlib.Path) -> list[float]:
    return [m["loss"] for m in _metrics(out) if "loss" in m]


def _number_after(text: str, stdout: str) -> float:
    line = next(line for line in stdout.splitlines() if line.startswith(text))
    return float(line[len(text) :].split()[0])


def test_held_out_loss_ends_well_below_the_unigram_entropy(tmp_path):
    args = ["--batch", 16, "--steps", 200, "--lr", 0.008, "--warmup", 20]
    stdout, _ = _run(*SMALL, *args, out=tmp_path)
    held_out = _number_after("held-out loss", stdout)
    unigram = _number_after("unigram entropy", stdout)
    assert held_out <= unigram - 0.7
    assert "backend ffi" in stdout
    assert "A sample that the model wrote:" in stdout
    for name in ("loss.png", "expert_load.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    steps = [m for m in _metrics(tmp_path) if "loss" in m]
    assert [m["step"] for m in steps] == list(range(1, 201))
    for name in ("tokens_per_s", "drop_rate", "imbalance", "expert_load"):
        assert all(name in m for m in steps)


def test_the_first_20_losses_are_those_of_the_dense_model_on_one_device(tmp_path):
    stdout, _ = _run(*TINY, "--steps", 20, "--flavor", "nnx", out=tmp_path / "ep")
    assert "mesh data 2 x expert 4" in stdout
    stdout, _ = _run(*TINY, "--steps", 20, "--dense", out=tmp_path / "dense")
    assert "1 device, dense" in stdout
    ep, dense = _losses(tmp_path / "ep"), _losses(tmp_path / "dense")
    assert len(ep) == len(dense) == 20
    assert max(abs(a - b) for a, b in zip(ep, dense, strict=True)) <= 1e-3


def test_a_killed_run_goes_on_with_the_same_losses(tmp_path):
    args = [*TINY, "--steps", 40, "--checkpoint-every", 10]
    _run(*args, out=tmp_path / "whole")

    killed = _start(*args, out=tmp_path / "killed")
    deadline = time.monotonic() + 200
    checkpoint = tmp_path / "killed" / "checkpoints" / "20"
    while not checkpoint.exists() and time.monotonic() < deadline:
        assert killed.poll() is None, killed.communicate()
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL

    _run(*args, "--resume", out=tmp_path / "killed")
    whole, resumed = _losses(tmp_path / "whole"), _losses(tmp_path / "killed")
    assert len(resumed) == 40
    assert resumed == whole


@pytest.mark.parametrize(
    "options",
    [
        ["--backend", "xla", "--flavor", "linen"],
        ["--fp8-wire", "--capacity-factor", "1.0", "--mesh", "1x8"],
    ],
    ids=["xla_linen", "fp8_capacity_one_axis"],
)
def test_other_options_train_as_well(options, tmp_path):
    stdout, _ = _run(*TINY, "--steps", 12, *options, out=tmp_path)
    losses = _losses(tmp_path)
    assert losses[-1] < losses[0] - 0.3
    if "--backend" in options:
        assert "backend xla" in stdout
    if "--capacity-factor" in options:
        # One expert on each device, and routing is never quite even.
        assert max(m["drop_rate"] for m in _metrics(tmp_path) if "loss" in m) > 0


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--mesh", "2by4"], ["--mesh", "2by4", "DATAxEXPERT"]),
        (["--mesh", "1x3"], ["3", "8"]),
        (["--experts", "0"], ["--experts", "0", "allowed"]),
        (["--capacity-factor", "-1"], ["--capacity-factor", "-1", "above 0"]),
        (["--backend", "cuda"], ["--backend", "cuda", "ffi"]),
        (["--platform", "tpu"], ["--platform", "tpu", "cuda"]),
        (["--flavor", "haiku"], ["--flavor", "haiku", "linen"]),
        (["--topk", "9"], ["--topk", "9", "8"]),
        (["--batch", "9"], ["--batch", "9"]),
        (["--processes", "3"], ["--processes", "3", "divisors of 8"]),
        (["--processes", "2", "--dense"], ["--processes", "2", "--dense"]),
        (["--processes", "2", "--cluster"], ["--processes", "2", "--cluster"]),
    ],
)
def test_a_bad_option_gets_a_clear_error(options, parts):
    _, stderr = _run(*options, status=2)
    message = stderr.splitlines()[-1]
    assert "error: " in message, stderr
    for part in parts:
        assert part in message, message


@pytest.mark.multiprocess
def test_processes_train_as_one_does(tmp_path):
    args = [*TINY, "--mesh", "2x2", "--backend", "xla"]
    _run(*args, "--steps", 4, out=tmp_path / "one")
    stdout, _ = _run(*args, "--steps", 4, "--processes", 2, out=tmp_path / "two")
    np.testing.assert_allclose(_losses(tmp_path / "two"), _losses(tmp_path / "one"), rtol=1e-4)
    assert stdout.count("step 4/4 | loss") == 1  # the first process's alone
    assert "A sample that the model wrote" in stdout
    again, _ = _run(*args, "--steps", 4, "--processes", 2, "--resume", out=tmp_path / "two")
    assert _number_after("held-out loss", again) == _number_after("held-out loss", stdout)


@pytest.mark.multiprocess
def test_processes_of_a_cluster_train_as_one_does(tmp_path):
    args = [*TINY, "--steps", "4", "--mesh", "2x2", "--backend", "xla"]
    _run(*args, out=tmp_path / "one")
    program = [sys.executable, str(EXAMPLES / "train_moe_lm.py")]
    own = _environment(JAX_NUM_CPU_DEVICES="2")
    logs = slurm.run(
        [*program, *args, "--cluster", "--out", str(tmp_path / "two")], 2, lambda _: own,
        folder=tmp_path, deadline=200,
    )  # fmt: skip
    np.testing.assert_allclose(_losses(tmp_path / "two"), _losses(tmp_path / "one"), rtol=1e-4)
    assert "mesh data 2 x expert 2 of cpu" in logs[0]
    assert "step 4/4 | loss" not in logs[1]


def _run_script(script, tmp_path, **variables):
    """What a SLURM script gives `srun`."""
    fake = tmp_path / "srun"
    fake.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    fake.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, **variables}
    command = ["bash", script]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


@pytest.mark.parametrize(("mesh", "shape"), [(None, (1, 16)), ("2x8", (2, 8))])
def test_the_slurm_script_starts_a_task_for_each_device(mesh, shape, tmp_path, monkeypatch):
    script = EXAMPLES / "slurm" / "train_moe_lm.sbatch"
    python, program, *args = _run_script(script, tmp_path, **({"MESH": mesh} if mesh else {}))
    assert (python, program) == ("python", "examples/train_moe_lm.py")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    options = importlib.import_module("moe_lm.options").parse(args)
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", script.read_text(), re.MULTILINE))
    assert options.cluster
    assert options.mesh == shape
    assert int(asked["nodes"]) * int(asked["ntasks-per-node"]) == options.num_devices
    # Each process must see all GPUs of its machine.
    assert asked["gpus-per-node"] == asked["ntasks-per-node"]


@pytest.mark.multiprocess
def test_a_process_for_each_device_finds_the_others_by_slurms_variables(tmp_path):
    program = [sys.executable, str(EXAMPLES / "one_process_per_gpu.py")]
    own = _environment(JAX_NUM_CPU_DEVICES="1", JAX_PLATFORMS="cpu")
    logs = slurm.run(program, 2, lambda _: own, folder=tmp_path, deadline=100)
    assert "2 ranks in 2 processes, backend xla\n0 wrong elements" in logs[0]
    assert "ranks in" not in logs[1]


@pytest.mark.parametrize("program", [None, "train.py --batch 64"])
def test_the_slurm_script_of_one_host_starts_a_task_for_each_gpu(program, tmp_path):
    script = EXAMPLES / "slurm" / "one_process_per_gpu.sbatch"
    args = _run_script(script, tmp_path, **({"PROGRAM": program} if program else {}))
    assert args[:2] == ["--kill-on-bad-exit=1", "python"]
    assert args[2:] == (program or "examples/one_process_per_gpu.py").split()
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", script.read_text(), re.MULTILINE))
    assert asked["gpus-per-node"] == asked["ntasks-per-node"]


@pytest.mark.multiprocess
def test_a_process_that_fails_ends_the_others(tmp_path):
    start = time.monotonic()
    _, stderr = _run(
        *TINY, "--mesh", "1x2", "--backend", "ffi", "--processes", 2, out=tmp_path, status=2
    )
    assert "on CPU it serves the devices of one process, and this mesh spans several" in stderr
    assert time.monotonic() - start < 100


def test_the_option_decides_on_the_platform_and_not_the_environment(tmp_path):
    args = [*TINY, "--steps", 2, "--mesh", "1x2", "--platform", "cpu"]
    stdout, _ = _run(*args, out=tmp_path, JAX_PLATFORMS="cuda")
    assert "mesh data 1 x expert 2 of cpu, backend ffi" in stdout
    assert len(_losses(tmp_path)) == 2


def test_a_platform_without_devices_gets_a_clear_error():
    _, stderr = _run("--platform", "cuda", status=2, CUDA_VISIBLE_DEVICES="", JAX_PLATFORMS="cpu")
    assert "train_moe_lm.py: error: --platform cuda: JAX finds no devices" in stderr


@pytest.mark.parametrize(
    "name", ["tutorial_dispatch_combine", "fp8_grouped_matmul", "port_mixtral"]
)
def test_a_tour_runs_and_checks_itself(name):
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py")],
        env=_environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip()


# --- writing -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("trained")
    _run(*TINY, "--steps", 30, out=out)
    return out


def _written(out: pathlib.Path, *args: object, status: int = 0) -> tuple[str, str, str]:
    """The text that generate.py writes, its report, and its errors."""
    command = [sys.executable, str(EXAMPLES / "generate.py"), *TINY, "--steps", "30"]
    done = subprocess.run(
        [*command, "--out", str(out), *map(str, args)],
        env=_environment(),
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == status, f"{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    text, _, report = done.stdout.rpartition(f"{'-' * 72}\n")
    return text, report, done.stderr


PROMPT = ["--prompt", "import os\ndef main(argv):\n", "--num-bytes", 90]


def test_text_is_that_of_the_dense_model_and_of_chunks(trained):
    """Longer than the model's window of 64 bytes; of what is drawn, many bytes could differ."""
    for drawn in ([], ["--temperature", 1.0]):
        text, report, _ = _written(trained, *PROMPT, *drawn)
        assert text.count("import os") == 1
        assert len(text) >= 100
        assert _number_after("time to first byte", report) > 0
        assert "between bytes" in report
        assert _written(trained, *PROMPT, *drawn, "--prefill-chunk", 7)[0] == text
        assert _written(trained, *PROMPT, *drawn, "--dense")[0] == text


def test_a_batch_of_equal_prompts_gets_equal_text(trained):
    text, _, _ = _written(trained, *PROMPT)
    assert _written(trained, *PROMPT, "--copies", 3, "--flavor", "nnx")[0] == 3 * text


def test_text_is_drawn_from_its_seed(trained):
    prompt = ["--num-bytes", 30, "--temperature", 1.0, "--sample-seed"]
    one, again, other = (_written(trained, *prompt, seed)[0] for seed in (1, 1, 2))
    assert one == again != other


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num-bytes", "0"], "--num-bytes: 0; allowed: at least 1"),
        (["--prompt", ""], "--prompt: ''; allowed: at least one byte"),
        (["--temperature", "-1"], "--temperature: -1.0; allowed: at least 0"),
        (["--prompt", "x" * 600], "75 bytes on each device at once, over all copies; allowed: up"),
        (["--layers", "2"], "--layers 1 (now 2)"),
    ],
)
def test_what_cannot_be_written_is_an_error(options, message, trained):
    assert message in _written(trained, *options, status=2)[2]


def test_a_model_that_was_not_trained_writes_nothing(tmp_path):
    assert "has no checkpoint" in _written(tmp_path / "none", status=2)[2]
    assert not (tmp_path / "none").exists()
