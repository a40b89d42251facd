# SPDX-License-Identifier: Apache-2.0
"""What the processes of a group tell each other while it is made and closed.

Messages are short JSON texts in the store of JAX's coordination service. Each phase has one message
of each process; a process that fails in a phase posts its error instead, so that the others fail at
once with the reason and not at a deadline. A process alone asks no service.
"""

import collections
import contextlib
import hashlib
import json
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from jax_ep._src import compat
from jax_ep._src.errors import EpUnavailable

Message = dict[str, Any]

_made: collections.Counter[str] = collections.Counter()
_made_lock = threading.Lock()


def group_key(mesh: jax.sharding.Mesh, axis_names: Sequence[str]) -> str:
    """A key that all processes of a group find, and no other group has.

    It counts the groups made with the same mesh and axes, so every process must make those in the
    same order.
    """
    ids = [device.id for device in mesh.devices.flat]
    what = json.dumps([mesh.axis_names, mesh.devices.shape, ids, list(axis_names)])
    digest = hashlib.sha256(what.encode()).hexdigest()[:16]
    with _made_lock:
        _made[digest] += 1
        return f"{digest}/{_made[digest]}"


def group_id(key: str) -> int:
    """The number by which compiled programs know a group, from its `group_key`.

    It is the same in all processes, and in the next run, where the compilation cache is asked for
    the programs.
    """
    return int(hashlib.sha256(key.encode()).hexdigest()[:15], 16)


class Bootstrap:
    """One group's messages between the processes of its mesh."""

    def __init__(self, key: str, processes: Sequence[int], process: int, timeout: float) -> None:
        """Sends nothing yet.

        Args:
            key: from `group_key`.
            processes: indices of the mesh's processes, `process` among them.
            process: the index of this one.
            timeout: seconds that each phase may take.

        Raises:
            EpUnavailable: there are several processes and no coordination service.
        """
        self._key = key
        self._processes = sorted(processes)
        self._process = process
        self._timeout = timeout
        self._client: Any = compat.coordination_client() if len(self._processes) > 1 else None
        if len(self._processes) > 1 and self._client is None:
            raise EpUnavailable(
                "the mesh spans several processes, and jax.distributed.initialize has not been "
                "called: kernels cannot be told each other's memory"
            )

    def from_first(self, phase: str, message: Message) -> Message:
        """The message of the first process; the other processes' are not sent."""
        first = self._processes[0]
        if self._process == first:
            self._post(phase, message)
            return message
        return self._collect_all(phase, [first])[first]

    def gather(self, phase: str, message: Message) -> dict[int, Message]:
        """The messages of all processes, by index; waits for those that are not there yet.

        Raises:
            EpUnavailable: a process did not come in time, or failed; the message names it.
        """
        self._post(phase, message)
        others = [p for p in self._processes if p != self._process]
        return {self._process: message} | self._collect_all(phase, others)

    def leave(self, phase: str) -> list[int]:
        """Waits until all processes have come here or failed; returns those that did not."""
        try:
            self._post(phase, {})
            others = [p for p in self._processes if p != self._process]
            there = self._collect(phase, others)
        except EpUnavailable:  # the service has gone, and the processes with it
            there = {}
        return [p for p in self._processes if p != self._process and p not in there]

    @contextlib.contextmanager
    def telling_failures(self, *phases: str) -> Iterator[None]:
        """Posts what is raised inside as this process's message of the phases."""
        try:
            yield
        except BaseException as e:
            reason = str(e) or type(e).__name__
            with contextlib.suppress(EpUnavailable):
                for phase in phases:
                    self._post(phase, {"error": reason}, replace=True)
            raise

    def forget(self, *phases: str) -> None:
        """Deletes this process's messages of phases that all processes are past."""
        if self._client is None:
            return
        for phase in phases:
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                self._client.key_value_delete(self._path(phase, self._process))

    def _path(self, phase: str, process: int) -> str:
        return f"jax_ep/{self._key}/{phase}/{process}"

    def _post(self, phase: str, message: Message, *, replace: bool = False) -> None:
        if self._client is None:
            return
        path = self._path(phase, self._process)
        try:
            self._client.key_value_set_bytes(path, json.dumps(message).encode(), replace)
        except jax.errors.JaxRuntimeError as e:
            raise EpUnavailable(f"JAX's coordination service does not answer: {e}") from e

    def _collect(self, phase: str, processes: Sequence[int]) -> dict[int, Message]:
        """Messages of the processes that post one before the deadline."""
        deadline = time.monotonic() + self._timeout
        messages = {}
        for process in processes:
            # Past the deadline, too, one that is there is found.
            left_ms = max(int((deadline - time.monotonic()) * 1e3), 100)
            try:
                text = self._client.blocking_key_value_get_bytes(
                    self._path(phase, process), left_ms
                )
            except jax.errors.JaxRuntimeError as e:
                if "DEADLINE_EXCEEDED" not in str(e):
                    raise EpUnavailable(f"JAX's coordination service does not answer: {e}") from e
                continue
            messages[process] = json.loads(text)
        return messages

    def _collect_all(self, phase: str, processes: Sequence[int]) -> dict[int, Message]:
        messages = self._collect(phase, processes)
        for process, message in messages.items():
            if "error" in message:
                raise EpUnavailable(f"process {process} could not make it: {message['error']}")
        missing = [p for p in processes if p not in messages]
        if missing:
            raise EpUnavailable(
                f"process(es) {', '.join(map(str, missing))} did not come within "
                f"{self._timeout:g} s ({phase}): every process of the mesh must make the same "
                "groups in the same order"
            )
        return messages
