# SPDX-License-Identifier: Apache-2.0
"""Checks that functions are short, and that source files are named for what they hold."""

import ast
import pathlib
import sys
from collections.abc import Iterator

import lizard

ROOT = pathlib.Path(__file__).resolve().parents[2]
FOLDERS = ("benchmarks", "csrc", "examples", "jax_ep", "testing", "tests", "tools", "xla_ffi")
CPP = {".cc", ".cu", ".cuh", ".h"}
SUFFIXES = {*CPP, ".bazel", ".bzl", ".py", ".pyi"}
# Lines of a function, as CONTRIBUTING.md says; in Python a signature is one of them, and
# docstrings do not count.
MAX_CPP_LINES = 80
MAX_PYTHON_LINES = 50
# Of a file: said, but no error. Whether it is one thing is for people to judge.
MANY_LINES = 400
# A name that fits everything hides everything.
VAGUE = {"common", "helper", "helpers", "misc", "util", "utils"}
# Named as the files of other projects that they stand for.
STAND_INS = ROOT / "tools" / "bazel" / "offline"
SPDX = "SPDX-License-Identifier: Apache-2.0"

Function = tuple[str, int, int]  # name, first line, number of lines


def python_functions(source: str) -> Iterator[Function]:
    """Yields the functions of a Python file, with those inside of others."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = 1 + node.end_lineno - node.body[0].lineno + 1
            if ast.get_docstring(node) is not None:
                lines -= node.body[0].end_lineno - node.body[0].lineno + 1
            yield node.name, node.lineno, lines


def cpp_functions(source: str) -> Iterator[Function]:
    """Yields the functions of a C++ or CUDA file; what is inside of one is part of it."""
    for function in lizard.analyze_file.analyze_source_code("source.cc", source).function_list:
        name = function.name.rpartition("::")[2]
        yield name, function.start_line, function.end_line - function.start_line + 1


def long_functions(path: pathlib.Path) -> Iterator[str]:
    """Yields what is to be said about the functions of one file."""
    if path.suffix in CPP:
        functions, most = cpp_functions(path.read_text()), MAX_CPP_LINES
    elif path.suffix == ".py":
        functions, most = python_functions(path.read_text()), MAX_PYTHON_LINES
    else:
        return
    for name, line, lines in functions:
        if lines > most:
            yield f"{name}, line {line}, has {lines} lines, more than {most}: is it one thing?"


def findings(path: pathlib.Path) -> Iterator[str]:
    """Yields what is wrong with one file."""
    yield from long_functions(path)
    if not path.is_relative_to(STAND_INS):
        if VAGUE & set(path.stem.lower().split("_")):
            yield "the name does not say what the file holds"
        if VAGUE & set(path.parent.relative_to(ROOT).parts):
            yield "the folder's name does not say what it holds"
    lines = path.read_text().splitlines()
    # Generated stubs and empty files have none.
    if path.suffix != ".pyi" and lines and SPDX not in "".join(lines[:2]):
        yield f"no '{SPDX}' in the first two lines"


def main() -> int:
    """Prints the findings; the exit status is 1 if there are any."""
    paths = [
        path
        for folder in FOLDERS
        for path in sorted((ROOT / folder).rglob("*"))
        if path.suffix in SUFFIXES and "__pycache__" not in path.parts
    ]
    for path in paths:
        if (number := len(path.read_text().splitlines())) > MANY_LINES:
            print(f"{path.relative_to(ROOT)}: {number} lines (no error); is it one thing?")
    found = [f"{path.relative_to(ROOT)}: {finding}" for path in paths for finding in findings(path)]
    print("\n".join(found), file=sys.stderr, end="\n" if found else "")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
