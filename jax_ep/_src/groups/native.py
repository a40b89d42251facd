# SPDX-License-Identifier: Apache-2.0
"""The compiled modules: loaded, and their FFI targets registered with JAX, when first needed."""

import functools
import importlib
import threading
from types import ModuleType

import jax

from jax_ep._src.errors import EpUnavailable

_lock = threading.Lock()
_registered: set[str] = set()  # platforms


@functools.cache
def _try_load() -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module("jax_ep._ext"), None
    except ImportError as e:
        return None, (
            f"the compiled module jax_ep._ext does not load ({e}); if this is the source tree, "
            "install the package (pip install .) and import it from elsewhere"
        )


@functools.cache
def _try_load_cuda() -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module("jax_ep._cuda"), None
    except ModuleNotFoundError:
        return None, (
            "this installation was built without CUDA: install again where nvcc is, with "
            "pip install . -C cmake.define.JAX_EP_CUDA=ON, which fails if it finds no nvcc"
        )
    except ImportError as e:
        return None, f"the compiled module jax_ep._cuda does not load ({e})"


def why_unavailable() -> str | None:
    """Why the compiled module for CPU cannot be used; None if it can."""
    return _try_load()[1]


def why_no_cuda() -> str | None:
    """Why the compiled module for CUDA cannot be used; None if it can."""
    return _try_load_cuda()[1]


def load() -> ModuleType:
    """The compiled module for CPU.

    Raises:
        EpUnavailable: it is not there or does not load.
    """
    return _or_raise(*_try_load())


def load_cuda() -> ModuleType:
    """The compiled module for CUDA.

    Raises:
        EpUnavailable: it is not there or does not load.
    """
    return _or_raise(*_try_load_cuda())


def _or_raise(module: ModuleType | None, why_not: str | None) -> ModuleType:
    if module is None:
        raise EpUnavailable(why_not)
    return module


def register_targets() -> None:
    """Registers the FFI targets for CPU with JAX, once in a process."""
    with _lock:
        if "cpu" not in _registered:
            for name, stages in load().cpu_targets().items():
                jax.ffi.register_ffi_target(name, stages, platform="cpu")
            _registered.add("cpu")


def register_cuda_targets() -> None:
    """Registers the FFI targets for CUDA with JAX, once in a process."""
    with _lock:
        if "cuda" not in _registered:
            for name, stages in load_cuda().cuda_targets().items():
                jax.ffi.register_ffi_target(name, stages, platform="CUDA")
            _registered.add("cuda")
