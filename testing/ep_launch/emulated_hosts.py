# SPDX-License-Identifier: Apache-2.0
"""Hosts in name alone, which NVSHMEM's own network joins on a machine that has no NIC.

A process in a UTS namespace of its own (`unshare --uts`) says another host's name, and NVSHMEM then
reaches it through its transport for networks: here UCX, over TCP. Nothing here is fast: it shows
that what goes over a network arrives. What else it takes:

* The transport stores signals by way of GDRCopy, which needs a module of the kernel's; with
  NVSHMEM's heap in host memory a stand-in does.
* That heap's name has to be another one on every such host.
* Where ranks share a GPU, the first of each host asks the control program of MPS for its servers,
  and what it does next depends on the answer, which all must have alike (NVSHMEM 3.4.5). But of two
  that ask at once, one is told that there is no daemon: then processes pair calls that do not
  belong together, and stand still or crash in `nvshmemx_init_attr`. So they ask a stand-in.

    python emulated_hosts.py NAME COMMAND...

runs a command on the host NAME.
"""

import contextlib
import ctypes
import ctypes.util
import importlib.util
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator

GDR = "libgdrapi.so.2"
SHM = "libjax_ep_shm_per_host.so"
_NEW_UTS = 0x04000000  # CLONE_NEWUTS
_TAKES = "it takes CAP_SYS_ADMIN"
# Of the server and its share of the SMs; what MPS answers if nobody has set another one.
_MPS_CONTROL = """#!/bin/sh
read -r question
case "$question" in
get_server_list) echo 1 ;;
get_active_thread_percentage*) echo 100.0 ;;
*) exit 1 ;;
esac
"""


def ucx_folder() -> str | None:
    """Where UCX's libraries are: $UCX_HOME/lib, or the wheel libucx-cu13; None: the system's."""
    if home := os.environ.get("UCX_HOME"):
        return str(pathlib.Path(home) / "lib")
    wheel = importlib.util.find_spec("libucx")
    for folder in (wheel.submodule_search_locations if wheel else None) or ():
        if (pathlib.Path(folder) / "lib" / "libucp.so.0").exists():
            return str(pathlib.Path(folder) / "lib")
    return None


def has_ucx() -> bool:
    """Whether there is any UCX."""
    return ucx_folder() is not None or ctypes.util.find_library("ucp") is not None


def environment(
    stand_ins: pathlib.Path, nvshmem: pathlib.Path, folder: pathlib.Path
) -> dict[str, str]:
    """What processes on such hosts need.

    Args:
        stand_ins: the folder with the libraries `GDR` and `SHM`, which CMake builds.
        nvshmem: NVSHMEM's folder of libraries.
        folder: for the stand-in of the control program of MPS.
    """
    control = folder / "nvidia-cuda-mps-control"
    control.write_text(_MPS_CONTROL)
    control.chmod(0o755)
    folders = [str(stand_ins), ucx_folder(), str(nvshmem), os.environ.get("LD_LIBRARY_PATH")]
    return {
        "LD_LIBRARY_PATH": os.pathsep.join(filter(None, folders)),
        "LD_PRELOAD": str(stand_ins / SHM),
        "NVSHMEM_REMOTE_TRANSPORT": "ucx",
        "NVSHMEM_HEAP_KIND": "SYSMEM",
        "NVSHMEM_SYMMETRIC_SIZE": "128M",
        "NVSHMEM_DISABLE_NVLS": "1",
        "PATH": os.pathsep.join([str(folder), os.environ["PATH"]]),
        "UCX_TLS": "tcp,cuda_copy,self",
        "UCX_WARN_UNUSED_ENV_VARS": "n",
    }


def on_host(name: str) -> list[str]:
    """What to put before a command, so that it runs on the host of a name."""
    return [sys.executable, "-P", __file__, name]


def refusal() -> str | None:
    """Why this process may not start anything on another host; None: it may."""
    done = subprocess.run(
        [*on_host("node0"), "true"], stderr=subprocess.PIPE, text=True, check=False
    )
    return done.stderr.strip() if _TAKES in done.stderr else None


@contextlib.contextmanager
def removing_heaps(folder: pathlib.Path = pathlib.Path("/dev/shm")) -> Iterator[None]:
    """Removes NVSHMEM's heaps that processes leave if they are ended here, and nobody else's.

    Args:
        folder: where heaps in host memory are.
    """

    def heaps() -> set[pathlib.Path]:
        return set(folder.glob("*symm_heap*"))

    before = heaps()
    try:
        yield
    finally:
        for heap in heaps() - before:
            heap.unlink(missing_ok=True)


def _main(name: str, *command: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    # Before all else: threads that there are would stay on the host that they are on.
    encoded = name.encode()
    if libc.unshare(_NEW_UTS) != 0 or libc.sethostname(encoded, len(encoded)) != 0:
        sys.exit(f"no host {name!r}: {os.strerror(ctypes.get_errno())}; {_TAKES}")
    os.execvp(command[0], command)


if __name__ == "__main__":
    _main(*sys.argv[1:])
