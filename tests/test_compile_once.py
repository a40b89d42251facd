# SPDX-License-Identifier: Apache-2.0
"""CI's compiler launcher compiles the same sources once, wherever they lie."""

import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
LAUNCHER = ROOT / ".ci" / "compile_once.py"
COMPILER = """#!/bin/sh
echo "$@" >>{log}
case "$*" in *-DBROKEN*) exit 3 ;; esac
while [ "$1" != -o ]; do shift; done
echo object >"$2"
"""

pytestmark = pytest.mark.skipif(not LAUNCHER.exists(), reason="of the checkout, and of CI alone")


@pytest.fixture
def compile_in(tmp_path):
    """Compiles a file of sources in a folder; the exit status, and how often the compiler ran."""
    log = tmp_path / "log"
    log.touch()
    compiler = tmp_path / "compiler"
    compiler.write_text(COMPILER.format(log=log))
    compiler.chmod(0o755)

    def run(folder, header="int a;", flags=()):
        source = tmp_path / folder / "csrc" / "kernels" / "k.cu"
        source.parent.mkdir(parents=True, exist_ok=True)
        source.write_text('#include "k.h"')
        source.with_suffix(".h").write_text(header)
        built = [tmp_path / folder / name for name in ("k.o", "k.o.d")]
        for path in built:
            path.unlink(missing_ok=True)
        command = [compiler, f"-I{tmp_path / folder}", *flags, "-MD", "-MT", built[0]]
        command += ["-MF", built[1], "-c", source, "-o", built[0]]
        environment = {"COMPILE_ONCE": str(tmp_path / "kept"), "PATH": "/usr/bin:/bin"}
        done = subprocess.run(
            [sys.executable, LAUNCHER, *command], env=environment, timeout=60, check=False
        )
        assert built[0].exists() == (done.returncode == 0)
        return done.returncode, len(log.read_text().splitlines())

    return run


def test_the_same_sources_are_compiled_once(compile_in):
    assert compile_in("one") == (0, 1)
    assert compile_in("other") == (0, 1)
    assert compile_in("one") == (0, 1)


def test_flags_that_change_nothing_are_the_same(compile_in):
    assert compile_in("one", flags=["-Xptxas=-v", "-Werror=all-warnings"]) == (0, 1)
    assert compile_in("other") == (0, 1)


@pytest.mark.parametrize("change", [{"header": "int b;"}, {"flags": ["-DNDEBUG"]}])
def test_other_headers_or_flags_are_compiled(change, compile_in):
    assert compile_in("one") == (0, 1)
    assert compile_in("other", **change) == (0, 2)
    assert compile_in("other", **change) == (0, 2)


def test_what_failed_is_compiled_again(compile_in):
    assert compile_in("one", flags=["-DBROKEN"]) == (3, 1)
    assert compile_in("other", flags=["-DBROKEN"]) == (3, 2)
