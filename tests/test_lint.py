# SPDX-License-Identifier: Apache-2.0
"""The project's own checks of its sources find what they are there to find."""

import graphlib
import pathlib
import re

import pytest

from ep_testing import program_files

ROOT = pathlib.Path(__file__).resolve().parents[1]
SPDX = "SPDX-License-Identifier: Apache-2.0"

includes = program_files.load(ROOT / "tools" / "lint" / "check_includes.py")
sizes = program_files.load(ROOT / "tools" / "lint" / "check_size.py")


@pytest.fixture
def check(tmp_path, monkeypatch, capsys):
    """Checks a tree of one file; the exit status, and what was printed as an error."""
    monkeypatch.setattr(sizes, "ROOT", tmp_path)

    def run(name, text):
        path = tmp_path / "csrc" / name
        path.parent.mkdir(parents=True)
        path.write_text(text)
        return sizes.main(), capsys.readouterr().err

    return run


def _python(lines, doc=0):
    """A function of so many lines, beside those of its docstring."""
    text = ['    """Says', *["    so"] * (doc - 2), '    """'] if doc else []
    return "\n".join([f"# {SPDX}", "def long():", *text, *["    x = 1"] * (lines - 1), ""])


PYTHON_IN_PYTHON = f"""# {SPDX}
class Outer:
    async def method(self):
        def inner():
{"            x = 1" + chr(10) * 50}            return x
        return inner
"""

# What the body is put into: as our sources have them.
CPP = {
    "plain": "int long_one(int a) {{\n{body}}}\n",
    "kernel": "template <class K>\n__global__ void __launch_bounds__(9)\nlong_one() {{\n{body}}}\n",
    "member": "struct S {{\n  void long_one() const noexcept override {{\n{body}  }}\n}};\n",
    "constructor": "long_one::long_one(int a)\n    : a_(a), b_{{a}} {{\n{body}}}\n",
    "raw_string": 'auto s = R"(}}}})";\nstatic void long_one() {{\n  auto s = "}}";\n{body}}}\n',
}


@pytest.mark.parametrize("kind", CPP)
@pytest.mark.parametrize(("lines", "status"), [(70, 0), (81, 1)])
def test_a_function_of_cpp_is_measured(kind, lines, status, check):
    body = "".join(f"  if (a > {i}) {{ f({i}); }}\n" for i in range(lines))
    text = f"// {SPDX}\n#if defined(A)\nint b;\n#endif\nint short_one() {{ return 1; }}\n"
    found, errors = check("file.cu", text + CPP[kind].format(body=body))
    assert found == status, errors
    assert bool(re.search(r"file.cu: long_one, line \d+, has 8\d lines, more than 80", errors)) == (
        status == 1
    )


@pytest.mark.parametrize(
    ("text", "status"),
    [
        (_python(50), 0),
        (_python(51), 1),
        (_python(50, doc=20), 0),
        (_python(51, doc=20), 1),
        (PYTHON_IN_PYTHON, 1),
    ],
    ids=["50", "51", "50 and a docstring", "51 and a docstring", "nested"],
)
def test_a_function_of_python_is_measured(text, status, check):
    found, errors = check("file.py", text)
    assert found == status, errors
    assert ("lines, more than 50" in errors) == (status == 1)


def test_a_long_file_of_short_functions_is_no_error(check):
    functions = "".join(f"def f{i}():\n    return {i}\n\n\n" for i in range(200))
    assert check("file.py", f"# {SPDX}\n{functions}") == (0, "")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("row_utils.cc", f"// {SPDX}\n", "the name does not say what the file holds"),
        ("common/rows.cc", f"// {SPDX}\n", "the folder's name does not say what it holds"),
        ("rows.cc", "int a;\n", f"no '{SPDX}' in the first two lines"),
    ],
)
def test_names_and_licenses_are_looked_at(name, text, message, check):
    assert check(name, text) == (1, f"csrc/{name}: {message}\n")


def test_the_page_for_contributors_says_the_same_numbers():
    page = " ".join((ROOT / "CONTRIBUTING.md").read_text().split())
    python, cpp = sizes.MAX_PYTHON_LINES, sizes.MAX_CPP_LINES
    rule = f"at most {python} lines (Python, without docstring; a signature is one) or {cpp} (C++)"
    assert rule in page
    assert f"files of more than {sizes.MANY_LINES} lines" in page


# --- includes ------------------------------------------------------------------------------------


def test_the_rules_of_includes_are_of_whole_folders_and_go_one_way():
    ours = {
        folder: [other for other in allowed if other.startswith(("csrc/", "xla_ffi/"))]
        for folder, allowed in includes.ALLOWED.items()
        if not folder.endswith(("/tests", "/testing"))
    }
    assert all(other.endswith("/") for others in ours.values() for other in others)
    below = {
        folder: {f for f in ours if f != folder and f"{f}/" in others}
        for folder, others in ours.items()
    }
    order = list(graphlib.TopologicalSorter(below).static_order())  # raises if there is a circle
    assert order.index("csrc/launch") < order.index("csrc/kernels")
    assert order.index("csrc/device") < order.index("csrc/sim")


@pytest.mark.parametrize(
    ("folder", "include", "status"),
    [
        ("csrc/device", "csrc/device/heap.h", 0),
        ("csrc/device", "csrc/sim/engine.h", 1),
        ("csrc/device", "csrc/kernels/launch.cuh", 1),
        ("csrc/runtime/transport", "csrc/launch/launch.h", 0),
        ("csrc/runtime/transport", "csrc/kernels/launch.cuh", 1),
        ("csrc/core", "cuda_runtime_api.h", 1),
        ("csrc/nowhere", "csrc/core/limits.h", 1),
    ],
)
def test_an_include_that_goes_up_is_found(folder, include, status, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(includes, "ROOT", tmp_path)
    path = tmp_path / folder / "file.h"
    path.parent.mkdir(parents=True)
    path.write_text(f'#include <vector>\n#include "{include}"\n')
    assert includes.main() == status
    assert bool(capsys.readouterr().err) == (status == 1)
