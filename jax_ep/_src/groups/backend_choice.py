# SPDX-License-Identifier: Apache-2.0
"""Which backend serves a group: this library's kernels for the platform, or XLA's collectives."""

import functools
import logging
from collections.abc import Callable
from typing import Literal

from jax_ep._src.errors import EpUnavailable
from jax_ep._src.groups import cpu, cuda
from jax_ep._src.groups.interface import BackendGroup, GroupParameters, Offer
from jax_ep._src.groups.placements import has_local_devices
from jax_ep._src.groups.xla import XlaGroup

Backend = Literal["ffi", "xla"]

_logger = logging.getLogger("jax_ep")

# By platform, the kernels of this library.
_PLATFORMS = {"cpu": cpu, "cuda": cuda}


def choose_backend(
    asked: Backend | None, platform: str, parameters: GroupParameters
) -> tuple[Backend, Callable[[str], BackendGroup]]:
    """The backend that serves a group, and what makes what it keeps for a group of a name."""
    make_xla = functools.partial(XlaGroup, parameters=parameters)
    if asked == "xla":
        return "xla", make_xla
    offer = _offer(platform, parameters)
    # Collectives of XLA survive no missing rank: who wants that is not given them unasked.
    if offer.why_not is not None and (asked == "ffi" or parameters.on_timeout == "mask"):
        raise EpUnavailable(f"backend 'ffi' cannot serve this group: {offer.why_not}")
    backend: Backend = "ffi" if offer.why_not is None else "xla"
    _log_choice_once(backend, offer.why_not)
    return backend, offer.make if offer.why_not is None else make_xla


def _offer(platform: str, parameters: GroupParameters) -> Offer:
    """Whether the `ffi` backend can serve a mesh."""
    module = _PLATFORMS.get(platform)
    if module is None:
        return Offer.refusal(f"it has no kernels for platform {platform}")
    if not has_local_devices(parameters.mesh):
        return Offer.refusal("no device of the mesh belongs to this process")
    return module.offer(parameters)


_logged: set[tuple[str, str | None]] = set()


def _log_choice_once(backend: str, why_not: str | None) -> None:
    if (backend, why_not) in _logged:
        return
    _logged.add((backend, why_not))
    if why_not is None:
        _logger.info("EP backend: ffi")
    else:
        _logger.warning("EP backend: xla, because ffi cannot serve: %s", why_not)
