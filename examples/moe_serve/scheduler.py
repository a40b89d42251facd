# SPDX-License-Identifier: Apache-2.0
"""Continuous batching: who reads and writes in the next step, and where. No JAX.

A sequence is a request with a slot. In every step the sequences that write have a row of one byte
each, and some of those that still read their prompts have a row of more. When one ends, the next in
the queue takes its slot, while the others go on. The same requests, in the same order and at the
same steps, always give the same plans.
"""

import collections
import dataclasses
from collections.abc import Iterator, Sequence

from moe_serve.plans import Event, Request, Row, StepPlan

_LENGTH, _STOP = "length", "stop"


@dataclasses.dataclass(eq=False)
class _Sequence:
    """A request that runs, or that has run and waits for another slot."""

    request: Request
    text: bytearray = dataclasses.field(default_factory=bytearray)
    device: int = -1
    slot: int = -1
    num_read: int = 0

    @property
    def unread(self) -> bytes:
        return (self.request.prompt + bytes(self.text))[self.num_read :]

    def row(self, length: int) -> Row:
        unread = self.unread
        tokens = unread[:length]
        writes = len(tokens) == len(unread)
        return Row(self.request, self.device, self.slot, self.num_read, tokens, writes)


class Scheduler:
    """Gives requests slots, and steps their rows."""

    def __init__(
        self,
        *,
        num_devices: int,
        slots_per_device: int,
        max_len: int,
        widths: Sequence[int],
        max_prefill_tokens: int,
    ) -> None:
        """Nobody runs, and all devices take part.

        Args:
            num_devices: `D`.
            slots_per_device: sequences that a device has at a time.
            max_len: bytes of a sequence, prompt and text, at most.
            widths: how long rows of a prompt may be, in ascending order; each is a program.
            max_prefill_tokens: bytes of prompts that one step reads at most, over all devices;
                those who write wait for them.

        Raises:
            ValueError: a number is not allowed.
        """
        if list(widths) != sorted(set(widths)) or not widths or widths[0] < 2:
            raise ValueError(f"widths is {widths}; allowed: ascending ints of at least 2")
        if max_prefill_tokens < 2:
            raise ValueError(f"max_prefill_tokens is {max_prefill_tokens}; allowed: at least 2")
        self.max_len = max_len
        self._widths = tuple(widths)
        self._max_prefill_tokens = max_prefill_tokens
        self._alive = [True] * num_devices
        self._free = [list(range(slots_per_device)) for _ in range(num_devices)]
        self._waiting: collections.deque[_Sequence] = collections.deque()
        self._running: dict[int, _Sequence] = {}  # in the order of admission

    @property
    def num_waiting(self) -> int:
        """Requests without a slot."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Requests with a slot."""
        return len(self._running)

    @property
    def is_idle(self) -> bool:
        """Whether no step is to be done now."""
        return not self._running and (not self._waiting or not any(self._alive))

    def check(self, request: Request) -> None:
        """Raises ValueError unless a slot has room for it."""
        total = len(request.prompt) + request.max_tokens
        if not request.prompt or request.max_tokens < 1 or total > self.max_len:
            raise ValueError(
                f"the request has {len(request.prompt)} bytes and wants {request.max_tokens}; "
                f"allowed: at least one of each, and {self.max_len} together"
            )

    def add(self, request: Request) -> None:
        """Queues a request.

        Raises:
            ValueError: it does not fit into a slot.
        """
        self.check(request)
        self._waiting.append(_Sequence(request))

    def cancel(self, request_id: int) -> None:
        """Forgets a request, whatever has become of it; its slot is free at once."""
        sequence = self._running.get(request_id)
        if sequence is not None:
            self._release(sequence)
        self._waiting = collections.deque(
            sequence for sequence in self._waiting if sequence.request.id != request_id
        )

    def set_alive(self, alive: Sequence[bool]) -> int:
        """Says which devices take part from now on.

        Sequences of the others have lost what their attention remembered. They go to the head of
        the queue, and read prompt and text again elsewhere.

        Returns:
            How many these are.
        """
        self._alive = list(alive)
        lost = [s for s in self._running.values() if not self._alive[s.device]]
        for sequence in lost:
            self._release(sequence)
            sequence.num_read = 0
        self._waiting.extendleft(reversed(lost))
        return len(lost)

    def plan(self) -> StepPlan:
        """Admits who has a place, and says what the next step does."""
        self._admit()
        decode = tuple(s.row(1) for s in self._running.values() if len(s.unread) == 1)
        prefill = tuple(self._prefill())
        longest = max((len(row.tokens) for row in prefill), default=0)
        width = next((w for w in self._widths if w >= longest), 0) if prefill else 0
        return StepPlan(prefill, width, decode)

    def commit(self, rows: Sequence[Row], tokens: Sequence[int]) -> list[Event]:
        """Takes the bytes that follow rows of the last plan.

        Rows of requests that have been cancelled since are passed over. If `set_alive` has been
        called since, the plan is void: what it gave has to be thrown away.
        """
        events = []
        for row, token in zip(rows, tokens, strict=True):
            sequence = self._running.get(row.request.id)
            if sequence is None:
                continue
            sequence.num_read += len(row.tokens)
            if row.writes:
                sequence.text.append(token)
                finish = _finish(sequence)
                events.append(Event(row.request.id, token, finish))
                if finish:
                    self._release(sequence)
        return events

    def _admit(self) -> None:
        while self._waiting:
            free = [len(f) if a else 0 for f, a in zip(self._free, self._alive, strict=True)]
            if not any(free):
                return
            sequence = self._waiting.popleft()
            sequence.device = free.index(max(free))
            sequence.slot = self._free[sequence.device].pop(0)
            self._running[sequence.request.id] = sequence

    def _prefill(self) -> Iterator[Row]:
        """First come, first served: one row for each device, until the step has enough."""
        room = self._max_prefill_tokens
        busy = set()
        for sequence in self._running.values():
            length = min(len(sequence.unread), self._widths[-1], room)
            if length > 1 and sequence.device not in busy:
                busy.add(sequence.device)
                room -= length
                yield sequence.row(length)

    def _release(self, sequence: _Sequence) -> None:
        del self._running[sequence.request.id]
        self._free[sequence.device].append(sequence.slot)
        self._free[sequence.device].sort()


def _finish(sequence: _Sequence) -> str | None:
    if any(sequence.text.endswith(stop) for stop in sequence.request.stop):
        return _STOP
    return _LENGTH if len(sequence.text) >= sequence.request.max_tokens else None
