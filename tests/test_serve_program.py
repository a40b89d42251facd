# SPDX-License-Identifier: Apache-2.0
"""The example server as a program: what it is told, what it says, how it ends."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import httpx
import pytest

from jax_ep import EpHealth
from moe_lm.build import build
from moe_lm.checkpoints import Checkpoints
from moe_lm.options import parse as parse_model
from moe_lm.training import initial_state, make_optimizer
from moe_serve.options import parse
from moe_serve.run import run
from moe_serve.served import problem_of

pytestmark = pytest.mark.example

PROGRAM = pathlib.Path(__file__).parents[1] / "examples" / "serve_moe_lm.py"
TINY = [
    *("--layers", "1", "--hidden", "32", "--heads", "2", "--ffn", "32", "--batch", "2"),
    *("--widths", "32", "--slots", "4", "--max-len", "80"),
]
LOAD = ["--requests", "6", "--rate", "0", "--prompt", "2:40", "--output", "5:30"]


def test_the_benchmark_serves_loads_and_reports(tmp_path, capsys):
    arguments = [
        *("bench", *TINY, *LOAD, "--mesh", "1x1", "--out", str(tmp_path)),
        *("--rebalance-every", "5", "--slo", "e2e:60000"),
    ]
    serve, options = parse(arguments)
    setup = build(options)
    with setup.group, Checkpoints(tmp_path / "checkpoints", options.identity) as checkpoints:
        checkpoints.save(7, initial_state(options, setup, make_optimizer(options)))
    assert run(serve, options) == 0
    out = capsys.readouterr().out
    assert "a model of 7 steps, mesh data 1 x expert 1 of cpu, backend ffi" in out
    assert "time to first byte (TTFT)" in out
    numbers = json.loads((tmp_path / "serving.json").read_text())
    assert (numbers["requests"], numbers["failed"], numbers["slo_share"]) == (6, 0, 1)
    assert numbers["server"]["steps"] >= 30
    for name in ("serving_latency.png", "serving_load.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    # A checkpoint of another model is said to be one.
    assert run(*parse([*arguments, "--ffn", "64"])) == 2
    assert "--ffn 32 (now 64)" in capsys.readouterr().err


def _environment() -> dict[str, str]:
    """Without the devices of the tests: the program asks for its own."""
    flags = [f for f in os.environ["XLA_FLAGS"].split() if "device_count" not in f]
    path = os.pathsep.join(p for p in sys.path if p)
    return {**os.environ, "PYTHONPATH": path, "XLA_FLAGS": " ".join(flags)}


def test_the_program_trains_serves_and_ends_when_it_is_told_to(tmp_path, capsys):
    common, log = [*TINY, "--mesh", "1x2"], tmp_path / "log"
    command = [
        *(sys.executable, str(PROGRAM), *common, "--out", str(tmp_path), "--port", "0"),
        *("--fail-rank", "1@0s", "--train-steps", "1"),
    ]
    with log.open("w") as file:
        server = subprocess.Popen(command, env=_environment(), stdout=file, stderr=file)
    try:
        deadline = time.monotonic() + 200
        while "\nrank 1 " not in log.read_text():
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        text = log.read_text()
        assert "has no checkpoint: training for 1 steps" in text
        assert "a model of 1 steps, mesh data 1 x expert 2 of cpu" in text
        assert 'rank 1 leaves: 200 {"alive":[true,false]}' in text
        (url,) = re.findall(r"^listens on (http://127\.0\.0\.1:\d+)/v1/completions$", text, re.M)
        out = tmp_path / "bench"
        assert run(*parse(["bench", *common, *LOAD, "--url", url, "--out", str(out)])) == 0
        assert re.search(r"^requests that were served +6$", capsys.readouterr().out, re.M)
        assert (out / "serving_latency.png").exists()
        metrics = httpx.get(f"{url}/metrics").text
        assert "\nmoe_serve_alive_ranks 1\n" in metrics
        assert "\nmoe_serve_requests_total 6\n" in metrics
        server.send_signal(signal.SIGTERM)
        assert server.wait(timeout=60) == 0, log.read_text()
        assert "Traceback" not in log.read_text()
    finally:
        server.kill()
        server.wait()


def test_a_group_is_ill_when_a_rank_is_late_and_not_when_one_waits():
    waiting = {"waiting_for": (2, 3), "operation": "combine", "root": "rank 2 is at home"}
    assert problem_of(EpHealth(), 10) is None
    assert problem_of(EpHealth(**waiting, seconds=9), 10) is None
    late = problem_of(EpHealth(**waiting, seconds=12.3), 10)
    assert late == "late for 12 s: ranks 2, 3; rank 2 is at home"
    assert problem_of(EpHealth(aborted="by rank 1"), 10) == "a rank has given up: by rank 1"


# --- options -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--slots", "0"], "--slots: 0; allowed: at least 1"),
        (["--widths", "32,16"], "'32,16'; allowed: ascending"),
        (["--widths", "32,512"], "512 and 4; allowed: up to 256 bytes on each device"),
        (["--fail-rank", "4@1s"], "--fail-rank: 4; allowed: ranks 0 to 3"),
        (["--fail-rank", "3"], "'3'; allowed: RANK@SECONDS"),
        (["--flavor", "linen"], "--flavor: linen; allowed: nnx"),
        (["--dense"], "--dense: not allowed"),
        (["--cluster"], "--cluster: not allowed, the server is on one machine"),
        (["--processes", "2", "--spare-slots", "1"], "--spare-slots: 1; allowed: 0 with --proc"),
        (["--kill-rank", "1@5s"], "--kill-rank: allowed with --processes, and without --url"),
        (["--processes", "2", "--kill-rank", "4@5s"], "--kill-rank: 4; allowed: ranks 0 to 3"),
        (["bench", "--prompt", "9:3"], "'9:3'; allowed: LOW:HIGH"),
        (["bench", "--prompt", "1:400"], "400 and 128; allowed: --max-len together"),
        (["bench", "--slo", "latency:3"], "'latency:3'; allowed: for instance ttft:200"),
        (["--topk", "9"], "--topk: 9"),
    ],
)
def test_a_bad_option_is_named(options, message, capsys):
    with pytest.raises(SystemExit):
        parse(options)
    assert message in capsys.readouterr().err


def test_options_of_the_server_and_of_the_model_are_told_apart():
    serve, options = parse(["bench", "--layers", "3", "--rate", "5", "--slo", "ttft:9,itl:2.5"])
    assert (serve.bench, serve.rate, options.layers) == (True, 5.0, 3)
    assert serve.slo == {"ttft": 9, "itl": 2.5}
    assert parse([])[1] == parse_model([])
