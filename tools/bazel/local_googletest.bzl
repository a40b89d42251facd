# SPDX-License-Identifier: Apache-2.0
"""local_googletest: GoogleTest, compiled from the sources that CMake's build takes too."""

load(":locate.bzl", "ENVIRON", "HOW_TO_LOOK_AGAIN", "interpreter")

# As cmake/JaxEpGoogleTest.cmake compiles it. The second of the includes is for its own sources.
_BUILD = """\
load("@rules_cc//cc:cc_library.bzl", "cc_library")

cc_library(
    name = "gtest_main",
    testonly = True,
    srcs = [
        "src/gtest-all.cc",
        "src/gtest_main.cc",
    ],
    hdrs = glob(["include/gtest/**/*.h"]),
    copts = [
        "-std=c++20",
        "-w",
        "-O0",
        "-g0",
    ],
    includes = [
        "include",
        ".",
    ],
    linkopts = ["-pthread"],
    linkstatic = True,
    textual_hdrs = glob(
        [
            "src/*.cc",
            "src/*.h",
        ],
        exclude = [
            "src/gtest-all.cc",
            "src/gtest_main.cc",
        ],
    ),
    visibility = ["//visibility:public"],
)
"""

def _local_googletest_impl(rctx):
    python, problem = interpreter(rctx)
    if problem:
        fail("jax_ep: {} {}".format(problem, HOW_TO_LOOK_AGAIN))
    tool = rctx.path(Label("//tools:googletest.py"))
    result = rctx.execute([python, tool, rctx.path("downloaded")])
    if result.return_code:
        fail(result.stderr)
    for name in ["include", "src"]:
        rctx.symlink(result.stdout.strip() + "/" + name, name)
    rctx.file("BUILD.bazel", _BUILD)

local_googletest = repository_rule(
    implementation = _local_googletest_impl,
    configure = True,
    doc = "GoogleTest, which pip downloads as sources. Only jax_ep's own tests need it.",
    environ = ENVIRON + ["JAX_EP_GOOGLETEST_DIR"],
)
