# SPDX-License-Identifier: Apache-2.0
"""CI's compiler launcher compiles the same sources once, wherever they lie."""

import os
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

    def run(folder, header="int a;", flags=(), top="csrc"):
        source = tmp_path / folder / top / "kernels" / "k.cu"
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


@pytest.mark.parametrize("compiles", ["compile_in", "compile_cpp_in"])
def test_flags_in_another_order_are_the_same(compiles, request):
    """CMake 3.25 says the language's standard behind other flags, and CMake 4.4 before them."""
    run = request.getfixturevalue(compiles)
    flags = ["-O3", "-std=c++20"]
    assert run("one", flags=flags) == (0, 1)
    assert run("other", flags=flags[::-1]) == (0, 1)


@pytest.mark.parametrize("change", [{"header": "int b;"}, {"flags": ["-DNDEBUG"]}])
def test_other_headers_or_flags_are_compiled(change, compile_in):
    assert compile_in("one") == (0, 1)
    assert compile_in("other", **change) == (0, 2)
    assert compile_in("other", **change) == (0, 2)


def test_kernels_that_are_not_of_the_sources_are_compiled(compile_in):
    """CMake compiles a file of its own, to find out about the compiler."""
    assert compile_in("one", top="CMakeFiles") == (0, 1)
    assert compile_in("one", top="CMakeFiles") == (0, 2)


def test_what_failed_is_compiled_again(compile_in):
    assert compile_in("one", flags=["-DBROKEN"]) == (3, 1)
    assert compile_in("other", flags=["-DBROKEN"]) == (3, 2)


@pytest.fixture
def compile_cpp_in(tmp_path):
    """The same for C++, with the machine's compiler."""
    log = tmp_path / "log"
    log.touch()
    compiler = tmp_path / "compiler"
    compiler.write_text(f'#!/bin/sh\ncase "$*" in *" -c "*) echo >>{log} ;; esac\nexec c++ "$@"\n')
    compiler.chmod(0o755)

    def run(folder, text="int f() { return A; }", header="#define A 1", flags=()):
        sources = tmp_path / folder
        (sources / "include").mkdir(parents=True, exist_ok=True)
        (sources / "include" / "a.h").write_text(header)
        source = sources / "f.cc"
        source.write_text(f'#include "a.h"\n{text}\n')
        output = source.with_suffix(".o")
        output.unlink(missing_ok=True)
        command = [compiler, "-isystem", sources / "include", *flags, "-MD", "-MT", output]
        command += ["-MF", sources / "f.o.d", "-o", output, "-c", source]
        done = subprocess.run(
            [sys.executable, LAUNCHER, *command],
            env=os.environ | {"COMPILE_ONCE": str(tmp_path / "kept")},
            timeout=60,
            check=False,
            capture_output=True,
        )
        assert output.exists() == (done.returncode == 0)
        return done.returncode, len(log.read_text().splitlines())

    return run


def test_cpp_that_is_preprocessed_to_the_same_is_compiled_once(compile_cpp_in):
    assert compile_cpp_in("one") == (0, 1)
    assert compile_cpp_in("other") == (0, 1)
    assert compile_cpp_in("one", header="#define A 1\n#define B 2  // of no use") == (0, 1)
    assert compile_cpp_in("other", flags=["-DB", "-Wall", "-Werror"]) == (0, 1)


@pytest.mark.parametrize(
    "change", [{"header": "#define A 2"}, {"text": "int g() { return A; }"}, {"flags": ["-O2"]}]
)
def test_other_cpp_is_compiled(change, compile_cpp_in):
    assert compile_cpp_in("one") == (0, 1)
    assert compile_cpp_in("other", **change) == (0, 2)
    assert compile_cpp_in("other", **change) == (0, 2)


@pytest.mark.parametrize("broken", ["int f() { return B; }", "#error no"])
def test_cpp_that_does_not_compile_is_left_to_the_compiler(broken, compile_cpp_in):
    assert compile_cpp_in("one", broken) == (1, 1)
    assert compile_cpp_in("one", broken) == (1, 2)
