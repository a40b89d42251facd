# SPDX-License-Identifier: Apache-2.0
"""Giving up, told from domain to domain.

A rank that gives up says so in the heaps of its domain, and their kernels end at once. Those of
ranks elsewhere see nothing of it, and would find out by their own deadlines. So the processes tell
each other in JAX's coordination service, and each one its own ranks' kernels.
"""

import contextlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

_logger = logging.getLogger("jax_ep")
_PERIOD_S = 0.5  # of looks into the store, while somebody waits
# How long others have to give up as well, before it is said who was waited for by whom.
_OTHERS_S = 1.0


class GiveUp(NamedTuple):
    """A rank gave up.

    Attributes:
        group_index: of its EP group.
        by: the rank.
        blamed: the rank that it waited for.
        word: all of that, as kernels tell each other.
    """

    group_index: int
    by: int
    blamed: int
    word: int


class FarFailures:
    """What the ranks of a group give up for, in all of its processes."""

    def __init__(
        self,
        name: str,
        *,
        places: Mapping[tuple[int, int], str],
        local: Sequence[tuple[int, int]],
        store: Any,
        prefix: str,
        tell: Callable[[int, int, int], bool],
    ) -> None:
        """Knows of none yet.

        Args:
            name: of the group.
            places: text by (group_index, rank): where the rank's process is.
            local: (group_index, rank) of this process's ranks.
            store: JAX's coordination client; None if the group has one process.
            prefix: of the group's keys in the store.
            tell: has a rank of this process give up: group_index, rank, word of a `GiveUp`.
        """
        self._name = name
        self._places = places
        self._local = local
        self._store = store
        self._folder = f"{prefix}/gave_up/"
        self._tell = tell
        self._posted: set[GiveUp] = set()
        self._ended: set[tuple[int, int]] = set()  # ranks here that gave up, or were told to
        self._to_report: dict[int, float] = {}  # group_index -> when the first here did
        self._next_look = 0.0

    def look(self, statuses: Iterable[tuple[int, GiveUp]], *, waits: bool, last: bool) -> None:
        """Tells the others what is new here, and the kernels here what is new elsewhere.

        Args:
            statuses: rank here and what it gave up for, or was told of, of all that have.
            waits: whether a rank here waits for long.
            last: whether there is no other look after this one.
        """
        now = time.monotonic()
        for rank, give_up in statuses:
            self._note_end(give_up.group_index, rank)
            # Also what another rank of the domain has said: its process may be gone by now.
            self.post(give_up)
        is_due = waits and now >= self._next_look and len(self._ended) < len(self._local)
        reports = [i for i, since in self._to_report.items() if last or now - since >= _OTHERS_S]
        if not is_due and not reports:
            return
        self._next_look = now + _PERIOD_S
        known = self.known()
        for give_up in known:
            self._pass_on(give_up)
        for group_index in reports:
            del self._to_report[group_index]
            self._report(group_index, [g for g in known if g.group_index == group_index])

    def _note_end(self, group_index: int, rank: int) -> None:
        if (group_index, rank) not in self._ended:
            self._ended.add((group_index, rank))
            self._to_report.setdefault(group_index, time.monotonic())

    def post(self, give_up: GiveUp) -> None:
        """Tells the other processes, once."""
        if give_up in self._posted:
            return
        self._posted.add(give_up)
        if self._store is None:
            return
        path = f"{self._folder}{give_up.group_index}-{give_up.by}"
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._store.key_value_set(path, json.dumps(give_up), True)

    def known(self) -> list[GiveUp]:
        """What ranks of all processes have given up for; of this one, if the service is gone."""
        if self._store is None:
            return sorted(self._posted)
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            found = self._store.key_value_dir_get(self._folder)
            return sorted(GiveUp(*json.loads(text)) for _, text in found)
        return sorted(self._posted)  # the service is gone

    def _pass_on(self, give_up: GiveUp) -> None:
        self._posted.add(give_up)  # it is there
        for group_index, rank in self._local:
            if group_index == give_up.group_index and (group_index, rank) not in self._ended:
                self._note_end(group_index, rank)
                self._tell(group_index, rank, give_up.word)

    def _report(self, group_index: int, known: Sequence[GiveUp]) -> None:
        """Who was waited for, by whom: one that all name is to blame."""
        waiting: dict[int, list[int]] = {}
        for give_up in known:
            waiting.setdefault(give_up.blamed, []).append(give_up.by)
        for blamed, by in sorted(waiting.items(), key=lambda item: -len(item[1])):
            place = self._places.get((group_index, blamed), "an unknown place")
            _logger.error(
                "%s, group_index %d: %d rank(s) of all processes gave up waiting for rank %d, "
                "which is in %s: %s",
                self._name, group_index, len(by), blamed, place, ", ".join(map(str, sorted(by))),
            )  # fmt: skip
