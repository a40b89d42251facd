# SPDX-License-Identifier: Apache-2.0
"""Tests on GPUs, and what they are made of. A package, so that no other `gpu` hides it."""
