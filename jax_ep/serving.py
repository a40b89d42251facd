# SPDX-License-Identifier: Apache-2.0
"""Processes that a supervisor has started, and that one another's death does not end."""

from jax_ep._src.service import CoordinationService, join_service, start_service

__all__ = ["CoordinationService", "join_service", "start_service"]
