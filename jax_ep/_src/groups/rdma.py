# SPDX-License-Identifier: Apache-2.0
"""RDMA for groups that span hosts: NVSHMEM, its library of kernels, and the job of all processes.

NVSHMEM has no deadlines where it is initialized, and reports success after some failures. So all
that can be known before is asked before, through the coordination service, and the call itself is
made by a thread that is given up when its time is over.
"""

import atexit
import ctypes
import ctypes.util
import importlib.util
import logging
import os
import pathlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from jax_ep._src.errors import EpUnavailable
from jax_ep._src.groups import native
from jax_ep._src.groups.bootstrap import Bootstrap
from jax_ep._src.groups.placements import Placement

_logger = logging.getLogger("jax_ep")

LIBRARY_VARIABLE = "JAX_EP_RDMA_LIBRARY"
_HOST_LIBRARY = "libnvshmem_host.so.3"
_EXIT_S = 10.0
_UNIT = 512 << 20  # of NVSHMEM_SYMMETRIC_SIZE
_DEFAULT_SYMMETRIC_SIZE = 1 << 30  # NVSHMEM's own

# What the library is to do if the user says nothing else: there is no NVLink multicast in what we
# use, and no team but the world.
_SETTINGS = {"NVSHMEM_DISABLE_NVLS": "1", "NVSHMEM_MAX_TEAMS": "7"}


class _Job(NamedTuple):
    """The processes that have initialized NVSHMEM together; one in a process's life."""

    processes: tuple[int, ...]
    bootstrap: Bootstrap


_lock = threading.Lock()
_job: _Job | None = None
_why_unusable: str | None = None  # after a failure that cannot be taken back


def library_path() -> pathlib.Path | None:
    """Where libjax_ep_rdma.so is: beside the package, or where JAX_EP_RDMA_LIBRARY says."""
    named = os.environ.get(LIBRARY_VARIABLE)
    path = pathlib.Path(named or pathlib.Path(__file__).parents[2] / "libjax_ep_rdma.so")
    return path if path.is_file() else None


def host_library_path() -> str | None:
    """Where NVSHMEM's library for the host is; None if it is not found."""
    for folder in _folders():
        if (folder / _HOST_LIBRARY).is_file():
            return str(folder / _HOST_LIBRARY)
    return _HOST_LIBRARY if ctypes.util.find_library("nvshmem_host") else None


def _folders() -> Iterator[pathlib.Path]:
    if home := os.environ.get("NVSHMEM_HOME"):
        yield pathlib.Path(home) / "lib"
    wheels = importlib.util.find_spec("nvidia")
    for folder in (wheels.submodule_search_locations if wheels else None) or ():
        yield pathlib.Path(folder) / "nvshmem" / "lib"


def why_unavailable() -> str | None:
    """Why this process cannot use RDMA; None if nothing speaks against it so far. Loads nothing."""
    if _why_unusable is not None:
        return _why_unusable
    if library_path() is None:
        return (
            "this installation was built without RDMA: install again where nvcc is, with "
            "JAX_EP_NVSHMEM=ON pip install ."
        )
    # A library that JAX_EP_RDMA_LIBRARY names may bring what it is linked with.
    if host_library_path() is None and LIBRARY_VARIABLE not in os.environ:
        return "NVSHMEM is not found: pip install 'jax-ep[rdma]', or set NVSHMEM_HOME"
    return None


def why_not_one_gpu_each(ranks: Sequence[Placement], num_processes: int) -> str | None:
    """Why the processes of a mesh cannot be a job; None if they can.

    Args:
        ranks: those of all of the mesh's groups.
        num_processes: how many there are, also outside of the mesh.
    """
    devices: dict[int, int] = {}
    for rank in ranks:
        devices[rank.process] = devices.get(rank.process, 0) + 1
    for process, count in sorted(devices.items()):
        if count > 1:
            return (
                f"process {process} drives {count} GPUs, and RDMA needs one process for each: "
                "start one process per GPU (SLURM: --ntasks-per-node=8, or "
                "jax.distributed.initialize(local_device_ids=[i])), or choose axes inside a host"
            )
    missing = sorted(set(range(num_processes)) - set(devices))
    if missing:
        return (
            f"process(es) {', '.join(map(str, missing))} have no device of its mesh, and all "
            "processes must take part in a group that spans hosts"
        )
    return None


def join(boot: Bootstrap, process: int, heap_bytes: int, device: int) -> dict[int, int]:
    """Makes this process one of the job's, with all others of the mesh; the number of each in it.

    Args:
        boot: between the processes.
        process: the index of this one.
        heap_bytes: that the group will ask for.
        device: ordinal of this process's GPU.

    Raises:
        EpUnavailable: it cannot be; the message says why.
    """
    global _job
    with _lock:
        # NVSHMEM reads them at its first call, and its memory is symmetric only if all processes
        # have the same.
        settings = _set_up_environment(heap_bytes)
        module = _load()
        built, loaded = module.rdma_versions()
        if loaded[0] != built[0] or loaded < built:
            raise EpUnavailable(
                f"NVSHMEM {_text(loaded)} is loaded ({host_library_path()}), and the kernels were "
                f"built with {_text(built)}: needed is that or a newer {built[0]}"
            )
        own = {
            "version": _text(loaded),
            "settings": settings,
            "joined": list(_job.processes) if _job else None,
        }
        if boot.is_leader and _job is None:
            try:
                own["id"] = module.rdma_make_id().hex()
            except RuntimeError as e:
                raise EpUnavailable(str(e)) from e
        messages = boot.gather("rdma", own)
        processes = tuple(sorted(messages))
        _check_same(messages, own, processes)
        if _job is None:
            _initialize(module, boot, messages, process, device)
            _job = _Job(processes, boot)
        return {index: pe for pe, index in enumerate(processes)}


def _load() -> Any:
    """The compiled module, with the library for RDMA."""
    module = native.load_cuda()
    host_library = host_library_path()
    try:
        if host_library is not None:
            # Known by its soname from here on, so that the library finds it.
            ctypes.CDLL(host_library)
        module.load_rdma(str(library_path()))
    except (OSError, RuntimeError) as e:
        raise EpUnavailable(f"RDMA cannot be used: {e}") from e
    return module


def _text(version: Sequence[int]) -> str:
    return ".".join(map(str, version))


def _check_same(
    messages: Mapping[int, Mapping[str, Any]], own: Mapping[str, Any], processes: Sequence[int]
) -> None:
    for process, message in sorted(messages.items()):
        if message["version"] != own["version"]:
            raise EpUnavailable(
                f"process {process} has NVSHMEM {message['version']}; here it is {own['version']}: "
                "all processes must have the same"
            )
        for name, value in own["settings"].items():
            if message["settings"].get(name) != value:
                raise EpUnavailable(
                    f"process {process} has {name}={message['settings'].get(name)}; here it is "
                    f"{value}: all processes must have the same"
                )
        joined = message["joined"]
        if joined is not None and joined != list(processes):
            raise EpUnavailable(
                f"process {process} is in a job of NVSHMEM with the processes "
                f"{', '.join(map(str, joined))}: all groups that span hosts must have those"
            )
    if len({message["joined"] is None for message in messages.values()}) > 1:
        raise EpUnavailable("some processes have initialized NVSHMEM before and others have not")


def _initialize(
    module: Any,
    boot: Bootstrap,
    messages: Mapping[int, Mapping[str, Any]],
    process: int,
    device: int,
) -> None:
    """Raises EpUnavailable if it fails in any process, or takes longer than the deadline."""
    global _why_unusable
    job_id = bytes.fromhex(next(m["id"] for m in messages.values() if "id" in m))
    pe = sorted(messages).index(process)
    outcome: list[str | None] = []

    def initialize() -> None:
        try:
            module.rdma_initialize(job_id, pe=pe, num_pes=len(messages), device=device)
            outcome.append(None)
        except Exception as e:  # noqa: BLE001 - it is told below, whatever it is
            outcome.append(str(e))

    thread = threading.Thread(target=initialize, name="jax_ep NVSHMEM", daemon=True)
    thread.start()
    thread.join(boot.timeout)
    failure = (
        outcome[0]
        if outcome
        else f"NVSHMEM was not initialized within {boot.timeout:g} s: a process that has failed "
        "in it leaves the others waiting"
    )
    if failure is not None:
        _why_unusable = f"RDMA failed in this process, which cannot try again: {failure}"
        raise EpUnavailable(failure)


def _set_up_environment(heap_bytes: int) -> dict[str, str]:
    """Sets variables of NVSHMEM's, but for those that the user has set; what they are then."""
    room = -(-heap_bytes // _UNIT) * _UNIT + _UNIT  # and for what the library needs itself
    settings = {**_SETTINGS, "NVSHMEM_SYMMETRIC_SIZE": str(max(room, _DEFAULT_SYMMETRIC_SIZE))}
    if why_no_gpu_initiated() is None:
        settings["NVSHMEM_IB_ENABLE_IBGDA"] = "1"
    return {name: os.environ.setdefault(name, value) for name, value in settings.items()}


def nics() -> list[str]:
    """Names of this host's InfiniBand and RoCE devices."""
    folder = pathlib.Path("/sys/class/infiniband")
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def why_no_gpu_initiated() -> str | None:
    """Why GPUs cannot hand work to the NICs themselves (IBGDA); None if they can."""
    if not any(name.startswith("mlx5") for name in nics()):
        return "no NIC of NVIDIA's (mlx5)"
    try:
        parameters = pathlib.Path("/proc/driver/nvidia/params").read_text()
    except OSError:
        return "no parameters of NVIDIA's driver"
    for key in ("PeerMappingOverride=1", "EnableStreamMemOPs: 1"):
        if key not in parameters:
            return f"the driver is not loaded with {key.replace(': ', '=')}"
    return None


@atexit.register
def _leave() -> None:
    """Leaves the job, if all others do; else it ends with this process."""
    job = _job
    if job is None:
        return
    try:
        if not job.bootstrap.leave("gone", _EXIT_S):
            native.load_cuda().rdma_finalize()
    except (EpUnavailable, RuntimeError, jax.errors.JaxRuntimeError):
        _logger.exception("NVSHMEM was not finalized as this process ends")
