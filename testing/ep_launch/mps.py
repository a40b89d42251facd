# SPDX-License-Identifier: Apache-2.0
"""A Multi-Process Service of this test run alone: lets several processes' kernels run at once."""

import contextlib
import os
import pathlib
import shutil
import signal
import subprocess
import tempfile
import time

_CONTROL = "nvidia-cuda-mps-control"


class MpsDaemon:
    """The daemon, with folders of its own; it changes no setting of the GPU.

    Attributes:
        environment: what makes a process its client.
    """

    def __init__(self) -> None:
        # Not under pytest's temporary folder: the path of a socket has at most 107 characters.
        self._folder = pathlib.Path(tempfile.mkdtemp(prefix="jax_ep_mps_"))
        self.environment = {
            "CUDA_MPS_PIPE_DIRECTORY": str(self._folder / "pipe"),
            "CUDA_MPS_LOG_DIRECTORY": str(self._folder / "log"),
        }
        for folder in self.environment.values():
            os.mkdir(folder)

    def start(self) -> None:
        """Starts the daemon."""
        subprocess.run([_CONTROL, "-d"], env=os.environ | self.environment, check=True, timeout=30)

    def stop(self) -> None:
        """Ends the daemon and its server, also if clients have left it in a bad state."""
        pid = self._pid()
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(
                [_CONTROL],
                input="quit -t 5\n",
                text=True,
                env=os.environ | self.environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=20,
            )
        deadline = time.monotonic() + 10
        while pid is not None and _is_running(pid):
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
                break
            time.sleep(0.1)

    def restart(self) -> None:
        """A new server: one whose client died by a fault refuses new clients for a while."""
        self.stop()
        self.start()

    def remove(self) -> None:
        """Stops it, and removes its folders."""
        self.stop()
        shutil.rmtree(self._folder, ignore_errors=True)

    def log(self) -> str:
        """What daemon and server wrote last."""
        files = sorted(pathlib.Path(self.environment["CUDA_MPS_LOG_DIRECTORY"]).glob("*.log"))
        return "\n".join(f"{file.name}:\n{file.read_text()[-1500:]}" for file in files)

    def _pid(self) -> int | None:
        path = pathlib.Path(self.environment["CUDA_MPS_PIPE_DIRECTORY"], f"{_CONTROL}.pid")
        return int(path.read_text()) if path.exists() else None


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
