# SPDX-License-Identifier: Apache-2.0
"""Which GPUs the compiled kernels run on, from what they were built for."""

import re
from collections.abc import Iterable

import jax

from jax_ep._src.groups import native

Capability = tuple[int, int]  # major, minor

# Of the bulk copies and of what the kernels do at the scope of a cluster or the system.
_MIN_CAPABILITY: Capability = (9, 0)
# KiB of shared memory that a block can have at most, by major number, where that is little. All
# others from 9.0 on have 227.
_SHARED_KIB = {12: 99}

_ARCHITECTURE = re.compile(r"(\d+)(\d)([af]?)(-real|-virtual)?")


def serves(architecture: str, capability: Capability) -> bool:
    """Whether what was compiled for an architecture runs on GPUs of a compute capability.

    Args:
        architecture: as CMake names them, such as "90-real" (machine code) or "90-virtual" (PTX).
            Without either ending it is both. Of other names, such as "native", whoever built it
            knows what they mean: they serve all.
        capability: major and minor number.
    """
    found = _ARCHITECTURE.fullmatch(architecture)
    if found is None:
        return True
    major, minor, kind, code = int(found[1]), int(found[2]), found[3], found[4]
    if kind == "a":  # machine code or PTX, it is for this one alone
        return capability == (major, minor)
    if capability < (major, minor):
        return False
    # Machine code runs on later ones of the same major number, and so does PTX of a family.
    return capability[0] == major or (code != "-real" and kind != "f")


def _parsed(capability: object) -> Capability | None:
    found = re.fullmatch(r"(\d+)\.(\d+)", str(capability))
    return (int(found[1]), int(found[2])) if found else None


def architectures() -> list[str]:
    """What the kernels of the compiled module were built for; the module must be there."""
    return re.findall(r"[\w-]+", native.load_cuda().build_info()["architectures"])


def why_not_built_for(devices: Iterable[jax.Device]) -> str | None:
    """Why the kernels do not run on one of these devices; None if they run on all.

    Asks no GPU, and says the same in all processes that have the same build.
    """
    kinds = {
        (str(d.device_kind), str(d.compute_capability))
        for d in devices
        if hasattr(d, "compute_capability")
    }
    for kind, capability in sorted(kinds):
        if reason := _why_not(_parsed(capability)):
            return f"on {kind} (compute capability {capability}) {reason}"
    return None


def _why_not(capability: Capability | None) -> str | None:
    if capability is None:
        return "there are no kernels: they are for NVIDIA GPUs"
    if capability < _MIN_CAPABILITY:
        return (
            f"the kernels cannot run: they need {_MIN_CAPABILITY[0]}.{_MIN_CAPABILITY[1]} or newer"
        )
    needed = native.load_cuda().build_info()["shared_memory"] / 1024
    max_kib = _SHARED_KIB.get(capability[0], needed)
    if max_kib < needed:
        return (
            f"the kernels cannot run: a block has at most {max_kib} KiB of shared memory there, "
            f"and they need {needed:.0f}"
        )
    built = architectures()
    if any(serves(architecture, capability) for architecture in built):
        return None
    architecture = f"{capability[0]}{capability[1]}-real"
    return (
        f"the kernels do not run, which were built for {', '.join(built)}: install again with "
        f"pip install . -C cmake.define.JAX_EP_CUDA_ARCHS={architecture}"
    )
