# SPDX-License-Identifier: Apache-2.0
"""Errors about the state of a group or of the installation. Bad arguments are `ValueError`s."""


class EpUnavailable(RuntimeError):
    """The backend that was asked for cannot serve; the message says why."""


class EpGroupClosed(RuntimeError):
    """An `EpGroup` was used after `close()`."""
