# SPDX-License-Identifier: Apache-2.0
"""Backend `ffi`: this library's own handlers, as JAX primitives."""
