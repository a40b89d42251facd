# SPDX-License-Identifier: Apache-2.0
"""Forwards to Bazel's own."""

load("//cc/private:builtins.bzl", "builtin_cc_common")

cc_common = builtin_cc_common
