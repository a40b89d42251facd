# SPDX-License-Identifier: Apache-2.0
"""What the benchmark programs of this folder are made of. Not part of the library."""
