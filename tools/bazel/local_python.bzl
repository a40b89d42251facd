# SPDX-License-Identifier: Apache-2.0
"""local_python: the surrounding interpreter, and what is compiled from its packages."""

load(
    ":locate.bzl",
    "ENVIRON",
    "HOW_TO_CHOOSE",
    "HOW_TO_LOOK_AGAIN",
    "LOAD_NOT_FOUND",
    "link_not_found",
    "locate",
    "not_found",
)

_LOADS = """\
load("@rules_cc//cc:cc_library.bzl", "cc_library")
load("@rules_python//python:py_runtime.bzl", "py_runtime")
load("@rules_python//python:py_runtime_pair.bzl", "py_runtime_pair")
"""

_INTERPRETER = """
py_runtime(
    name = "runtime",
    interpreter_path = "{python}",
    python_version = "PY3",
    stub_shebang = "#!{python}",
)

py_runtime_pair(
    name = "runtime_pair",
    py3_runtime = ":runtime",
)

toolchain(
    name = "toolchain",
    toolchain = ":runtime_pair",
    toolchain_type = "@rules_python//python:toolchain_type",
    visibility = ["//visibility:public"],
)
"""

_XLA_FFI = """
cc_library(
    name = "xla_ffi",
    hdrs = glob(["xla_ffi/xla/ffi/api/*.h"]),
    includes = ["xla_ffi"],
    visibility = ["//visibility:public"],
)
"""

_PYTHON_HEADERS = """
cc_library(
    name = "python_headers",
    hdrs = glob(["python_headers/**/*.h"]),
    includes = ["python_headers"],
    visibility = ["//visibility:public"],
)
"""

# As nanobind's CMake files compile it; all its sources are in nb_combined.cpp.
_NANOBIND = """
cc_library(
    name = "nanobind",
    srcs = ["nanobind/src/nb_combined.cpp"],
    hdrs = glob(["nanobind/include/nanobind/**/*.h"]),
    copts = [
        "-std=c++20",
        "-O3",
        "-fno-stack-protector",
        "-fno-strict-aliasing",
        "-fvisibility=hidden",
        "-w",
    ],
    includes = [
        "nanobind/ext/robin_map/include",
        "nanobind/include",
    ],
    linkstatic = True,
    local_defines = [
        "NB_BUILD",
        "NB_COMPACT_ASSERTIONS",
    ],
    textual_hdrs = glob([
        "nanobind/ext/robin_map/include/**/*.h",
        "nanobind/src/*.cpp",
        "nanobind/src/*.h",
    ]),
    visibility = ["//visibility:public"],
    deps = [":python_headers"],
)
"""

# Target, named as what locate.py finds for it -> its text, and what to say where that is missing.
_TARGETS = {
    "nanobind": (
        _NANOBIND,
        "has no nanobind, which the compiled module is made with. Install it there (pip install " +
        "nanobind), or " + HOW_TO_CHOOSE,
    ),
    "python_headers": (
        _PYTHON_HEADERS,
        "has no C headers. Install them (Debian, Ubuntu: apt-get install python3-dev), or " +
        HOW_TO_CHOOSE,
    ),
    "xla_ffi": (
        _XLA_FFI,
        "has no jaxlib, whose XLA FFI headers the compiled module is built on. Install it there " +
        "(pip install jax), or " + HOW_TO_CHOOSE,
    ),
}

def _local_python_impl(rctx):
    found = locate(rctx)
    if "problem" in found:
        fail("jax_ep: {} {}".format(found["problem"], HOW_TO_LOOK_AGAIN))
    build = LOAD_NOT_FOUND + _LOADS + _INTERPRETER.format(python = found["python"])
    for name, (text, problem) in _TARGETS.items():
        if found[name]:
            rctx.symlink(found[name], name)
            build += text
        else:
            build += not_found(name, "{} {}.".format(found["python"], problem))
    link_not_found(rctx)
    rctx.file("BUILD.bazel", build)

local_python = repository_rule(
    implementation = _local_python_impl,
    configure = True,
    doc = "The interpreter as a toolchain, its headers, jaxlib's XLA FFI headers, nanobind.",
    environ = ENVIRON,
    local = True,
)
