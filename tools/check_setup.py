# SPDX-License-Identifier: Apache-2.0
"""Checks that this machine has what `make` cannot bring itself; says what to do if not.

Runs on the Python that the user has, however old: no syntax newer than Python 3.5's here.
"""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile

PROGRAM = """
#include <concepts>
#include <span>
template <std::integral T> T twice(T x) { return 2 * x; }
struct Point { int x = 0; int y = 0; };
int main() { Point p{.y = 1}; return twice(p.x) + int(std::span<Point>(&p, 1).size()) - 1; }
"""


def python_problems():
    """Yields what is wrong with this Python."""
    this = "{} is Python {}".format(sys.executable, ".".join(map(str, sys.version_info[:3])))
    if sys.version_info < (3, 11):
        yield this + "; jax_ep needs 3.11 or newer. Name one: make PYTHON=python3.12 ..."
        return
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError:
        yield this + " without the venv module (Debian, Ubuntu: apt-get install python3-venv)."
    header = os.path.join(sysconfig.get_path("include"), "Python.h")
    if not os.path.exists(header):
        yield (
            "{} without its C headers: no {} (Debian, Ubuntu: apt-get install python3-dev)."
        ).format(this, header)


def compiler():
    """Returns the compiler's command, the one that CMake will choose; None if there is none."""
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    return next(([name] for name in ("c++", "g++", "clang++") if shutil.which(name)), None)


def compiler_problems():
    """Yields what is wrong with the C++ compiler."""
    command = compiler()
    if command is None or not shutil.which(command[0]):
        yield (
            "no C++ compiler{}. Install one that knows C++20, GCC 11 or Clang 14 or newer (Debian,"
            " Ubuntu: apt-get install g++), or name one: make CXX=clang++ ..."
        ).format(" called " + command[0] if command else "")
        return
    with tempfile.TemporaryDirectory() as folder:
        source = os.path.join(folder, "check.cc")
        with open(source, "w") as file:
            file.write(PROGRAM)
        compile_it = [*command, "-std=c++20", source, "-o", os.path.join(folder, "check")]
        done = subprocess.run(compile_it, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode != 0:
        yield (
            "{} does not compile C++20; GCC 11, Clang 14 and newer ones do. Name one:"
            " make CXX=g++-12 ...\n{}"
        ).format(" ".join(command), done.stdout.decode(errors="replace"))


def main():
    """Prints the problems; the exit status is 1 if there are any."""
    problems = [*python_problems(), *compiler_problems()]
    for problem in problems:
        sys.stderr.write("jax_ep: " + problem + "\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
