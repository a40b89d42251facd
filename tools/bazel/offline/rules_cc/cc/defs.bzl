# SPDX-License-Identifier: Apache-2.0
"""Forwards to the rules built into Bazel."""

# buildifier: disable=native-cc-binary
cc_binary = native.cc_binary

# buildifier: disable=native-cc-import
cc_import = native.cc_import

# buildifier: disable=native-cc-library
cc_library = native.cc_library

# buildifier: disable=native-cc-test
cc_test = native.cc_test

# buildifier: disable=native-cc-toolchain
cc_toolchain = native.cc_toolchain

# buildifier: disable=native-cc-toolchain-suite
cc_toolchain_suite = native.cc_toolchain_suite
