# SPDX-License-Identifier: Apache-2.0
"""What the processes of a group tell each other while it is made and closed.

Messages are short JSON texts in the store of JAX's coordination service. Each phase has one message
of each process; a process that fails in a phase posts its error instead, so that the others fail at
once with the reason and not at a deadline. A process alone asks no service.

A group is made in one *attempt*, which the first process of the mesh begins by posting a number
that it draws. The others take part in an attempt once: a number that they have seen before is of
one that failed, and they wait for the next. So processes that fail for reasons of their own, before
they come here or while they are here, can try again, and find each other again.
"""

import collections
import contextlib
import hashlib
import json
import logging
import secrets
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from jax_ep._src import compat
from jax_ep._src.errors import EpUnavailable

Message = dict[str, Any]

_logger = logging.getLogger("jax_ep")
_POLL_S = 0.02

_lock = threading.Lock()
_made: collections.Counter[str] = collections.Counter()  # groups, by digest
_seen: collections.defaultdict[str, set[int]] = collections.defaultdict(set)  # attempts, by digest


def mesh_digest(mesh: jax.sharding.Mesh, axis_names: Sequence[str]) -> str:
    """The same in all processes for the same mesh and axes, and for no others."""
    ids = [device.id for device in mesh.devices.flat]
    what = json.dumps([mesh.axis_names, mesh.devices.shape, ids, list(axis_names)])
    return hashlib.sha256(what.encode()).hexdigest()[:16]


def num_made(digest: str) -> int:
    """How many groups have been made here with a mesh and axes."""
    with _lock:
        return _made[digest]


def next_group_id(digest: str, *, after: int | None = None) -> int:
    """The number by which compiled programs know a new group.

    It is the same in all processes, and in the next run, where the compilation cache is asked for
    the programs: it follows from the mesh, the axes, and how many groups were made with these.

    Args:
        digest: from `mesh_digest`.
        after: how many groups the processes say they have made, the most; None: this one alone.
    """
    with _lock:
        _made[digest] = max(_made[digest], after or 0) + 1
        key = f"{digest}/{_made[digest]}"
    return int(hashlib.sha256(key.encode()).hexdigest()[:15], 16)


class MissingProcesses(EpUnavailable):
    """A process did not come."""


class Bootstrap:
    """One attempt's messages between the processes of a mesh."""

    def __init__(
        self,
        digest: str,
        processes: Sequence[int],
        process: int,
        *,
        warn_after: float,
        timeout: float,
    ) -> None:
        """Sends nothing yet.

        Args:
            digest: from `mesh_digest`.
            processes: indices of the mesh's processes, `process` among them.
            process: the index of this one.
            warn_after: seconds after which a process that has not come is logged, and again after
                2, 4, 8 ... times as long.
            timeout: seconds that each phase may take.

        Raises:
            EpUnavailable: there are several processes and no coordination service.
        """
        self._digest = digest
        self._attempt: int | None = None
        self._processes = sorted(processes)
        self._process = process
        self._warn_after = warn_after
        self.timeout = timeout
        self._client: Any = compat.coordination_client() if len(self._processes) > 1 else None
        if len(self._processes) > 1 and self._client is None:
            raise EpUnavailable(
                "the mesh spans several processes, and jax.distributed.initialize has not been "
                "called: kernels cannot be told each other's memory"
            )

    @property
    def has_others(self) -> bool:
        """Whether there are several processes."""
        return len(self._processes) > 1

    @property
    def store(self) -> Any:
        """JAX's coordination client; None if there is one process."""
        return self._client

    @property
    def prefix(self) -> str:
        """Of the attempt's keys in the store."""
        return f"jax_ep/{self._digest}/{self._attempt}"

    @property
    def is_leader(self) -> bool:
        """Whether this is the first process."""
        return self._process == self._processes[0]

    def begin(self) -> int:
        """Begins an attempt, or finds the one that has begun; returns its number.

        Raises:
            MissingProcesses: the first process has not begun one in time.
        """
        if self.is_leader:
            self._attempt = secrets.randbits(63)
            self._set(self._attempt_path, str(self._attempt), replace=True)
            return self._attempt
        deadline = _Deadline(self._warn_after, self.timeout)
        while True:
            text = self._get(self._attempt_path, deadline, self._processes[0], "begin")
            if text is None:
                raise self._missing([self._processes[0]], "begin")
            attempt = int(text)
            with _lock:
                if attempt not in _seen[self._digest]:
                    _seen[self._digest].add(attempt)
                    self._attempt = attempt
                    return attempt
            # It is an attempt that has failed; the first process has not begun another one.
            if deadline.passed:
                raise self._missing([self._processes[0]], "begin")
            self._warn_if_late(deadline, self._processes[0], "begin")
            time.sleep(min(_POLL_S + deadline.waited / 10, 1.0))

    def all_have_begun(self) -> None:
        """Takes back the attempt's number; once all processes take part in it."""
        if self.is_leader and self._client is not None:
            self._delete(self._attempt_path)

    def gather(self, phase: str, message: Message) -> dict[int, Message]:
        """The messages of all processes, by index; waits for those that are not there yet.

        Raises:
            MissingProcesses: a process did not come in time; the message names it.
            EpUnavailable: a process failed; the message says why.
        """
        self._post(phase, message)
        others = [p for p in self._processes if p != self._process]
        messages = self._collect(phase, others, _Deadline(self._warn_after, self.timeout))
        for process, other in messages.items():
            if "error" in other:
                raise EpUnavailable(f"process {process} could not make it: {other['error']}")
        if missing := [p for p in others if p not in messages]:
            raise self._missing(missing, phase)
        return {self._process: message} | messages

    def leave(self, phase: str, timeout: float) -> list[int]:
        """Waits until all processes have come here or failed; returns those that did not."""
        others = [p for p in self._processes if p != self._process]
        try:
            self._post(phase, {})
            arrived = self._collect(phase, others, _Deadline(self._warn_after, timeout))
        except EpUnavailable:  # the service has gone, and the processes with it
            arrived = {}
        return [p for p in others if p not in arrived]

    def end_together(self, phase: str, timeout: float, why_not: str | None = None) -> bool:
        """Whether all processes have come here and none has failed; all are told the same.

        The first process that knows decides: who comes later, or has waited in vain, goes by that.

        Args:
            phase: of its own.
            timeout: seconds to wait for others.
            why_not: why this process cannot end with the others; None if it can.
        """
        others = [p for p in self._processes if p != self._process]
        deadline = _Deadline(self._warn_after, timeout)
        path = f"{self.prefix}/{phase}/decision"
        try:
            self._post(phase, {} if why_not is None else {"error": why_not})
            arrived = self._collect(phase, others, deadline)
            failed = why_not is not None or any("error" in m for m in arrived.values())
            decision = "all" if len(arrived) == len(others) and not failed else "not all"
            if self._client is None:
                return decision == "all"
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # somebody has decided
                self._client.key_value_set(path, decision)
            return self._client.blocking_key_value_get(path, 10_000) == "all"
        except (EpUnavailable, jax.errors.JaxRuntimeError):  # the service has gone
            return False

    def tell_failure(self, phase: str, reason: str) -> None:
        """Posts that this process has failed in a phase, whatever it has posted before."""
        with contextlib.suppress(EpUnavailable):
            self._post(phase, {"error": reason}, replace=True)

    def failure(self, phase: str) -> str | None:
        """What a process has posted that failed in a phase; None if none has. Does not wait."""
        if self._client is None:
            return None
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            for key, text in self._client.key_value_dir_get(f"{self.prefix}/{phase}/"):
                message = json.loads(text)
                if isinstance(message, dict) and "error" in message:
                    return f"process {key.rsplit('/', 1)[-1]} could not: {message['error']}"
        return None

    @contextlib.contextmanager
    def telling_failures(self, *phases: str) -> Iterator[None]:
        """Posts what is raised inside as this process's message of the phases."""
        try:
            yield
        except BaseException as e:
            if self._attempt is None:
                raise
            reason = str(e) or type(e).__name__
            with contextlib.suppress(EpUnavailable):
                for phase in phases:
                    self._post(phase, {"error": reason}, replace=True)
                # Who has not come yet is to wait for the next attempt, not to fail with this one.
                if isinstance(e, MissingProcesses):
                    self.all_have_begun()
            raise

    def forget(self, *phases: str) -> None:
        """Deletes this process's messages of phases that all processes are past."""
        if self._client is None:
            return
        for phase in phases:
            self._delete(self._path(phase, self._process))

    # --- the store -------------------------------------------------------------------------------

    @property
    def _attempt_path(self) -> str:
        return f"jax_ep/{self._digest}/attempt"

    def _path(self, phase: str, process: int) -> str:
        return f"{self.prefix}/{phase}/{process}"

    def _set(self, path: str, text: str, *, replace: bool) -> None:
        if self._client is None:
            return
        try:
            self._client.key_value_set_bytes(path, text.encode(), replace)
        except jax.errors.JaxRuntimeError as e:
            raise _no_service(e) from e

    def _delete(self, path: str) -> None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._client.key_value_delete(path)

    def _post(self, phase: str, message: Message, *, replace: bool = False) -> None:
        self._set(self._path(phase, self._process), json.dumps(message), replace=replace)

    def _get(self, path: str, deadline: "_Deadline", process: int, phase: str) -> str | None:
        """What `process` has posted, once it has; None at the deadline."""
        while True:
            try:
                # Past the deadline, too, what is there is found.
                # Ctrl-C has to wait for the call.
                wait_ms = min(max(int(deadline.until_next * 1e3), 100), 1000)
                return self._client.blocking_key_value_get_bytes(path, wait_ms).decode()
            except jax.errors.JaxRuntimeError as e:
                if "DEADLINE_EXCEEDED" not in str(e):
                    raise _no_service(e) from e
            if deadline.passed:
                return None
            self._warn_if_late(deadline, process, phase)

    def _warn_if_late(self, deadline: "_Deadline", process: int, phase: str) -> None:
        if deadline.is_time_to_warn():
            _logger.warning(
                "making or closing an EpGroup: process %d has waited %.3g s for process %d (%s); "
                "giving up after %g s",
                self._process, deadline.waited, process, phase, deadline.timeout,
            )  # fmt: skip

    def _collect(
        self, phase: str, processes: Sequence[int], deadline: "_Deadline"
    ) -> dict[int, Message]:
        """Messages of the processes that post one before the deadline."""
        messages = {}
        for process in processes:
            text = self._get(self._path(phase, process), deadline, process, phase)
            if text is not None:
                messages[process] = json.loads(text)
        return messages

    def _missing(self, processes: Sequence[int], phase: str) -> MissingProcesses:
        return MissingProcesses(
            f"process(es) {', '.join(map(str, processes))} did not come within "
            f"{self.timeout:g} s ({phase}): every process of the mesh must make the same "
            "groups in the same order"
        )


class _Deadline:
    """When a wait is to be warned of, and given up."""

    def __init__(self, warn_after: float, timeout: float) -> None:
        self.timeout = timeout
        self._start = time.monotonic()
        self._next_warning = warn_after

    @property
    def waited(self) -> float:
        """Seconds so far."""
        return time.monotonic() - self._start

    @property
    def passed(self) -> bool:
        return self.waited >= self.timeout

    @property
    def until_next(self) -> float:
        """Seconds until there is something to do; at most an hour."""
        return min(self._next_warning, self.timeout, self.waited + 3600.0) - self.waited

    def is_time_to_warn(self) -> bool:
        """True once for each time."""
        if self.waited < self._next_warning:
            return False
        self._next_warning *= 2
        return True


def _no_service(error: Exception) -> EpUnavailable:
    return EpUnavailable(f"JAX's coordination service does not answer: {error}")
