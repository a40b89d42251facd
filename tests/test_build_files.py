# SPDX-License-Identifier: Apache-2.0
"""CMake and Bazel build the same sources, all of them, with the same flags."""

import pathlib
import re

import pytest

import jax_ep
from ep_testing import bazel_files, cmake_files
from jax_ep._src.groups.gpu_architectures import serves

ROOT = pathlib.Path(__file__).resolve().parents[1]
CC_RULES = "tools/bazel/cc.bzl"
CUDA_RULES = "tools/bazel/cuda_library.bzl"

pytestmark = pytest.mark.skipif(
    not (ROOT / "csrc").is_dir(), reason="the C++ sources are not here: `make test` runs it"
)


def _in_folders(*suffixes: str, tops: tuple[str, ...] = ("csrc", "xla_ffi")) -> set[str]:
    paths = (path for top in tops for path in (ROOT / top).rglob("*"))
    return {path.relative_to(ROOT).as_posix() for path in paths if path.suffix in suffixes}


def _in_bazel(*suffixes: str) -> set[str]:
    files = set().union(*(t.files("srcs", "hdrs", "textual_hdrs") for t in bazel_files.targets()))
    return {file for file in files if file.endswith(suffixes)}


def test_cmake_builds_every_source():
    sources = set().union(*(target.sources for target in cmake_files.targets().values()))
    assert sources == _in_folders(".cc", ".cu")


def _without_hosts_in_name_alone(files: set[str]) -> set[str]:
    """But the programs for NVSHMEM on one machine, which CMake alone builds."""
    return {file for file in files if not file.startswith("csrc/rdma/tests/")}


def test_bazel_builds_every_source():
    assert _in_bazel(".cc", ".cu") == _without_hosts_in_name_alone(_in_folders(".cc", ".cu"))


def test_bazel_declares_every_header():
    assert _in_bazel(".h", ".cuh") == _without_hosts_in_name_alone(_in_folders(".h", ".cuh"))


def test_the_globs_of_bazel_reach_every_python_file():
    tops = ("benchmarks", "examples", "jax_ep", "testing", "tests")
    files = {name for name in _in_bazel(".py") if name.startswith(tops)}
    consumer = _in_folders(".py", tops=("tests/bazel_consumer",))
    assert files == _in_folders(".py", tops=tops) - consumer


@pytest.mark.parametrize("name", ["ARGS", "DATA", "LARGE", "OF_THE_CHECKOUT", "ON_FAKE_CUDA"])
def test_what_bazel_says_about_a_test_is_about_one_that_exists(name):
    for file in bazel_files.constant("tests/BUILD.bazel", name):
        assert (ROOT / "tests" / f"{file}.py").exists(), file


# --- flags -------------------------------------------------------------------------------------


def test_bazels_flags_of_all_cpp_are_those_of_cmakes_libraries():
    bazel = set(bazel_files.constant(CC_RULES, "_COPTS")) | {"-Werror"}
    assert bazel == cmake_files.targets()["jax_ep_core"].flags["cc"]
    assert bazel <= cmake_files.targets()["jax_ep_cpu"].flags["cc"] | {"-std=c++20"}


def test_bazels_flags_of_the_kernels_are_cmakes():
    (kernels,) = (
        t
        for t in bazel_files.targets()
        if "high_throughput/combine.cu" in t.attributes.get("srcs", [])
    )
    of_all = bazel_files.constant(CUDA_RULES, "_COPTS")
    cmake = cmake_files.targets()["jax_ep_kernels"].flags["cu"]
    release = {"-O3", "-DNDEBUG"}  # CMake's build type adds them
    assert {*of_all, *kernels.attributes["copts"]} == cmake | release


def test_both_compile_for_the_same_gpus():
    bazel = bazel_files.constant(CUDA_RULES, "CUDA_ARCHITECTURES")
    cmake = cmake_files.variable("JAX_EP_CUDA_ARCHS").split(";")
    assert bazel == cmake
    for capability in ((9, 0), (10, 0), (10, 3), (11, 0)):
        assert any(serves(architecture, capability) for architecture in cmake), capability
    gencode = bazel_files.constant(CUDA_RULES, "_gencode")
    assert [gencode(architecture) for architecture in bazel] == [
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_100,code=sm_100",
        "-gencode=arch=compute_90,code=compute_90",
    ]


def _own_flags_of_bazel() -> dict[str, set[str]]:
    """Source -> what its target adds to the flags of all."""
    warnings = {"-Werror", "-Werror=all-warnings"}
    flags: dict[str, set[str]] = {}
    for target in bazel_files.targets():
        common = set(bazel_files.constant(CC_RULES, "_COPTS")) | warnings
        for source in target.files("srcs"):
            if source.endswith((".cc", ".cu")):
                own = set(target.attributes["copts"]) - common
                assert flags.setdefault(source, own) == own, source
    return flags


def _own_flags_of_cmake() -> dict[str, list[set[str]]]:
    """Source -> the same, in each target that has it."""
    common = {
        "cc": cmake_files.targets()["jax_ep_core"].flags["cc"],
        "cu": cmake_files.targets()["virtual_ranks"].flags["cu"]
        | {"-Werror=all-warnings", "-Xcompiler=-fPIC", "-Xcompiler=-fvisibility=hidden"},
    }
    flags: dict[str, list[set[str]]] = {}
    for target in cmake_files.targets().values():
        for source in target.sources:
            kind = source.rpartition(".")[2]
            flags.setdefault(source, []).append(target.flags[kind] - common[kind])
    return flags


def test_every_source_has_the_same_flags_of_its_own():
    cmake = _own_flags_of_cmake()
    for source, own in _own_flags_of_bazel().items():
        assert own in cmake[source], source


def test_the_flags_that_define_the_numbers_are_there():
    flags = _own_flags_of_bazel()
    assert "-ffp-contract=off" in flags["csrc/cpu/row_arithmetic.cc"]
    assert "-fmad=false" in bazel_files.constant(CUDA_RULES, "_COPTS")


# --- versions ----------------------------------------------------------------------------------


def test_the_bazel_module_has_the_packages_version():
    module = (ROOT / "MODULE.bazel").read_text()
    assert re.search(r'name = "jax_ep",\n    version = "(.*)"', module)[1] == jax_ep.__version__


def test_the_modules_have_the_same_nanobind_domain():
    cmake = re.findall(r"set\(domain (\w+)\)", (ROOT / "CMakeLists.txt").read_text())
    assert sorted(cmake) == ["jax_ep", "jax_ep_on_fake"]
    modules = [t for t in bazel_files.targets() if t.package == "xla_ffi" and t.kind == "cc_binary"]
    assert len(modules) == 3
    for module in modules:
        fake = module.attributes["name"] == "_cuda_on_fake"
        domain = "jax_ep_on_fake" if fake else "jax_ep"
        assert f"NB_DOMAIN={domain}" in module.attributes["local_defines"]
