# SPDX-License-Identifier: Apache-2.0
"""The parts of `train_moe_lm.py`."""
