# SPDX-License-Identifier: Apache-2.0
"""The compiled modules: loaded, and their FFI targets registered with JAX, when first needed."""

import functools
import importlib
import pathlib
import re
import threading
from types import ModuleType

import jax

from jax_ep._src.errors import EpUnavailable

_lock = threading.Lock()
_registered: set[str] = set()  # platforms


@functools.cache
def _try_load() -> tuple[ModuleType | None, str | None]:
    try:
        module = importlib.import_module("jax_ep._ext")
    except ImportError as e:
        return None, _why_not_in_source_tree(e) or (
            f"the compiled module jax_ep._ext does not load ({e}); install jax_ep again, for this "
            "Python and this machine"
        )
    return _unless_refused("_ext", module)


@functools.cache
def _try_load_cuda() -> tuple[ModuleType | None, str | None]:
    try:
        module = importlib.import_module("jax_ep._cuda")
    except ModuleNotFoundError:
        # Where not even the module for CPU is, nothing was built, with CUDA or without.
        if "source tree" in (why_not := _try_load()[1] or ""):
            return None, why_not
        return None, (
            "this installation was built without CUDA: install again where nvcc is, with "
            "JAX_EP_CUDA=ON pip install ., which fails if it finds no nvcc, or with "
            "JAX_EP_CUDA=PYPI pip install ., which brings NVIDIA's compiler"
        )
    except ImportError as e:
        return None, f"the compiled module jax_ep._cuda does not load ({e})"
    return _unless_refused("_cuda", module)


def _why_not_in_source_tree(error: ImportError) -> str | None:
    """What to do where Python imports a checkout in which nothing was built; else None."""
    root = pathlib.Path(__file__).absolute().parents[3]
    if isinstance(error, ModuleNotFoundError) and (root / "CMakeLists.txt").exists():
        return (
            "jax_ep is imported from its source tree, which has no compiled module jax_ep._ext: "
            "run `pip install -e .` there, or import an installed jax_ep from another folder"
        )
    return None


def _unless_refused(name: str, module: ModuleType) -> tuple[ModuleType | None, str | None]:
    """The module, unless the installed XLA would refuse it and, with it, its whole backend."""
    built_on, found = module.ffi_api_version, _jaxlib_ffi_version()
    # XLA loads what was built on its own version, or on an older one of the same major version.
    if found is None or (built_on[0] == found[0] and built_on[1] <= found[1]):
        return module, None
    if built_on[0] == found[0]:
        what_to_do = "install a newer jax (pip install -U jax), or build jax_ep again on this one"
    else:
        what_to_do = "install a jax_ep that was built for this jax, or an older jax"
    return None, (
        f"jaxlib {jax.lib.__version__} cannot load the compiled module jax_ep.{name}, which was "
        f"built on version {built_on[0]}.{built_on[1]} of XLA's FFI: it has {found[0]}.{found[1]}, "
        f"and loads what was built on that or an older {found[0]}.x; {what_to_do}"
    )


def _jaxlib_ffi_version() -> tuple[int, int] | None:
    """The version of XLA's FFI in jaxlib, by its headers; None where it comes without them."""
    header = pathlib.Path(jax.ffi.include_dir(), "xla", "ffi", "api", "c_api.h")
    try:
        text = header.read_text()
    except OSError:
        return None
    found = dict(re.findall(r"^#define XLA_FFI_API_(MAJOR|MINOR) (\d+)$", text, re.MULTILINE))
    return (int(found["MAJOR"]), int(found["MINOR"])) if len(found) == 2 else None


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
