# SPDX-License-Identifier: Apache-2.0
"""What tests of a server over several processes share."""

import os
import pathlib
import re
import subprocess
import sys
import time

from moe_serve.plans import Request
from moe_serve.runner import Runner
from moe_serve.scheduler import Scheduler

# Options: two ranks.
TINY = [
    *("--layers", "1", "--hidden", "32", "--heads", "2", "--ffn", "32", "--batch", "2"),
    *("--widths", "32", "--slots", "2", "--max-len", "80", "--mesh", "1x2"),
]


def scheduler() -> Scheduler:
    """Of a server with these options."""
    return Scheduler(
        num_devices=2, slots_per_device=2, max_len=80, widths=[32], max_prefill_tokens=64
    )


def write(model: Runner, prompts: list[bytes], num_bytes: int) -> list[bytes]:
    """Greedy texts, as the engine has a model write them."""
    order, texts = scheduler(), [bytearray() for _ in prompts]
    for number, prompt in enumerate(prompts):
        order.add(Request(id=number, prompt=prompt, max_tokens=num_bytes))
    while not order.is_idle:
        plan = order.plan()
        for event in order.commit(plan.rows, [w.token for w in model.run(plan)]):
            texts[event.request_id].append(event.token)
    return [bytes(text) for text in texts]


def assert_gone(numbers: list[int]) -> None:
    """They end in a moment. Who is not our child may stay a zombie for its parent."""
    deadline = time.monotonic() + 10
    while alive := [number for number in numbers if is_alive(number)]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.02)


def is_alive(number: int) -> bool:
    """Whether there is such a process, and it has not ended."""
    try:
        status = pathlib.Path(f"/proc/{number}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


class Program:
    """The server as a process.

    Attributes:
        log: what it prints.
        process: of the supervisor.
    """

    def __init__(self, command: list[str], log: pathlib.Path, **variables: str) -> None:
        """Starts a command, with more variables, and without the devices of the tests."""
        flags = [f for f in os.environ["XLA_FLAGS"].split() if "device_count" not in f]
        path = os.pathsep.join(p for p in sys.path if p)
        env = {**os.environ, "PYTHONPATH": path, "XLA_FLAGS": " ".join(flags), **variables}
        self.log = log
        with log.open("w") as file:
            self.process = subprocess.Popen(command, env=env, stdout=file, stderr=file)

    def until(self, text: str) -> str:
        """Waits for a text in the log; gives the log."""
        deadline = time.monotonic() + 200
        while text not in (log := self.log.read_text()):
            assert self.process.poll() is None, log
            assert time.monotonic() < deadline, log
            time.sleep(0.05)
        return log

    @property
    def url(self) -> str:
        """Once it listens."""
        return re.findall(r"^listens on (http://.*)/v1/completions$", self.log.read_text(), re.M)[0]

    def workers(self) -> list[int]:
        """Their numbers."""
        children = pathlib.Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(number) for number in children.read_text().split()]

    def ends(self, status: int) -> str:
        """Waits for its end; gives the log."""
        assert self.process.wait(timeout=30) == status, self.log.read_text()
        return self.log.read_text()
