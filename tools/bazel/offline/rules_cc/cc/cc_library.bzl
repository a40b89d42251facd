# SPDX-License-Identifier: Apache-2.0
"""Forwards to the rule built into Bazel."""

# buildifier: disable=native-cc-library
cc_library = native.cc_library
