# SPDX-License-Identifier: Apache-2.0
"""Redundant experts: where copies of experts live, and which copy a token goes to."""
