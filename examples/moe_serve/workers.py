# SPDX-License-Identifier: Apache-2.0
"""The processes of a server: starts them, watches them, ends them. No JAX."""

import contextlib
import dataclasses
import multiprocessing
import os
import pathlib
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing import connection
from typing import Any

from moe_lm.options import Options
from moe_serve import wire
from moe_serve.options import ServeOptions

# What a worker runs, before the number of its socket.
_PROGRAM = ("-m", "moe_serve.worker")
# Seconds between two looks at the processes, and in which others may follow the first that ends:
# all are named then, because the first that is seen need not be the root.
_LOOK, _SETTLE = 0.05, 0.3
# Seconds that processes have to end in when they are told to.
_GRACE = 15
# Seconds after which a process that has not answered is late.
_LATE = 10


class WorkerEnded(RuntimeError):
    """A worker has ended, or failed; the message names it. The others have been ended."""


@dataclasses.dataclass
class _Worker:
    name: str
    process: subprocess.Popen
    socket: connection.Connection
    failed: wire.Failed | None = None


class Workers:
    """Processes that do the same, each on its devices, as long as a block runs.

    When one ends by itself, the others are ended too: they may wait for it in an exchange, for
    ever. A server whose ranks can do without one another (ranks that are reported missing, and
    masked) would not end them in `_watch`, but have the engine's `set_alive` called there.
    """

    def __init__(self, serve: ServeOptions, options: Options, service: str) -> None:
        """Starts them, and has them load; the first answer of each is `wire.Ready`.

        Args:
            serve: options of the server.
            options: of the model.
            service: address of the coordination service.
        """
        self._when_ended: Callable[[WorkerEnded], None] = lambda error: None
        self._each = options.num_devices // options.processes
        self._workers: list[_Worker] = []
        self._pending: dict[connection.Connection, _Worker] = {}
        self._asked = time.monotonic()
        self._is_closing = threading.Event()
        self._ended: list[_Worker] = []  # by themselves
        self._has_ended = threading.Event()  # one has, and all have been ended
        self._killed_for: str | None = None  # what `kill` says
        try:
            for number in range(options.processes):
                self._workers.append(_start(number, self._each))
            for number, worker in enumerate(self._workers):
                with contextlib.suppress(OSError):  # it has ended, which `answers` says
                    worker.socket.send(wire.Begin(serve, options, service, number))
            # A daemon: where Ctrl-C comes before `__enter__`, the program has to end, too. Then the
            # sockets are closed, and with them the workers.
            self._watcher = threading.Thread(target=self._watch, name="workers", daemon=True)
            self._watcher.start()
        except BaseException:
            self._kill()
            raise

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, exc_type: type[BaseException] | None, *others: object) -> None:
        """Ends them; where the block has failed, at once."""
        self._is_closing.set()
        self._watcher.join()
        if exc_type is None and not self._ended:
            for worker in self._workers:
                with contextlib.suppress(OSError):
                    worker.socket.send(wire.End())
            deadline = time.monotonic() + _GRACE
            for worker in self._workers:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    worker.process.wait(max(0, deadline - time.monotonic()))
        self._kill()

    def tell(self, message: Any) -> None:
        """Sends a message to all.

        Raises:
            WorkerEnded: one has ended.
        """
        try:
            self._send(message)
        except OSError:
            raise self._reason() from None

    def ask(self, message: Any) -> list[Any]:
        """Sends a message to all, and waits for what they answer, in their order.

        Raises:
            WorkerEnded: one has ended instead.
        """
        self.tell(message)
        return self.answers()

    def answers(self) -> list[Any]:
        """What all answer, in their order.

        Raises:
            ValueError: one refuses the options.
            WorkerEnded: one has ended instead.
        """
        found = {}
        self._asked = time.monotonic()
        self._pending = {worker.socket: worker for worker in self._workers}
        while self._pending:
            for socket in connection.wait(list(self._pending)):
                worker = self._pending[socket]
                try:
                    found[worker.name] = answer = worker.socket.recv()
                except (EOFError, OSError):
                    raise self._reason() from None
                if isinstance(answer, wire.Failed):
                    worker.failed = answer
                    if answer.is_refused:
                        raise ValueError(answer.text.partition(": ")[2])
                    raise self._reason()
                self._pending = {s: w for s, w in self._pending.items() if s is not socket}
        return [found[worker.name] for worker in self._workers]

    def problem(self) -> str | None:
        """What is wrong, from any thread: who has not answered for long. None: nothing."""
        late, seconds = list(self._pending.values()), time.monotonic() - self._asked
        if not late or seconds < _LATE:
            return None
        return f"late for {seconds:.0f} s: {', '.join(worker.name for worker in late)}"

    def when_ended(self, tell: Callable[[WorkerEnded], None]) -> None:
        """Calls it, by any thread, if a worker has ended by itself, or when one does."""
        self._when_ended = tell
        if self._has_ended.is_set():
            tell(self._reason())

    def kill(self, why: str) -> None:
        """Ends all at once; who waits for their answers gets `WorkerEnded`. From any thread."""
        self._killed_for = why
        for worker in self._workers:
            worker.process.kill()

    def kill_rank(self, rank: int) -> str:
        """Sends SIGKILL to the process that has the rank's first device; gives its name."""
        worker = self._workers[rank // self._each]
        worker.process.kill()
        return worker.name

    def _send(self, message: Any) -> None:
        data = pickle.dumps(message)  # once
        for worker in self._workers:
            worker.socket.send_bytes(data)

    def _watch(self) -> None:
        """Until one has ended by itself, or all are to."""
        while not self._is_closing.wait(_LOOK):
            if all(worker.process.poll() is None for worker in self._workers):
                continue
            time.sleep(_SETTLE)
            self._ended = [w for w in self._workers if w.process.poll() is not None]
            for worker in self._workers:
                worker.process.kill()
            self._has_ended.set()
            self._when_ended(self._error())
            return

    def _reason(self) -> WorkerEnded:
        """Why one does not answer. Its end is seen in a moment, and ends the others."""
        if not self._has_ended.wait(_GRACE):
            return WorkerEnded("a worker has closed its socket")
        for worker in self._ended:
            with contextlib.suppress(EOFError, OSError):
                while worker.failed is None and worker.socket.poll():
                    answer = worker.socket.recv()
                    worker.failed = answer if isinstance(answer, wire.Failed) else None
        return self._error()

    def _error(self) -> WorkerEnded:
        return WorkerEnded(self._killed_for or _how_they_ended(self._ended))

    def _kill(self) -> None:
        for worker in self._workers:
            worker.process.kill()
            worker.process.wait()
            worker.socket.close()


def _start(number: int, each: int) -> _Worker:
    # A pair of sockets without a name: nobody else can connect, and no file is left behind.
    ours, theirs = multiprocessing.Pipe()
    examples = str(pathlib.Path(__file__).parents[1])
    flags = os.environ.get("XLA_FLAGS", "").split()
    flags = [flag for flag in flags if "xla_force_host_platform_device_count" not in flag]
    # It has processes compile for each other, and a program that one alone needs would wait.
    flags.append("--xla_gpu_shard_autotuning=false")
    variables = {
        "PYTHONPATH": os.pathsep.join([examples, *filter(None, sys.path)]),
        "XLA_FLAGS": " ".join(flags),
    }
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-P", *_PROGRAM, str(theirs.fileno())],
            env={**os.environ, **variables},
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            process_group=0,  # Ctrl-C is for the supervisor
        )
    first, last = number * each, (number + 1) * each - 1
    devices = f"device {first}" if each == 1 else f"devices {first} to {last}"
    return _Worker(f"worker {number} (pid {process.pid}, {devices})", process, ours)


def _how_they_ended(ended: list[_Worker]) -> str:
    """Those that a signal has ended, if any: the others then have failed for that reason."""
    killed = [worker for worker in ended if worker.process.returncode < 0]
    return "; ".join(map(_how_it_ended, killed or ended))


def _how_it_ended(worker: _Worker) -> str:
    status = worker.process.returncode
    if status < 0:
        return f"{worker.name} was ended by {signal.Signals(-status).name}"
    if worker.failed:
        return f"{worker.name} has failed: {worker.failed.text}"
    return f"{worker.name} has ended with status {status}"
