# SPDX-License-Identifier: Apache-2.0
"""cc_library, cc_binary and cc_test with the flags of all our C++, which CMake gives too."""

load("@rules_cc//cc:cc_binary.bzl", _cc_binary = "cc_binary")
load("@rules_cc//cc:cc_library.bzl", _cc_library = "cc_library")
load("@rules_cc//cc:cc_test.bzl", _cc_test = "cc_test")

_COPTS = [
    "-std=c++20",
    "-fvisibility=hidden",
    "-fvisibility-inlines-hidden",
    "-Wall",
    "-Wextra",
]

def _copts(own):
    return _COPTS + own + select({
        "//:werror_true": ["-Werror"],
        "//conditions:default": [],
    })

def cc_library(name, copts = [], **kwargs):
    # Linked statically, always: what is hidden in a shared library, its tests could not call.
    _cc_library(name = name, copts = _copts(copts), linkstatic = True, **kwargs)

def cc_binary(name, copts = [], **kwargs):
    _cc_binary(name = name, copts = _copts(copts), **kwargs)

def cc_test(name, copts = [], deps = [], **kwargs):
    _cc_test(
        name = name,
        copts = _copts(copts),
        deps = deps + ["@jax_ep_googletest//:gtest_main"],
        **kwargs
    )
