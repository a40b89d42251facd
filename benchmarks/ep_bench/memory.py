# SPDX-License-Identifier: Apache-2.0
"""Peak memory of a call: what the kernel saw, and what XLA planned.

As a program, it prints that of one variant, as a line of JSON, e.g. `python -m ep_bench.memory ours
256x512x32x4`. The benchmark runs it so in processes of their own.
"""

import argparse
import ctypes
import functools
import gc
import json
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax

from ep_bench.cases import DTYPES, NUM_RANKS, Case
from ep_bench.environment import use_host_devices
from ep_bench.variants import DIRECTIONS, VARIANTS, ep_config, make_mesh, open_variant, put

_NUM_CALLS = 3
_RESET_PEAK = "5"  # see clear_refs in proc(5)
# What is freed goes back to the kernel at once, so that the next use of it is seen; see mallopt(3).
_EXACT_MALLOC = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
}


def _status_bytes(field: str) -> int:
    status = pathlib.Path("/proc/self/status").read_text()
    return int(re.search(rf"^{field}:\s*(\d+) kB", status, re.MULTILINE)[1]) * 1024


def peak_rss_increase(call: Callable[[], Any]) -> int | None:
    """How far a few calls raise the peak of this process's resident memory, in bytes.

    Inputs, code and what the process holds anyway are there before, and do not count.

    Returns:
        None where the kernel does not tell (it takes Linux with a writable
        /proc/self/clear_refs, and glibc).
    """
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        pathlib.Path("/proc/self/clear_refs").write_text(_RESET_PEAK)
        before = _status_bytes("VmRSS")
        for _ in range(_NUM_CALLS):
            jax.block_until_ready(call())
        return max(_status_bytes("VmHWM") - before, 0)
    except (OSError, AttributeError, TypeError):
        return None


def probe(key: str, case: Case, dtypes: list[str], backend: str | None) -> list[dict[str, Any]]:
    """Measures one variant in this process; the caller made it for nothing else."""
    mesh = make_mesh()
    found = []
    for dtype in dtypes:
        args = put(case.inputs(dtype), mesh)
        with open_variant(key, case, ep_config(case, dtype), mesh, backend) as variant:
            for direction, with_gradient in DIRECTIONS.items():
                compiled = variant.compile(with_gradient).lower(*args).compile()
                planned = compiled.memory_analysis()
                planned_bytes = planned.temp_size_in_bytes + planned.output_size_in_bytes
                call = functools.partial(compiled, *args)
                jax.block_until_ready(call())
                found.append(
                    {
                        "dtype": dtype,
                        "direction": direction,
                        "peak_rss_bytes": peak_rss_increase(call),
                        "planned_bytes": NUM_RANKS * planned_bytes,
                    }
                )
    return found


def probe_in_subprocess(
    key: str, case: Case, dtypes: list[str], backend: str | None
) -> list[dict[str, Any]]:
    """`probe` in a process of its own.

    Raises:
        RuntimeError: it failed; the message has what it wrote.
    """
    command = [sys.executable, "-P", "-m", "ep_bench.memory", key, case.name]
    command += ["--dtypes", ",".join(dtypes)]
    command += ["--backend", backend] if backend else []
    path = os.pathsep.join(filter(None, sys.path))
    environment = {**os.environ, **_EXACT_MALLOC, "PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise RuntimeError(f"measuring the memory of {key} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("variant", choices=VARIANTS)
    parser.add_argument("case", type=Case.parse, help="TxHxExK")
    parser.add_argument("--dtypes", default=",".join(DTYPES), help="comma-separated")
    parser.add_argument("--backend", choices=("ffi", "xla"), help="of variant `ours`")
    args = parser.parse_args()
    use_host_devices()
    print(json.dumps(probe(args.variant, args.case, args.dtypes.split(","), args.backend)))


if __name__ == "__main__":
    main()
