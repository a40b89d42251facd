# SPDX-License-Identifier: Apache-2.0
"""`python -m jax_ep`: what it says of the machine, of itself, and in how many columns."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import types

import jax
import pytest
from packaging.version import Version

import jax_ep
from ep_testing import fake_cuda
from jax_ep.__main__ import main
from jax_ep._src import info, version
from jax_ep._src.groups import native

CMAKE_MODULE = pathlib.Path(__file__).resolve().parents[1] / "cmake" / "JaxEpCommit.cmake"


@pytest.fixture
def built_from(monkeypatch):
    """Lets the build have written down a commit, or none."""

    def set_commit(commit):
        module = None if commit is None else types.SimpleNamespace(COMMIT=commit)
        monkeypatch.setitem(sys.modules, "jax_ep._commit", module)

    set_commit(None)
    return set_commit


# --- the command line --------------------------------------------------------------------------


def test_without_arguments_it_says_what_there_is(capsys):
    assert main([]) == 0
    said = capsys.readouterr().out
    assert said.startswith("usage: python -m jax_ep ")
    assert all(re.search(rf"^    {c} ", said, re.MULTILINE) for c in ("info", "plan", "load"))


def _version_line(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    return capsys.readouterr().out


def test_the_version_has_the_commit_that_was_built(built_from, capsys):
    assert _version_line(capsys) == f"jax_ep {jax_ep.__version__}\n"
    for commit in ("0123456789ab", "0123456789ab.dirty"):
        built_from(commit)
        assert _version_line(capsys) == f"jax_ep {jax_ep.__version__}+g{commit}\n"
        shown = Version(version.full_version())
        assert (shown.public, shown.local) == (jax_ep.__version__, f"g{commit}")
    assert Version(jax_ep.__version__).local is None  # an index takes no other


# --- the table ---------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [60, 80, 100])
def test_info_has_the_width_of_the_terminal(monkeypatch, capsys, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main(["info"]) == 0
    narrow = capsys.readouterr().out
    assert max(map(len, narrow.splitlines())) <= columns
    wide = info.report()
    assert max(map(len, wide.splitlines())) > 100
    assert _words(narrow) == _words(wide), "nothing is left out"


def _words(text):
    return text.replace("-\n", "").translate(str.maketrans("", "", "-")).split()


ROWS = [
    ("what it is", "here", ""),
    (
        "library",
        "/opt/a/path/longer/than/what/a/line/has/room/for.so",
        "for groups that span hosts",
    ),
    ("x", "no", "why"),
]


def test_a_table_that_fits_has_three_columns():
    lines = info._table(ROWS[::2], 80).splitlines()
    assert lines == [
        "what        here  missing for / note",
        "------------------------------------",
        "what it is  here",
        "x           no    why",
    ]
    assert info._table(ROWS[::2], 36).splitlines() == lines
    assert info._table(ROWS[::2], 35).splitlines() != lines
    assert "for.so  for groups" in info._table(ROWS, None)


def test_one_that_does_not_has_notes_below():
    assert info._table(ROWS, 42).splitlines() == [
        "what        here",
        "              missing for / note",
        "------------------------------------------",
        "what it is  here",
        "library     /opt/a/path/longer/than/what/a",
        "              /line/has/room/for.so",
        "              for groups that span hosts",
        "x           no",
        "              why",
    ]


# --- the same for programs ---------------------------------------------------------------------


def _facts(capsys):
    assert main(["info", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_json_has_what_a_report_of_a_bug_needs(built_from, capsys, monkeypatch):
    built_from("0123456789ab")
    monkeypatch.setenv("JAX_EP_ANYTHING", "1")
    monkeypatch.setenv("GITHUB_TOKEN", "not to be told")
    found = _facts(capsys)
    assert found["jax_ep"]["version"] == jax_ep.__version__
    assert found["jax_ep"]["commit"] == "0123456789ab"
    assert pathlib.Path(found["jax_ep"]["path"]) == pathlib.Path(jax_ep.__file__).parent
    assert found["python"] == "{}.{}.{}".format(*sys.version_info[:3])
    assert found["packages"]["jax"] == jax.__version__
    assert found["packages"]["jaxlib"] == jax.lib.__version__
    cpus = {"platform": "cpu", "kind": "cpu", "compute_capability": None}
    assert found["devices"] == [{**cpus, "count": len(jax.devices())}]
    assert found["why_no_devices"] is None
    ffi_version = "{}.{}".format(*native.load().ffi_api_version)
    assert found["modules"]["cpu"] == {"why_not": None, "ffi_version": ffi_version}
    assert found["transports"]["rdma"].keys() >= {"why_not", "library", "nvshmem", "nics"}
    assert found["environment"]["JAX_EP_ANYTHING"] == "1"
    assert found["environment"]["XLA_FLAGS"] == os.environ["XLA_FLAGS"]
    assert "GITHUB_TOKEN" not in found["environment"]


def test_json_says_what_the_kernels_were_built_with(capsys, monkeypatch):
    module = fake_cuda.FakeCuda()
    module.ffi_api_version = (0, 3)
    monkeypatch.setattr(native, "_try_load_cuda", lambda: (module, None))
    assert _facts(capsys)["modules"]["cuda"] == {
        "why_not": None,
        "ffi_version": "0.3",
        "cuda": "13.0",
        "architectures": ["90-real", "100-real", "90-virtual"],
    }
    monkeypatch.setattr(native, "_try_load_cuda", lambda: (None, "built without"))
    assert _facts(capsys)["modules"]["cuda"]["why_not"] == "built without"


@pytest.mark.parametrize(
    ("error", "says"),
    [(RuntimeError("no\n  driver"), "no driver"), (AssertionError(), "AssertionError")],
)
def test_where_jax_does_not_start_info_says_so(capsys, monkeypatch, error, says):
    def devices():
        raise error

    monkeypatch.setattr(jax, "devices", devices)
    why = f"JAX does not start (JAX_PLATFORMS is 'cpu'): {says}"
    found = _facts(capsys)
    assert (found["devices"], found["why_no_devices"]) == ([], why)
    assert re.search(rf"^devices +none +{re.escape(why)}$", info.report(), re.MULTILINE)


# --- the commit, as the build finds it ---------------------------------------------------------


@pytest.fixture
def find_commit(tmp_path, monkeypatch):
    """What CMake finds for a folder, as it is when sources are built there."""
    if not (CMAKE_MODULE.exists() and shutil.which("cmake") and shutil.which("git")):
        pytest.skip("needs git, CMake and the sources: `make test` has them")
    monkeypatch.delenv("JAX_EP_COMMIT", raising=False)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    program = tmp_path / "find.cmake"
    program.write_text(
        f'include("{CMAKE_MODULE}")\n'
        'jax_ep_find_commit(commit "${SOURCES}")\n'
        'execute_process(COMMAND "${CMAKE_COMMAND}" -E echo "${commit}")\n'
    )

    def find(sources):
        command = ["cmake", f"-DSOURCES={sources}", "-P", program]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else done.stderr

    return find


def _git(folder, *arguments):
    who = ("-c", "user.name=somebody", "-c", "user.email=somebody@example.com")
    command = ["git", "-C", folder, *who, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_the_build_finds_the_commit_of_a_checkout_alone(find_commit, tmp_path):
    checkout = tmp_path / "checkout"
    copied = checkout / "third_party" / "jax_ep"
    copied.mkdir(parents=True)
    assert find_commit(checkout) == ""  # a source distribution
    _git(checkout, "init", "--quiet")
    assert find_commit(checkout) == ""  # without any commit
    (checkout / "file").write_text("1")
    _git(checkout, "add", "file")
    _git(checkout, "commit", "--quiet", "--message=first")
    commit = _git(checkout, "rev-parse", "--short=12", "HEAD")
    assert find_commit(checkout) == commit
    assert find_commit(copied) == ""  # that would be the commit of something else
    (checkout / "not_tracked").write_text("1")
    assert find_commit(checkout) == commit
    (checkout / "file").write_text("2")
    assert find_commit(checkout) == f"{commit}.dirty"


def test_who_builds_without_git_can_name_the_commit(find_commit, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_EP_COMMIT", "0123456789abcdef0123456789abcdef01234567")
    assert find_commit(tmp_path) == "0123456789ab"
    monkeypatch.setenv("JAX_EP_COMMIT", "0123456")
    assert find_commit(tmp_path) == "0123456"
    monkeypatch.setenv("JAX_EP_COMMIT", "main")
    assert "JAX_EP_COMMIT is 'main'; allowed: a commit" in find_commit(tmp_path)
