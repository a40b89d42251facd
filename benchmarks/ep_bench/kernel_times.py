# SPDX-License-Identifier: Apache-2.0
"""Times of the kernels alone, which csrc/kernels/tests/virtual_ranks.cu takes from CUDA graphs."""

import pathlib
import re
import subprocess
from collections.abc import Sequence

from ep_bench.cases import FP8, HIDDEN, NUM_EXPERTS, NUM_TOPK, GpuCase

_LINE = re.compile(r"^\s+(plan|dispatch|plan_dispatch|combine)\s+([\d.]+) us$", re.MULTILINE)


def _arguments(case: GpuCase) -> list[str]:
    sizes = (case.num_ranks, case.num_tokens, HIDDEN, NUM_TOPK, NUM_EXPERTS, case.num_sms)
    words = ["fp8"] if case.wire_dtype == FP8 else []
    words += ["rank"] if case.layout == "rank" else []
    words += [] if case.tail else ["tail=0"]
    return ["time", *map(str, sizes), *words]


def parse(text: str) -> dict[str, float]:
    """Seconds of each kernel, by name, from what the program prints.

    Raises:
        ValueError: it is not all there.
    """
    found = {name: float(us) * 1e-6 for name, us in _LINE.findall(text)}
    if found.keys() != {"plan", "dispatch", "plan_dispatch", "combine"}:
        raise ValueError(f"no times of four kernels in: {text!r}")
    return found


def times(
    program: pathlib.Path, cases: Sequence[GpuCase], num_gpus: int = 1
) -> dict[GpuCase, dict[str, float]]:
    """Seconds of each kernel, for the cases that the program knows: uniform, without zeros.

    Args:
        program: virtual_ranks.
        cases: what to time.
        num_gpus: among which the ranks are shared out.
    """
    found = {}
    for case in cases:
        if case.routing != "uniform" or case.zero_fill:
            continue
        command = [str(program), *_arguments(case), f"gpus={num_gpus}"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
        found[case] = parse(done.stdout)
    return found
