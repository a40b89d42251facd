# SPDX-License-Identifier: Apache-2.0
"""Runs pytest on the test files of a Bazel target: `run_pytest.py FILE [ARGUMENTS OF PYTEST...]`.

The paths of files are from the root of the repository, which here is a folder of Bazel's runfiles.
"""

import importlib.util
import os
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).absolute().parents[2]


def check_origin(module: str) -> None:
    """Raises SystemExit unless the module would be imported from this target's runfiles."""
    spec = importlib.util.find_spec(module)
    origin = spec.origin if spec and spec.origin else "not there"
    if not pathlib.Path(origin).is_relative_to(ROOT):
        raise SystemExit(f"{module} is {origin}, expected it in the runfiles, {ROOT}")


def main() -> int:
    """Runs pytest; the exit status is its own."""
    check_origin("jax_ep")
    check_origin("jax_ep._ext")
    temporary = os.environ["TEST_TMPDIR"]
    os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = f"{temporary}/hypothesis"
    options = [
        f"--config-file={ROOT / 'pyproject.toml'}",
        f"--basetemp={temporary}/pytest",
        f"--junitxml={os.environ['XML_OUTPUT_FILE']}",
        "-pno:cacheprovider",
    ]
    if only := os.environ.get("TESTBRIDGE_TEST_ONLY"):  # bazel test --test_filter=...
        options.append(f"-k={only}")
    file, *own = sys.argv[1:]
    return pytest.main([str(ROOT / file), *options, *own])


if __name__ == "__main__":
    sys.exit(main())
