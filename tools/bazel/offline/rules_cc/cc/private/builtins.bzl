# SPDX-License-Identifier: Apache-2.0
"""Bazel's built-in names, under other names so that they can be re-exported."""

# buildifier: disable=native-cc-common
builtin_cc_common = cc_common

# buildifier: disable=native-cc-info
BuiltinCcInfo = CcInfo
