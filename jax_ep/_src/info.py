# SPDX-License-Identifier: Apache-2.0
"""`python -m jax_ep info`: what is here, what works with it, and what is missing for what."""

import importlib.metadata
import os
import pathlib
import platform
from collections.abc import Iterable

import jax

from jax_ep._src.groups import gpu_architectures, native, rdma

Row = tuple[str, str, str]  # what, its state, what is missing or what it is for


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _versions() -> list[Row]:
    rows = [("Python", platform.python_version(), "")]
    needs = {
        "jax-ep": "",
        "jax": "",
        "jaxlib": "",
        "flax": "pip install 'jax-ep[flax]', for jax_ep.flax",
        "optax": "pip install 'jax-ep[examples]', for examples/train_moe_lm.py",
        "orbax-checkpoint": "pip install 'jax-ep[examples]', for examples/train_moe_lm.py",
    }
    for package, hint in needs.items():
        version = _version(package)
        rows.append((package, version or "not installed", "" if version else hint))
    return rows


def _devices() -> list[Row]:
    kinds: dict[tuple[str, str], int] = {}
    for device in jax.devices():
        kind = device.device_kind
        if capability := getattr(device, "compute_capability", None):
            kind = f"{kind}, compute capability {capability}"
        key = (device.platform, kind)
        kinds[key] = kinds.get(key, 0) + 1
    rows: list[Row] = [
        (f"devices ({name})", f"{count} x {kind}", "") for (name, kind), count in kinds.items()
    ]
    rows.append(("processes", str(jax.process_count()), ""))
    cores = f"{os.cpu_count()} CPU cores"
    if hasattr(os, "sched_getaffinity"):
        cores += f", {len(os.sched_getaffinity(0))} of them for this process"
    rows.append(("host", f"{platform.machine()}, {cores}", ""))
    if set(kinds) and all(name == "cpu" for name, _ in kinds) and len(jax.devices()) == 1:
        hint = "XLA_FLAGS=--xla_force_host_platform_device_count=8 shows several CPU devices"
        rows.append(("ranks", "1", hint))
    return rows


def _backends() -> list[Row]:
    why_not = native.why_unavailable()
    if why_not is None:
        major, minor = native.load().ffi_api_version
        ffi = ("ffi on CPU", f"available (XLA FFI {major}.{minor})", "")
    else:
        ffi = ("ffi on CPU", "not available", why_not)
    rows = [ffi, _cuda(), ("xla", "available", "collectives of XLA, on every platform")]
    if jax.process_count() > 1:
        note = "on CPU it serves the devices of one process"
        rows.append(("ffi on CPU", "not for meshes of several processes", note))
    return rows


def _gpus() -> list[jax.Device]:
    return [device for device in jax.local_devices() if device.platform in ("gpu", "cuda")]


def _cuda() -> Row:
    why_not = native.why_no_cuda()
    if why_not is not None:
        return ("ffi on CUDA", "not available", why_not)
    build = native.load_cuda().build_info()
    version = f"{build['cuda_runtime'] // 1000}.{build['cuda_runtime'] % 1000 // 10}"
    note = f"CUDA {version}, kernels for {', '.join(gpu_architectures.architectures())}"
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
    direct = pathlib.Path("/sys/module/nvidia_peermem").is_dir()
    note = "" if direct else "module nvidia_peermem, or DMA-BUF, lets NICs read GPUs' memory"
    rows.append(("GPUDirect RDMA", "nvidia_peermem" if direct else "no nvidia_peermem", note))
    return rows


def _table(rows: Iterable[Row]) -> str:
    rows = [("what", "here", "missing for / note"), *rows]
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    lines = [f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c}".rstrip() for a, b, c in rows]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def report() -> str:
    """The table that `python -m jax_ep info` prints. Starts JAX's backends."""
    rows = [*_versions(), *_devices(), *_backends(), _peer_access(), *_rdma()]
    return _table(rows)
