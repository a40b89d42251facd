# SPDX-License-Identifier: Apache-2.0
"""local_googletest: the GoogleTest that is installed on this machine."""

_BUILD = """\
load("@rules_cc//cc:cc_library.bzl", "cc_library")

cc_library(
    name = "gtest_main",
    srcs = [
        "libgtest_main.a",
        "libgtest.a",
    ],
    hdrs = glob(["include/gtest/**/*.h"]),
    includes = ["include"],
    linkopts = ["-lpthread"],
    visibility = ["//visibility:public"],
)
"""

_PREFIXES = ["/usr/local", "/usr"]
_FOLDERS = ["lib", "lib64", "lib/x86_64-linux-gnu", "lib/aarch64-linux-gnu"]

def _local_googletest_impl(rctx):
    for prefix in _PREFIXES:
        headers = rctx.path(prefix + "/include/gtest")
        for folder in _FOLDERS:
            library = rctx.path(prefix + "/" + folder)
            if headers.exists and library.get_child("libgtest_main.a").exists:
                rctx.symlink(headers, "include/gtest")
                for name in ["libgtest.a", "libgtest_main.a"]:
                    rctx.symlink(library.get_child(name), name)
                rctx.file("BUILD.bazel", _BUILD)
                return
    fail(("jax_ep: the C++ unit tests need GoogleTest, which was not found below {}. Install it " +
          "(Debian, Ubuntu: apt-get install libgtest-dev).").format(" or ".join(_PREFIXES)))

local_googletest = repository_rule(
    implementation = _local_googletest_impl,
    configure = True,
    doc = "GoogleTest, as distributions install it. Only jax_ep's own tests need it.",
    local = True,
)
