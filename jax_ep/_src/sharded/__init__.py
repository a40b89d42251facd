# SPDX-License-Identifier: Apache-2.0
"""MoE on global arrays: which device has which tokens and which parts of the weights."""
