# SPDX-License-Identifier: Apache-2.0
"""Imports and runs programs of the repository that are no part of a package."""

import importlib.util
import pathlib
import subprocess
import sys
from types import ModuleType

BENCHMARKS = pathlib.Path(__file__).resolve().parents[2] / "benchmarks" / "run.py"


def load(path: pathlib.Path) -> ModuleType:
    """The module of a file, which is run as if imported, not as a program."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_benchmarks(*args: object) -> subprocess.CompletedProcess[str]:
    """Runs the benchmarks' program with these arguments."""
    command = [sys.executable, str(BENCHMARKS), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False)
