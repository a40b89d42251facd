# SPDX-License-Identifier: Apache-2.0
"""The implementations of plan, dispatch and combine; `api.py` picks one by `group.backend`."""
