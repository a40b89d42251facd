# SPDX-License-Identifier: Apache-2.0
"""Forwards to Bazel's own."""

load("//cc/private:builtins.bzl", "BuiltinCcInfo")

CcInfo = BuiltinCcInfo
