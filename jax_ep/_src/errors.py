# SPDX-License-Identifier: Apache-2.0
"""Errors about the state of a group or of the installation. Bad arguments are `ValueError`s."""

from jax_ep._src.public import set_module


@set_module("jax_ep")
class EpUnavailable(RuntimeError):
    """The backend that was asked for cannot serve; the message says why."""


@set_module("jax_ep")
class EpGroupClosed(RuntimeError):
    """An `EpGroup` was used after `close()`."""
