# SPDX-License-Identifier: Apache-2.0
"""Starts the ranks of a group as processes, for tests and benchmarks. No part of jax_ep."""
