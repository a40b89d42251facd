# SPDX-License-Identifier: Apache-2.0
"""Kernels that do not come back from the network.

All that a kernel waits for by itself has a deadline. What it calls of NVSHMEM has none: a call that
finds no room in a queue waits until the network makes some, for ever where a host is gone. Such a
kernel says nothing more, and neither XLA nor CUDA ends it. So its process looks at what kernels
between hosts store when they begin and when they end, and logs one that has given no sign of life
for longer than any wait of its own may take.
"""

import logging
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from jax_ep._src.groups.far_failures import FarFailures, GiveUp

_logger = logging.getLogger("jax_ep")

ABORT_VARIABLE = "JAX_EP_ABORT"
# No wait of a kernel takes longer than so many timeouts (timeout_quarters of protocol.h).
_TIMEOUTS = 2.0
# How long CUDA may take to say what has not been read.
_UNREAD_S = 5.0


def aborts() -> bool:
    """Whether a process is to end when a kernel of it is stuck, as `JAX_EP_ABORT` says.

    Raises:
        ValueError: a value that is not allowed.
    """
    text = os.environ.get(ABORT_VARIABLE, "")
    if text not in ("", "0", "1"):
        raise ValueError(f"{ABORT_VARIABLE} is {text!r}; allowed: 0, 1")
    return text == "1"


class Running(NamedTuple):
    """A kernel between hosts that has begun and not ended."""

    group_index: int
    rank: int
    op: int  # operation's number
    operation: str
    exchange: int


class _Sign(NamedTuple):
    """What a rank's kernel has reported of its waits, and since when nothing else."""

    waits: tuple
    since: float


def end_process(text: str) -> None:
    """Ends the process as `abort` does, with a text on stderr."""
    for handler in _logger.handlers + logging.getLogger().handlers:
        handler.flush()
    sys.stderr.write(f"jax_ep: {text}\n")
    sys.stderr.flush()
    os.abort()


class StuckKernels:
    """The kernels of a group in this process, as far as they may be stuck."""

    def __init__(
        self,
        name: str,
        *,
        timeout: float,
        domain_size: int,
        places: Mapping[tuple[int, int], str],
        far: FarFailures,
        unread: Callable[[int, int], Sequence[int]],
        word: Callable[[int, int, int], int],
        aborts: bool,
        end: Callable[[str], Any] = end_process,
    ) -> None:
        """Knows of none yet.

        Args:
            name: of the group.
            timeout: seconds after which a wait of a kernel ends.
            domain_size: ranks of a host.
            places: text by (group_index, rank): where the rank's process is.
            far: what ranks of all processes have given up for.
            unread: the ranks that have not read what a rank here has sent; group_index, rank.
            word: of a `GiveUp` of such a kernel: by, blamed, operation's number.
            aborts: whether the process is to end.
            end: ends it.
        """
        self._name = name
        self._limit = _TIMEOUTS * timeout
        self._domain_size = domain_size
        self._places = places
        self._far = far
        self._unread = unread
        self._word = word
        self._aborts = aborts
        self._end = end
        self._signs: dict[Running, _Sign] = {}
        self._reported: set[Running] = set()

    def look(self, running: Iterable[Running], statuses: Iterable[tuple]) -> None:
        """Logs those that are stuck; `statuses` is what the compiled module says of the group."""
        if math.isinf(self._limit):
            return
        now = time.monotonic()
        said = {(of[1], of[2]): (of[3], tuple(of[4])) for of in statuses}
        signs: dict[Running, _Sign] = {}
        for kernel in running:
            error, waits = said.get((kernel.group_index, kernel.rank), (None, ()))
            if error is not None:  # it has given up: that is logged, and CUDA says it to XLA
                continue
            last = self._signs.get(kernel)
            # A wait that ends, or is reported again, ends at its deadline.
            since = last.since if last is not None and last.waits == waits else now
            signs[kernel] = _Sign(waits, since)
        self._signs = signs
        self._reported &= signs.keys()
        for kernel, sign in signs.items():
            if now - sign.since > self._limit and kernel not in self._reported:
                self._reported.add(kernel)
                self._report(kernel)

    def _report(self, kernel: Running) -> None:
        peers = self._likely_peers(kernel)
        where = ", ".join(
            f"rank {peer} in {self._places.get((kernel.group_index, peer), 'an unknown place')}"
            for peer in peers
        )
        text = (
            f"{self._name}, group_index {kernel.group_index}: rank {kernel.rank} is stuck inside "
            f"NVSHMEM in {kernel.operation}; likely peers: {where or 'nothing is known of them'}. "
            f"Its kernel (exchange {kernel.exchange}) has given no sign of life for more than "
            f"{self._limit:g} s, which no wait of its own takes, and will not end by itself"
        )
        if not self._aborts:
            _logger.error("%s; %s=1 would end this process", text, ABORT_VARIABLE)
            return
        _logger.error("%s", text)
        blamed = peers[0] if peers else kernel.rank
        word = self._word(kernel.rank, blamed, kernel.op)
        # Kernels elsewhere, which may wait for this one, then end at once.
        self._far.post(GiveUp(kernel.group_index, kernel.rank, blamed, word))
        self._end(f"{text}; the process ends, as {ABORT_VARIABLE}=1 says")

    def _likely_peers(self, kernel: Running) -> list[int]:
        """Ranks of other hosts: first those that have not read what was sent to them."""
        found = self._ask_unread(kernel)
        for give_up in self._far.known():
            if give_up.group_index != kernel.group_index:
                continue
            # Who is waited for may be gone, and who waits for this rank may be out of reach.
            found.append(give_up.by if give_up.blamed == kernel.rank else give_up.blamed)
        domain = kernel.rank // self._domain_size
        return [p for p in dict.fromkeys(found) if p // self._domain_size != domain]

    def _ask_unread(self, kernel: Running) -> list[int]:
        """Asks CUDA, which may be stuck itself: not for long."""
        answers: list[Sequence[int]] = []
        thread = threading.Thread(
            target=lambda: answers.append(self._unread(kernel.group_index, kernel.rank)),
            name="jax_ep unread messages",
            daemon=True,
        )
        thread.start()
        thread.join(timeout=_UNREAD_S)
        return list(answers[0]) if answers else []
