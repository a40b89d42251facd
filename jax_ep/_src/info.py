# SPDX-License-Identifier: Apache-2.0
"""`python -m jax_ep info`: what is here, what works with it, and what is missing for what."""

import importlib.metadata
import os
import pathlib
import platform
import re
import textwrap
from collections.abc import Iterable
from types import ModuleType
from typing import Any

import jax

from jax_ep._src import version
from jax_ep._src.groups import gpu_architectures, native, rdma
from jax_ep._src.tuning import files

Row = tuple[str, str, str]  # what, its state, what is missing or what it is for

_REQUIRED = ("jax", "jaxlib", "ml_dtypes", "numpy")
_OPTIONAL = ("flax", "optax", "orbax-checkpoint", "nvidia-nvshmem-cu13", "jax-cuda13-plugin")
# Of the environment, what decides how JAX and jax_ep run.
_VARIABLES = re.compile(r"(JAX|XLA|JAX_EP|NVSHMEM)_\w+|CUDA_VISIBLE_DEVICES|LD_LIBRARY_PATH")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _versions() -> list[Row]:
    rows = [("jax-ep", version.full_version(), ""), ("Python", platform.python_version(), "")]
    needs = {
        "jax": "",
        "jaxlib": "",
        "flax": "pip install 'jax-ep[flax]', for jax_ep.flax",
        "optax": "pip install 'jax-ep[examples]', for examples/train_moe_lm.py",
        "orbax-checkpoint": "pip install 'jax-ep[examples]', for examples/train_moe_lm.py",
    }
    for package, hint in needs.items():
        found = _version(package)
        rows.append((package, found or "not installed", "" if found else hint))
    return rows


def _why_no_devices() -> str | None:
    """What JAX says where it cannot start; None where it has devices."""
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter is without any message
        platforms = f"JAX does not start (JAX_PLATFORMS is {os.environ.get('JAX_PLATFORMS')!r})"
        return f"{platforms}: {' '.join(str(error).split()) or type(error).__name__}"
    return None


def _kinds() -> dict[tuple[str, str, str | None], int]:
    """How many devices there are of a platform, kind and compute capability."""
    kinds: dict[tuple[str, str, str | None], int] = {}
    for device in jax.devices():
        capability = getattr(device, "compute_capability", None)
        key = (device.platform, device.device_kind, capability and str(capability))
        kinds[key] = kinds.get(key, 0) + 1
    return kinds


def _num_processes() -> int:
    return 1 if _why_no_devices() else jax.process_count()


def _devices() -> list[Row]:
    if why_not := _why_no_devices():
        return [("devices", "none", why_not)]
    kinds = _kinds()
    rows: list[Row] = []
    for (name, kind, capability), count in kinds.items():
        also = f", compute capability {capability}" if capability else ""
        rows.append((f"devices ({name})", f"{count} x {kind}{also}", ""))
    rows.append(("processes", str(jax.process_count()), ""))
    cores = f"{os.cpu_count()} CPU cores"
    if hasattr(os, "sched_getaffinity"):
        cores += f", {len(os.sched_getaffinity(0))} of them for this process"
    rows.append(("host", f"{platform.machine()}, {cores}", ""))
    if [(name, count) for (name, *_), count in kinds.items()] == [("cpu", 1)]:
        hint = "XLA_FLAGS=--xla_force_host_platform_device_count=8 shows several CPU devices"
        rows.append(("ranks", "1", hint))
    return rows


def _backends() -> list[Row]:
    why_not = native.why_unavailable()
    if why_not is None:
        ffi = ("ffi on CPU", f"available (XLA FFI {_ffi_version(native.load())})", "")
    else:
        ffi = ("ffi on CPU", "not available", why_not)
    rows = [ffi, _cuda(), ("xla", "available", "collectives of XLA, on every platform")]
    if _num_processes() > 1:
        note = "on CPU it serves the devices of one process"
        rows.append(("ffi on CPU", "not for meshes of several processes", note))
    return rows


def _ffi_version(module: ModuleType) -> str:
    return "{}.{}".format(*module.ffi_api_version)


def _cuda_version() -> str:
    """That which the kernels were compiled with."""
    number = native.load_cuda().build_info()["cuda_runtime"]
    return f"{number // 1000}.{number % 1000 // 10}"


def _gpus() -> list[jax.Device]:
    if _why_no_devices():
        return []
    return [device for device in jax.local_devices() if device.platform in ("gpu", "cuda")]


def _cuda() -> Row:
    why_not = native.why_no_cuda()
    if why_not is not None:
        return ("ffi on CUDA", "not available", why_not)
    note = f"CUDA {_cuda_version()}, kernels for {', '.join(gpu_architectures.architectures())}"
    if why_not := gpu_architectures.why_not_built_for(_gpus()):
        return ("ffi on CUDA", "not available", f"{why_not} ({note})")
    return ("ffi on CUDA", "available" if _gpus() else "built", note)


def _peer_access() -> Row:
    num_gpus = len(_gpus())
    if num_gpus < 2:
        return ("peer access", f"no ({num_gpus} GPUs here)", "scale-up needs two or more GPUs")
    note = "found out when a group is made, which fails where there is none"
    return ("peer access", f"not probed ({num_gpus} GPUs here)", note)


def _rdma() -> list[Row]:
    """What groups that span hosts need."""
    path, host_library = rdma.library_path(), rdma.host_library_path()
    rows: list[Row] = [
        ("RDMA", str(path), "for groups that span hosts")
        if path
        else ("RDMA", "not available", rdma.why_unavailable() or ""),
        ("NVSHMEM", _version("nvidia-nvshmem-cu13") or "found", host_library)
        if host_library
        else ("NVSHMEM", "not found", "pip install 'jax-ep[rdma]', for groups that span hosts"),
    ]
    if nics := rdma.nics():
        why_not = rdma.why_no_gpu_initiated()
        note = f"by the CPU: {why_not}" if why_not else "by GPUs (IBGDA)"
        rows.append(("RDMA NICs", ", ".join(nics), note))
    else:
        rows.append(("RDMA NICs", "none", "for groups that span hosts"))
    direct = _has_peermem()
    note = "" if direct else "module nvidia_peermem, or DMA-BUF, lets NICs read GPUs' memory"
    rows.append(("GPUDirect RDMA", "nvidia_peermem" if direct else "no nvidia_peermem", note))
    return rows


def _has_peermem() -> bool:
    return pathlib.Path("/sys/module/nvidia_peermem").is_dir()


def _tuning() -> list[Row]:
    """The tables that groups on the GPUs here look launches up in."""
    rows: list[Row] = []
    for device in sorted({device.device_kind for device in _gpus()}):
        tables = [(path, files.try_read(path)) for path in files.places(device)]
        found = [
            f"{len(table.entries)} launches in {path}"
            for path, table in tables
            if table is not None and table.device == device
        ]
        note = "" if found else f"`python -m jax_ep tune` measures {device}"
        rows.append(("tuning", "; ".join(found) or "no table", note))
    return rows


def _table(rows: Iterable[Row], width: int | None) -> str:
    """Three columns; two, with notes below what they are about, where a line is narrower."""
    rows = [("what", "here", "missing for / note"), *rows]
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    lines = [f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c}".rstrip() for a, b, c in rows]
    if width is not None and max(map(len, lines)) > width:
        room = max(width - widths[0] - 2, 20)
        lines = ["\n".join(_folded(row, widths[0], room)) for row in rows]
        return "\n".join([lines[0], "-" * min(width, widths[0] + 2 + room), *lines[1:]])
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def _folded(row: Row, indent: int, room: int) -> Iterable[str]:
    """The lines of a row, beside the column of names: its state, and below it its note."""
    name, state, note = row
    lines = textwrap.wrap(state, room, subsequent_indent="  ", break_on_hyphens=False)
    lines += textwrap.wrap(
        note, room, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False
    )
    for line in lines:
        yield f"{name:<{indent}}  {line}"
        name = ""


def report(width: int | None = None) -> str:
    """The table that `python -m jax_ep info` prints. Starts JAX's backends.

    Args:
        width: how many characters a line may have; None: as many as it takes.
    """
    rows = [*_versions(), *_devices(), *_backends(), _peer_access(), *_rdma(), *_tuning()]
    return _table(rows, width)


def facts() -> dict[str, Any]:
    """What `python -m jax_ep info --json` prints: the same for programs, and for bug reports.

    Starts JAX's backends. Of the environment it has the variables of JAX, XLA, jax_ep, NVSHMEM.
    """
    why_no_devices = _why_no_devices()
    kinds = {} if why_no_devices else _kinds()
    return {
        "jax_ep": {
            "version": version.version(),
            "commit": version.commit(),
            "path": str(pathlib.Path(__file__).parents[1]),
        },
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_cores": os.cpu_count(),
        "packages": {name: _version(name) for name in (*_REQUIRED, *_OPTIONAL)},
        "devices": [
            {"platform": name, "kind": kind, "compute_capability": capability, "count": count}
            for (name, kind, capability), count in kinds.items()
        ],
        "why_no_devices": why_no_devices,
        "processes": _num_processes(),
        "modules": {"cpu": _cpu_module(), "cuda": _cuda_module()},
        "transports": _transports(),
        "tuning": [[state, note] for _, state, note in _tuning()],
        "environment": {
            name: value for name, value in sorted(os.environ.items()) if _VARIABLES.fullmatch(name)
        },
    }


def _cpu_module() -> dict[str, Any]:
    why_not = native.why_unavailable()
    return {
        "why_not": why_not,
        "ffi_version": _ffi_version(native.load()) if why_not is None else None,
    }


def _cuda_module() -> dict[str, Any]:
    why_not = native.why_no_cuda()
    if why_not is not None:
        return {"why_not": why_not, "ffi_version": None, "cuda": None, "architectures": []}
    return {
        "why_not": gpu_architectures.why_not_built_for(_gpus()),
        "ffi_version": _ffi_version(native.load_cuda()),
        "cuda": _cuda_version(),
        "architectures": gpu_architectures.architectures(),
    }


def _transports() -> dict[str, Any]:
    """What groups send through: GPUs' memory on one host, NVSHMEM between hosts."""
    library = rdma.library_path()
    return {
        "gpus_of_this_process": len(_gpus()),
        "rdma": {
            "why_not": rdma.why_unavailable(),
            "library": str(library) if library else None,
            "nvshmem": rdma.host_library_path(),
            "nics": rdma.nics(),
            "why_not_gpu_initiated": rdma.why_no_gpu_initiated(),
            "nvidia_peermem": _has_peermem(),
        },
    }
