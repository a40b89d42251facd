# SPDX-License-Identifier: Apache-2.0
"""Forwards to Bazel's own."""

load("@bazel_tools//tools/python:toolchain.bzl", _py_runtime_pair = "py_runtime_pair")

py_runtime_pair = _py_runtime_pair
