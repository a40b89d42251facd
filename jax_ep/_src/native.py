# SPDX-License-Identifier: Apache-2.0
"""The compiled module: loaded, and its FFI targets registered with JAX, when first needed."""

import functools
import importlib
import threading
from types import ModuleType

import jax

from jax_ep._src.errors import EpUnavailable

_lock = threading.Lock()
_registered = False


@functools.cache
def _try_load() -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module("jax_ep._ext"), None
    except ImportError as e:
        return None, (
            f"the compiled module jax_ep._ext does not load ({e}); if this is the source tree, "
            "install the package (pip install .) and import it from elsewhere"
        )


def why_unavailable() -> str | None:
    """Why the compiled module cannot be used; None if it can."""
    return _try_load()[1]


def load() -> ModuleType:
    """The compiled module.

    Raises:
        EpUnavailable: it is not there or does not load.
    """
    module, why_not = _try_load()
    if module is None:
        raise EpUnavailable(why_not)
    return module


def register_targets() -> None:
    """Registers the FFI targets with JAX, once in a process."""
    global _registered
    with _lock:
        if _registered:
            return
        for name, stages in load().cpu_targets().items():
            jax.ffi.register_ffi_target(name, stages, platform="cpu")
        _registered = True
