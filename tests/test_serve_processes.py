# SPDX-License-Identifier: Apache-2.0
"""The example server over several processes: same texts, and nothing that is left behind."""

import concurrent.futures
import contextlib
import json
import os
import pathlib
import re
import signal
import sys
import threading
import time

import httpx
import numpy as np
import pytest

from ep_serving import stub_worker
from ep_serving.fake_server import text_at
from ep_serving.processes import TINY, Program, assert_gone, write
from moe_lm.build import build
from moe_lm.checkpoints import Checkpoints
from moe_lm.training import initial_state, make_optimizer
from moe_serve.options import parse
from moe_serve.served import served

pytestmark = pytest.mark.example

PROGRAM = pathlib.Path(__file__).parents[1] / "examples" / "serve_moe_lm.py"
# The same with other workers, and without any device for the supervisor.
WITH_STUBS = """
import sys
from moe_serve import workers
workers._PROGRAM = (sys.argv[1],)
from moe_serve.options import parse
from moe_serve.run import run
sys.exit(run(*parse(sys.argv[2:])))
"""


@pytest.fixture
def stubs(tmp_path):
    """Starts the program with stubs."""
    with contextlib.ExitStack() as stack:

        def start(words: str = "", *options: str) -> Program:
            command = [sys.executable, "-P", "-c", WITH_STUBS, stub_worker.__file__]
            command += [*TINY, "--processes", "2", "--port", "0", *options]
            variables = {"STUB_WORKER": words, "JAX_PLATFORMS": "no_such_platform"}
            program = Program(command, tmp_path / "log", **variables)
            stack.callback(program.process.wait)
            stack.callback(program.process.kill)
            return program

        yield start


def ask(url: str, prompt: list[int], num_bytes: int) -> httpx.Response:
    body = {"prompt": prompt, "max_tokens": num_bytes, "temperature": 0, "logprobs": 0}
    return httpx.post(f"{url}/v1/completions", json=body, timeout=60)


def until_one_runs(url: str) -> None:
    deadline = time.monotonic() + 20
    while "\nmoe_serve_running 1\n" not in httpx.get(f"{url}/metrics").text:
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_processes_drains(stubs, number):
    program = stubs("slow")
    log = program.until("listens on")
    assert "a stub of 2, 2 processes" in log
    children = program.workers()
    assert len(children) == 2
    assert [os.getpgid(child) for child in children] == children  # Ctrl-C is not for them
    texts: list[str] = []

    def read() -> None:
        texts.append(ask(program.url, [1] * 5, 30).json()["choices"][0]["text"])

    reading = threading.Thread(target=read)
    reading.start()
    until_one_runs(program.url)
    program.process.send_signal(number)
    for child in children if number == signal.SIGTERM else []:  # as service managers do
        os.kill(child, number)
    log = program.ends(0)
    reading.join()
    assert texts == [text_at(5, 30)]
    assert "Traceback" not in log
    assert_gone(children)


def test_workers_end_with_a_supervisor_that_is_killed(stubs):
    program = stubs("stuck")
    program.until("listens on")
    children = program.workers()
    url = program.url

    def read() -> None:
        with pytest.raises(httpx.HTTPError):
            ask(url, [1], 3)

    asking = threading.Thread(target=read)
    asking.start()
    until_one_runs(url)
    program.process.kill()
    assert_gone(children)
    asking.join()


def test_a_signal_ends_a_server_that_loads(stubs):
    program = stubs("loading")
    deadline = time.monotonic() + 60
    while len(children := program.workers()) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    program.process.terminate()
    assert "serve_moe_lm.py: interrupted" in program.ends(130)
    assert_gone(children)


def test_the_process_of_a_rank_is_killed_and_the_server_ends(stubs):
    program = stubs("", "--kill-rank", "1@0.2s")
    log = program.ends(1)
    (name,) = re.findall(r"^rank 1 is killed: (worker 1 \(pid \d+, device 1\))$", log, re.M)
    assert f"serve_moe_lm.py: error: {name} was ended by SIGKILL\n" in log
    assert "Traceback" not in log


def test_options_that_workers_refuse_end_the_server(stubs):
    log = stubs("refuse").ends(2)
    assert log.count("serve_moe_lm.py: error: argument --x: it is odd\n") == 1
    assert "Traceback" not in log


def test_workers_refuse_a_backend_that_cannot_serve(tmp_path):
    (tmp_path / "checkpoints").mkdir()  # it need not train
    out = ["--out", str(tmp_path), "--port", "0"]
    command = [sys.executable, str(PROGRAM), *TINY, *out, "--processes", "2", "--backend", "ffi"]
    program = Program(command, tmp_path / "log")
    try:
        program.process.wait(timeout=100)
        log = program.ends(2)
        (reason,) = re.findall(
            r"^serve_moe_lm.py: error: backend 'ffi' cannot serve (.*)", log, re.M
        )
        assert "on CPU it serves the devices of one process" in reason
        assert "Traceback" not in log
    finally:
        program.process.kill()
        program.process.wait()


def test_two_processes_write_what_one_writes_and_end_together(tmp_path):
    serve, options = parse([*TINY, "--out", str(tmp_path)])
    setup = build(options)
    with setup.group, Checkpoints(tmp_path / "checkpoints", options.identity) as checkpoints:
        checkpoints.save(3, initial_state(options, setup, make_optimizer(options)))
    command = [sys.executable, str(PROGRAM), *TINY, "--out", str(tmp_path), "--port", "0"]
    program = Program([*command, "--processes", "2"], tmp_path / "log")
    prompts = [np.random.default_rng(i).bytes(9 + 7 * i) for i in range(5)]
    try:
        with served(serve, options) as one:
            expected = write(one.engine._model, prompts, 20)
            log = program.until("listens on")
            assert "a model of 3 steps, mesh data 1 x expert 2 of cpu, backend xla" in log
            for child in program.workers():  # they leave that to the supervisor
                os.kill(child, signal.SIGTERM)
            assert written(program.url, prompts, 20) == expected
            # A rank leaves: its experts too, in all processes.
            one.engine._experts.set_alive([True, False])
            masked = write(one.engine._model, prompts[:1], 20)
        response = httpx.post(f"{program.url}/admin/ranks/1", json={"alive": False}, timeout=60)
        assert response.json() == {"alive": [True, False]}
        assert written(program.url, prompts[:1], 20) == masked != expected[:1]
        # A worker dies while a text is written.
        children = program.workers()
        body = {"prompt": [1, 2], "max_tokens": 70, "stream": True}
        with httpx.stream("POST", f"{program.url}/v1/completions", json=body) as stream:
            lines = stream.iter_lines()
            next(lines)
            killed = time.monotonic()
            os.kill(children[1], signal.SIGKILL)
            rest = [json.loads(x[6:]) for x in lines if x.startswith("data: {")]
        name = f"worker 1 (pid {children[1]}, device 1) was ended by SIGKILL"
        assert name in rest[-1]["error"]["message"]
        assert f"serve_moe_lm.py: error: {name}\n" in program.ends(1)
        assert time.monotonic() - killed < 15
        assert_gone(children)
    finally:
        program.process.kill()
        program.process.wait()


def written(url: str, prompts: list[bytes], num_bytes: int) -> list[bytes]:
    """What is written for prompts that come at once; `logprobs` shows bytes as they are."""
    with concurrent.futures.ThreadPoolExecutor() as pool:
        answers = list(pool.map(lambda prompt: ask(url, list(prompt), num_bytes), prompts))
    assert all(answer.status_code == 200 for answer in answers), answers[0].text
    tokens = [answer.json()["choices"][0]["logprobs"]["tokens"] for answer in answers]
    return [bytes(int(t[8:], 16) if len(t) > 1 else ord(t) for t in text) for text in tokens]
