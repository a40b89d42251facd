# SPDX-License-Identifier: Apache-2.0
"""The implementation; what is public is named in `jax_ep/__init__.py`."""
