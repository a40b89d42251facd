# SPDX-License-Identifier: Apache-2.0
"""A small server for the language model of train_moe_lm.py."""
