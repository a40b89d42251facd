# SPDX-License-Identifier: Apache-2.0
"""Forwards to the rule built into Bazel."""

# buildifier: disable=native-py
py_test = native.py_test
