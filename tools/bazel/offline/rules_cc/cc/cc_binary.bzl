# SPDX-License-Identifier: Apache-2.0
"""Forwards to the rule built into Bazel."""

# buildifier: disable=native-cc-binary
cc_binary = native.cc_binary
