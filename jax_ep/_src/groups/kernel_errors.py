# SPDX-License-Identifier: Apache-2.0
"""What kernels say while they run, on its way to the logger `jax_ep`.

A kernel that waits for a peer, or gives up, writes words into host memory; XLA reports nothing of
the one, and of the other nothing but a failed launch. A thread of the process looks at the words of
all ranks here, of closed groups too: a CUDA graph that was recorded with a group may run later.
"""

import atexit
import contextlib
import json
import logging
import threading
import time
import traceback
from types import ModuleType
from typing import Any, NamedTuple

import jax

from jax_ep._src.groups.far_failures import FarFailures, GiveUp
from jax_ep._src.groups.health import EpHealth
from jax_ep._src.groups.stuck_kernels import Running, StuckKernels

_logger = logging.getLogger("jax_ep")
_PERIOD_S = 0.1
# How long others have to say whom they wait for, before somebody says who is to blame.
_OTHERS_S = 0.5


class RankWait(NamedTuple):
    """One rank's wait for another, as its kernel reported it last."""

    group_index: int
    rank: int
    peer: int
    operation: str
    awaited: str  # "the rows of rank 5"
    exchange: int
    seconds: float
    ended: bool
    given_up: bool  # it has ended, and the rank has not come


class GroupWatch:
    """What is known of a group, for messages.

    Attributes:
        name: of the group.
        warn_after: seconds after which a wait is logged.
        timeout: seconds after which a kernel gives up.
        places: text by (group_index, rank): where the rank's process is.
        store: JAX's coordination client, if the group has several processes; None else.
        prefix: of the group's keys in the store.
        far: tells ranks of other domains, if there are any.
        stuck: finds kernels that do not come back from the network, if NVSHMEM joins domains.
    """

    def __init__(
        self,
        name: str,
        *,
        warn_after: float,
        timeout: float,
        places: dict[tuple[int, int], str],
        store: Any = None,
        prefix: str = "",
        far: FarFailures | None = None,
        stuck: StuckKernels | None = None,
    ) -> None:
        """A group that has said nothing yet."""
        self.name = name
        self.warn_after = warn_after
        self.timeout = timeout
        self.places = places
        self.store = store
        self.prefix = prefix
        self.far = far
        self.stuck = stuck
        self._errors: set[tuple[int, int]] = set()  # (group_index, rank), logged
        self._warned: dict[tuple[int, int, int], tuple[int, float]] = {}  # -> exchange, seconds
        self._first_seen: dict[RankWait, float] = {}
        self._in_store: dict[str, int] = {}  # path -> exchange

    def log(self, statuses: list[tuple]) -> None:
        """Logs what is new in this group's statuses, as the compiled module gives them."""
        for _, group_index, rank, error, _ in statuses:
            if error is not None and (group_index, rank) not in self._errors:
                self._errors.add((group_index, rank))
                _logger.error("%s, group_index %d: %s", self.name, group_index, error)
        waits = _waits_of(statuses)
        self._take_back(waits)
        late = [wait for wait in waits if self._is_to_be_warned_of(wait)]
        if late:
            self._post(waits)
            time.sleep(_OTHERS_S if self.store is not None else 0)
            known = {(w.group_index, w.rank, w.peer): w for w in (*self._posted(), *waits)}
            for wait in late:
                self._warn(wait, [w for w in known.values() if not w.ended])
        for wait in waits:
            key = (wait.group_index, wait.rank, wait.peer)
            if wait.ended and self._warned.get(key, (None, 0))[0] == wait.exchange:
                del self._warned[key]
                if wait.given_up:
                    _logger.warning(
                        "%s, group_index %d: rank %d goes on without rank %d, for which it has "
                        "waited more than %g s in %s (exchange %d)",
                        self.name, wait.group_index, wait.rank, wait.peer, wait.seconds,
                        wait.operation, wait.exchange,
                    )  # fmt: skip
                    continue
                _logger.info(
                    "%s, group_index %d: rank %d came, after more than %g s that rank %d waited "
                    "for it in %s",
                    self.name, wait.group_index, wait.peer, wait.seconds, wait.rank, wait.operation,
                )  # fmt: skip

    def health(self, statuses: list[tuple]) -> EpHealth:
        """Of several waits, the longest; an error, if there is one."""
        errors = [error for *_, error, _ in statuses if error is not None]
        aborted = errors[0] if errors else None
        waits = [wait for wait in _waits_of(statuses) if not wait.ended]
        now = time.monotonic()
        self._first_seen = {wait: self._first_seen.get(wait, now) for wait in waits}
        if not waits:
            return EpHealth(aborted=aborted)
        longest = max(waits, key=lambda wait: wait.seconds)
        same = [w for w in waits if w[:2] == longest[:2] and w.exchange == longest.exchange]
        return EpHealth(
            waiting_for=tuple(sorted(w.peer for w in same)),
            seconds=longest.seconds + now - self._first_seen[longest],
            operation=longest.operation,
            group_index=longest.group_index,
            root=self._root(longest, waits),
            exchange=longest.exchange,
            aborted=aborted,
        )

    def _is_to_be_warned_of(self, wait: RankWait) -> bool:
        if wait.ended or wait.seconds < self.warn_after:
            return False
        warned = self._warned.get((wait.group_index, wait.rank, wait.peer))
        return warned is None or warned != (wait.exchange, wait.seconds)

    def _warn(self, wait: RankWait, known: list[RankWait]) -> None:
        key = (wait.group_index, wait.rank, wait.peer)
        self._warned[key] = (wait.exchange, wait.seconds)
        _logger.warning(
            "%s, group_index %d: rank %d has waited %g s in %s for %s (exchange %d); %s. Giving up "
            "after %g s",
            self.name, wait.group_index, wait.rank, wait.seconds, wait.operation, wait.awaited,
            wait.exchange, self._root(wait, known), self.timeout,
        )  # fmt: skip

    def _root(self, wait: RankWait, known: list[RankWait]) -> str:
        """Follows whom the awaited rank waits for, to the one that waits for nobody."""
        parts: list[str] = []
        seen = {wait.rank}
        at = wait
        while True:
            place = self.places.get((at.group_index, at.peer), "an unknown place")
            following = [
                w for w in known if (w.group_index, w.rank) == (at.group_index, at.peer)
                and w.peer != w.rank
            ]  # fmt: skip
            if not following:
                parts.append(f"rank {at.peer} waits for nobody: look at {place}")
                return "; ".join(parts)
            following.sort(key=lambda w: w.seconds)
            next_wait = following[-1]
            parts.append(
                f"rank {at.peer} waits in {next_wait.operation} for {next_wait.awaited} (exchange "
                f"{next_wait.exchange})"
            )
            if at.peer in seen:
                parts.append(
                    "they wait for one another: the ranks run different operations, or the same "
                    "ones in another order"
                )
                return "; ".join(parts)
            seen.add(at.peer)
            at = next_wait

    # --- what ranks of other processes wait for, in JAX's coordination service -------------------

    def _path(self, wait: RankWait) -> str:
        return f"{self.prefix}/waits/{wait.group_index}-{wait.rank}-{wait.peer}"

    def _post(self, waits: list[RankWait]) -> None:
        if self.store is None:
            return
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            for wait in waits:
                if not wait.ended:
                    self._in_store[self._path(wait)] = wait.exchange
                    self.store.key_value_set(self._path(wait), json.dumps(wait), True)

    def _posted(self) -> list[RankWait]:
        if self.store is None:
            return []
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            found = self.store.key_value_dir_get(f"{self.prefix}/waits/")
            return [RankWait(*json.loads(text)) for _, text in found]
        return []

    def _take_back(self, waits: list[RankWait]) -> None:
        """Those that are over: an old wait would be taken for a reason of a new one."""
        for wait in waits:
            path = self._path(wait)
            if path in self._in_store and (wait.ended or wait.exchange != self._in_store[path]):
                del self._in_store[path]
                with contextlib.suppress(jax.errors.JaxRuntimeError):
                    self.store.key_value_delete(path)


def _waits_of(statuses: list[tuple]) -> list[RankWait]:
    """All waits but those of a kernel for itself while it waits for a peer too: that is why."""
    found = [
        RankWait(group_index, rank, *wait)
        for _, group_index, rank, _, waits in statuses
        for wait in waits
    ]
    for_peers = {w[:2] for w in found if w.peer != w.rank and not w.ended}
    return [w for w in found if w.peer != w.rank or w[:2] not in for_peers]


class Watch:
    """The process's watch over all of its groups."""

    def __init__(self, module: ModuleType) -> None:
        """Starts nothing yet; `module` is the compiled one for CUDA."""
        self._module = module
        self._groups: dict[str, GroupWatch] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def add(self, group: GroupWatch) -> None:
        """Watches a group from now on, also when it has been closed."""
        with self._lock:
            self._groups[group.name] = group
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, name="jax_ep watch of kernels", daemon=True
                )
                self._thread.start()
                atexit.register(self.stop)

    def look(self) -> None:
        """Logs what is new."""
        with self._lock:
            give_ups = self._give_ups()
            for group, statuses in self._statuses():
                if group.far is not None:
                    waits = any(not wait.ended for wait in _waits_of(statuses))
                    own = give_ups.get(group.name, [])
                    group.far.look(own, waits=waits, last=self._stop.is_set())
                group.log(statuses)
            self._look_for_stuck()

    def health(self, name: str) -> EpHealth:
        """Of one group."""
        for group, statuses in self._statuses():
            if group.name == name:
                return group.health(statuses)
        return EpHealth()

    def stop(self) -> None:
        """Looks a last time, and ends the thread."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _statuses(self) -> list[tuple[GroupWatch, list[tuple]]]:
        by_name: dict[str, list[tuple]] = {}
        for status in self._module.statuses():
            by_name.setdefault(status[0], []).append(status)
        groups = dict(self._groups)
        return [(groups[name], by_name[name]) for name in by_name if name in groups]

    def _give_ups(self) -> dict[str, list[tuple[int, GiveUp]]]:
        """Of groups with several domains, by name."""
        if all(group.far is None for group in dict(self._groups).values()):
            return {}
        by_name: dict[str, list[tuple[int, GiveUp]]] = {}
        for name, group_index, rank, by, blamed, word in self._module.give_ups():
            by_name.setdefault(name, []).append((rank, GiveUp(group_index, by, blamed, word)))
        return by_name

    def _look_for_stuck(self) -> None:
        """Of groups that NVSHMEM joins; also those of which no kernel has said anything."""
        watched = {n: g.stuck for n, g in dict(self._groups).items() if g.stuck is not None}
        if not watched:
            return
        statuses = {group.name: of for group, of in self._statuses()}
        by_name: dict[str, list[Running]] = {}
        for name, *kernel in self._module.running():
            by_name.setdefault(name, []).append(Running(*kernel))
        for name, stuck in watched.items():
            stuck.look(by_name.get(name, ()), statuses.get(name, ()))

    def _run(self) -> None:
        stopping = False
        while not stopping:
            stopping = self._stop.wait(_PERIOD_S)
            try:
                self.look()
            except Exception:  # noqa: BLE001  of a log handler, or the store; another look follows
                traceback.print_exc()
