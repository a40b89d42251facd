# SPDX-License-Identifier: Apache-2.0
"""Where the C++ tests get GoogleTest from. No test here needs a network: pip is given a folder."""

import hashlib
import os
import pathlib
import re
import subprocess
import sys
import zipfile

import pytest

from ep_testing import program_files

ROOT = pathlib.Path(__file__).resolve().parents[1]
PROGRAM = ROOT / "tools" / "googletest.py"


tool = program_files.load(PROGRAM)


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder with a package of the pinned name, and pip that knows nothing else."""
    folder = tmp_path / "index"
    folder.mkdir()
    wheel = folder / f"ros_gtest_vendor-{tool.VERSION}-cp311-cp311-manylinux_2_28_x86_64.whl"
    info = f"ros_gtest_vendor-{tool.VERSION}.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in tool.NEEDED:
            archive.writestr(tool.SOURCES + name, f"// {name}")
        archive.writestr("gtest_vendor/other.so", "not wanted")
        archive.writestr(f"{info}/METADATA", f"Name: ros-gtest-vendor\nVersion: {tool.VERSION}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\n")
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.delenv(tool.VARIABLE, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return wheel


def _pin(wheel, monkeypatch):
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    requirement = tool.REQUIREMENT.replace(tool.SHA256, digest)
    assert requirement != tool.REQUIREMENT
    monkeypatch.setattr(tool, "REQUIREMENT", requirement)


def test_the_sources_are_unpacked_once_and_nothing_else_is(index, tmp_path, monkeypatch):
    _pin(index, monkeypatch)
    folder = tool.downloaded_sources(tmp_path / "cache")
    found = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert found == set(tool.NEEDED)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [folder.name]
    index.unlink()
    assert tool.downloaded_sources(tmp_path / "cache") == folder


def test_a_file_other_than_the_pinned_one_is_refused(index, tmp_path, capfd):
    with pytest.raises(SystemExit, match="pip cannot download ros-gtest-vendor"):
        tool.downloaded_sources(tmp_path / "cache")
    assert "DO NOT MATCH THE HASHES" in capfd.readouterr().err
    assert not list((tmp_path / "cache").iterdir())


def test_a_download_that_another_process_did_first_is_used(index, tmp_path, monkeypatch):
    _pin(index, monkeypatch)
    download = tool.download

    def slow(folder):
        target = tmp_path / "cache" / f"googletest-{tool.VERSION}" / "src"
        target.mkdir(parents=True)
        (target / "gtest-all.cc").write_text("the other's")
        return download(folder)

    monkeypatch.setattr(tool, "download", slow)
    folder = tool.downloaded_sources(tmp_path / "cache")
    assert (folder / "src" / "gtest-all.cc").read_text() == "the other's"


@pytest.mark.usefixtures("index")
def test_without_a_network_a_folder_may_be_named(tmp_path):
    def run(**environment):
        return subprocess.run(
            [sys.executable, PROGRAM, tmp_path / "cache"],
            env=os.environ | environment,
            capture_output=True,
            text=True,
            check=False,
        )

    for name in tool.NEEDED[:2]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    done = run(JAX_EP_GOOGLETEST_DIR=str(tmp_path))
    assert (done.returncode, done.stdout) == (1, "")
    assert f"which has no {tool.NEEDED[2]}: it must be a folder with the sources" in done.stderr
    (tmp_path / tool.NEEDED[2]).touch()
    done = run(JAX_EP_GOOGLETEST_DIR=str(tmp_path))
    assert done.stdout == f"{tmp_path}\n", done.stderr
    assert not (tmp_path / "cache").exists()


def _flags(text: str) -> set[str]:
    return set(re.findall(r"(?<=[ \"])-[a-zO][\w=+]*", text)) - {"-pthread", "-std=c++20"}


def test_cmake_and_bazel_compile_it_alike():
    cmake = (ROOT / "cmake" / "JaxEpGoogleTest.cmake").read_text()
    bazel = (ROOT / "tools" / "bazel" / "local_googletest.bzl").read_text()
    options = re.search(r"target_compile_options\(jax_ep_gtest_main PRIVATE ([^)]*)\)", cmake)[1]
    copts = re.search(r"copts = \[(.*?)\]", bazel, re.DOTALL)[1]
    assert _flags(f" {options}") == _flags(copts) == {"-w", "-O0", "-g0"}
    for text in (cmake, bazel):
        assert PROGRAM.name in text
        assert {f"src/{name}" for name in re.findall(r'/?src/(gtest\S+\.cc)"', text)} == {
            "src/gtest-all.cc",
            "src/gtest_main.cc",
        }
