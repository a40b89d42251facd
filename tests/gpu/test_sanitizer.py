# SPDX-License-Identifier: Apache-2.0
"""compute-sanitizer finds nothing in the kernels, on small random problems.

All ranks are in one process there, each with a stream of its own.
"""

import os
import re
import subprocess

import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(540)]

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")


def _run(tool: str, first: int, last: int, *kernels: str) -> str:
    """What the tool prints about the scenarios of some seeds, on a GPU."""
    program = os.environ["JAX_EP_VIRTUAL_RANKS"]
    sanitizer = "compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--print-limit", "5"
    done = subprocess.run(
        [*sanitizer, program, "scenarios", str(first), str(last), "1", *kernels],
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    text = done.stdout + done.stderr
    assert done.returncode == 0, text[-6000:]
    return text


@pytest.mark.parametrize(
    "kernels",
    [(), ("low-latency",), ("internode",)],
    ids=["high_throughput", "low_latency", "internode"],
)
@pytest.mark.parametrize("tool", TOOLS)
def test_a_tool_finds_nothing(tool, kernels):
    text = _run(tool, 1, 12, *kernels)
    print(text[-500:])
    assert re.search(r"scenarios 1 to 12 passed", text)
    assert re.search(r"0 errors|0 hazards", text)
