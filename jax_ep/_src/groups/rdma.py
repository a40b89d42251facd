# SPDX-License-Identifier: Apache-2.0
"""RDMA for groups that span hosts: NVSHMEM, its library of kernels, and the job of all processes.

NVSHMEM has no deadlines, and reports success after some failures; to initialize it, to allocate and
to give back takes all processes. So all that can be known before is asked before, through the
coordination service; each such call is made by a thread that is given up when its time is over, or
when another process says that it has failed; and after a failure no process makes another one.
"""

import atexit
import ctypes
import ctypes.util
import importlib.util
import logging
import os
import pathlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

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
    device: int  # of this process
    bootstrap: Bootstrap


# Held while a group is made or closed: all processes must ask NVSHMEM for the same in one order.
LOCK = threading.RLock()
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
    named = os.environ.get(LIBRARY_VARIABLE)
    if library_path() is None and named:
        return f"{LIBRARY_VARIABLE} is {named!r}, and there is no such file"
    if library_path() is None:
        return (
            "this installation was built without RDMA: install again where nvcc is, with "
            "JAX_EP_NVSHMEM=ON pip install ."
        )
    # A library that JAX_EP_RDMA_LIBRARY names may bring what it is linked with.
    if host_library_path() is None and named is None:
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


def join(boot: Bootstrap, process: int, network_bytes: int, device: int) -> dict[int, int]:
    """Makes this process one of the job's, with all others of the mesh; the number of each in it.

    Args:
        boot: between the processes.
        process: the index of this one.
        network_bytes: of the network heap that the group will ask for.
        device: ordinal of this process's GPU.

    Raises:
        EpUnavailable: it cannot be; the message says why.
    """
    global _job
    # NVSHMEM reads them at its first call, and its memory is symmetric only if all processes have
    # the same.
    settings = _set_up_environment(network_bytes)
    module = _load()
    built, loaded = module.rdma_versions()
    if loaded[0] != built[0] or loaded < built:
        raise EpUnavailable(
            f"NVSHMEM {_text(loaded)} is loaded ({host_library_path()}), and the kernels were "
            f"built with {_text(built)}: needed is that or a newer {built[0]}"
        )
    if _job is not None and _job.device != device:
        raise EpUnavailable(
            f"NVSHMEM has been initialized on GPU {_job.device} of process {process}, and this "
            f"group is on GPU {device}: all that span hosts must be on one GPU of each process"
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
        job_id = bytes.fromhex(next(m["id"] for m in messages.values() if "id" in m))
        pe = processes.index(process)

        def initialize() -> None:
            module.rdma_initialize(job_id, pe=pe, num_pes=len(processes), device=device)

        together(boot, "initialize NVSHMEM", "rdma_up", initialize)
        together(
            boot,
            "allocate by NVSHMEM",
            "rdma_anchor",
            lambda: module.rdma_set_anchor(device=device),
        )
        _job = _Job(processes, device, boot)
    return {index: pe for pe, index in enumerate(processes)}


def allocate(boot: Bootstrap, group_id: int) -> None:
    """Allocates a group's network heap, with all processes.

    Raises:
        EpUnavailable: it does not fit, or a process failed; then RDMA cannot be used any more.
    """
    place = together(
        boot, "allocate by NVSHMEM", "network_heap",
        lambda: native.load_cuda().allocate_network_heap(group_id),
    )  # fmt: skip
    for process, message in sorted(boot.gather("network_place", {"place": place}).items()):
        if message["place"] != place:
            _give_up(f"process {process} has another place for its network heap")


def release(boot: Bootstrap, group_id: int, timeout: float, why_not: str | None) -> None:
    """Gives a group's network heap back, if all processes can; else it stays, for good."""
    if boot.end_together("network_released", timeout, why_not or _why_unusable):
        native.load_cuda().release_network_heap(group_id)
    else:
        _note_unusable("a group that spanned hosts was not closed in all processes")


def together(boot: Bootstrap, what: str, phase: str, call: Callable[[], Any]) -> Any:
    """Makes a call that takes all processes; what it returns, when all have made it.

    Raises:
        EpUnavailable: it failed here or elsewhere, or took longer than the deadline. This process
            makes no such call any more.
    """
    outcome: list[tuple[Any, str | None]] = []

    def run() -> None:
        try:
            outcome.append((call(), None))
        except Exception as e:  # noqa: BLE001 - it is told below, whatever it is
            outcome.append((None, str(e)))

    thread = threading.Thread(target=run, name=f"jax_ep: {what}", daemon=True)
    thread.start()
    end = time.monotonic() + boot.timeout
    failure = None
    try:
        while thread.is_alive() and failure is None:
            thread.join(min(0.25, max(end - time.monotonic(), 0.01)))
            if thread.is_alive() and time.monotonic() > end:
                failure = (
                    f"this process could not {what} within {boot.timeout:g} s: one that has failed "
                    "in it leaves the others waiting"
                )
            elif thread.is_alive():
                failure = boot.failure(phase)
    except BaseException:
        _note_unusable(f"it was interrupted as it was to {what}")
        raise
    result, failed = outcome[0] if outcome else (None, failure)
    try:
        if failed is not None:
            raise EpUnavailable(failed)
        boot.gather(phase, {})
    except EpUnavailable as e:
        with_reason = str(e)
        boot.tell_failure(phase, with_reason)
        _give_up(with_reason)
    return result


def _give_up(reason: str) -> NoReturn:
    _note_unusable(reason)
    raise EpUnavailable(reason)


def _note_unusable(reason: str) -> None:
    global _why_unusable
    if _why_unusable is None:
        _why_unusable = f"RDMA failed in this process, which cannot try again: {reason}"


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
        settings, here = message["settings"], own["settings"]
        for name in sorted({*settings, *here}):
            if settings.get(name) != here.get(name):
                raise EpUnavailable(
                    f"process {process} has {name}={settings.get(name)}; here it is "
                    f"{here.get(name)}: all processes must have the same"
                )
        joined = message["joined"]
        if joined is not None and joined != list(processes):
            raise EpUnavailable(
                f"process {process} is in a job of NVSHMEM with the processes "
                f"{', '.join(map(str, joined))}: all groups that span hosts must have those"
            )
    if len({message["joined"] is None for message in messages.values()}) > 1:
        raise EpUnavailable("some processes have initialized NVSHMEM before and others have not")


def _set_up_environment(network_bytes: int) -> dict[str, str]:
    """Sets variables of NVSHMEM's, but for those that the user has set; what they are then."""
    room = -(-network_bytes // _UNIT) * _UNIT + _UNIT  # and for what the library needs itself
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
        if not job.bootstrap.end_together("gone", _EXIT_S, _why_unusable):
            return
    except (EpUnavailable, jax.errors.JaxRuntimeError):
        _logger.exception("NVSHMEM was not finalized as this process ends")
        return
    thread = threading.Thread(
        target=_finalize, args=(job,), name="jax_ep: finalize NVSHMEM", daemon=True
    )
    thread.start()
    thread.join(_EXIT_S)
    if thread.is_alive():  # for a process that has died since
        _logger.error(
            "NVSHMEM was not finalized within %g s as this process ends, which ends without it",
            _EXIT_S,
        )


def _finalize(job: _Job) -> None:
    try:
        native.load_cuda().rdma_finalize(device=job.device)
    except RuntimeError:
        _logger.exception("NVSHMEM was not finalized as this process ends")
