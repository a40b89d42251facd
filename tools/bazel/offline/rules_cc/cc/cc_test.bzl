# SPDX-License-Identifier: Apache-2.0
"""Forwards to the rule built into Bazel."""

# buildifier: disable=native-cc-test
cc_test = native.cc_test
