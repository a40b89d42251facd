# SPDX-License-Identifier: Apache-2.0
"""The kernels between domains on the hardware: random scenarios, over mapped memory.

All ranks are in one process, each with a stream of its own. With two GPUs neighboring ranks share
one: what crosses goes over NVLink, and what is pulled where a domain has ranks on both (of three).
"""

import os
import subprocess

import pytest

from ep_launch.placement import Placement, count_gpus

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(240)]


def _num_gpus() -> int:
    return 1 if Placement.chosen() is Placement.SHARED else min(count_gpus(), 2)


@pytest.mark.parametrize(("first", "last"), [(1, 100), (101, 200), (201, 300)])
def test_scenarios_agree_with_the_cpu_backend(first, last):
    done = subprocess.run(
        [
            os.environ["JAX_EP_VIRTUAL_RANKS"],
            "scenarios",
            str(first),
            str(last),
            str(_num_gpus()),
            "internode",
        ],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert f"scenarios {first} to {last} passed" in done.stdout
