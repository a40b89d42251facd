# SPDX-License-Identifier: Apache-2.0
"""The devices that the programs need, and where and with what numbers were taken."""

import datetime
import os
import pathlib
import platform
import re
import shlex
import subprocess
import sys
from importlib import metadata
from typing import Any

import jax

from ep_bench.cases import NUM_RANKS

ROOT = pathlib.Path(__file__).resolve().parents[2]


def use_host_devices() -> None:
    """Makes JAX show as many CPU devices as there are ranks. Call it before any device is used."""
    jax.config.update("jax_platforms", "cpu")
    flags = [
        flag
        for flag in os.environ.get("XLA_FLAGS", "").split()
        if not flag.startswith("--xla_force_host_platform_device_count")
    ]
    flags.append(f"--xla_force_host_platform_device_count={NUM_RANKS}")
    os.environ["XLA_FLAGS"] = " ".join(flags)


def _cpu_model() -> str:
    try:
        info = pathlib.Path("/proc/cpuinfo").read_text()
    except OSError:
        info = ""
    found = re.search(r"^model name\s*:\s*(.+)$", info, re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()


def _git(*args: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *args], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _commit() -> str:
    commit = _git("rev-parse", "--short=12", "HEAD")
    if commit is None:
        return "unknown"
    # Tables are written into docs/, which does not change what is measured.
    changed = _git("status", "--porcelain", "--", ".", ":!docs")
    return f"{commit} with uncommitted changes" if changed else commit


def describe() -> dict[str, Any]:
    """Machine, versions, commit and command, for people and for the JSON."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "machine": f"{_cpu_model()}, {len(os.sched_getaffinity(0))} cores, "
        f"{memory / 2**30:.0f} GiB, {platform.system()} {platform.release()}",
        "versions": {
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in ("jax", "jaxlib", "numpy")},
        },
        "commit": _commit(),
        "command": shlex.join(["python", *_shown_arguments()]),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "load_before": round(os.getloadavg()[0], 2),
    }


def _gpu(field: str) -> str:
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def describe_gpu(commit: str | None) -> dict[str, Any]:
    """What `describe` says, and the GPU, its driver and XLA's flags.

    Args:
        commit: to be shown instead of what git says.
    """
    where = describe()
    return {
        **where,
        "commit": commit or where["commit"],
        "gpu": _gpu("name"),
        "driver": _gpu("driver_version"),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def _shown_arguments() -> list[str]:
    program = pathlib.Path(sys.argv[0]).resolve()
    if program.is_relative_to(ROOT):
        program = program.relative_to(ROOT)
    return [str(program), *sys.argv[1:]]
