# SPDX-License-Identifier: Apache-2.0
"""An event model of one kernel: how its warps share the SMs of a rank, its memory and its link.

Each warp takes items of work, and each item is a list of steps: load, compute, store. An SM's ports
and its issue slots, and the rank's link, are servers with a queue, at the rates that the link probe
measured. All ranks are alike: a peer's item arrives when the same item of this rank has been sent.
docs/measurements/performance.md says what the model is for, and how far it is to be trusted.
"""

import dataclasses
import heapq
from collections.abc import Generator, Iterator, Sequence


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """What a warp does with one segment.

    Attributes:
        into: bytes that it loads.
        instructions: of the warp.
        out: bytes that it stores in this rank's memory.
        link: bytes that it stores in the peers' memory.
    """

    into: float
    instructions: float
    out: float
    link: float


Steps = Sequence[Step]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Receive:
    """An item of the receivers.

    Attributes:
        needs: numbers of the items of `Work.sends` that must have arrived, as peers send them.
        steps: what there is to do then.
    """

    needs: Sequence[int]
    steps: Steps


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """What a rank does in one kernel; items are taken in their order."""

    sends: Sequence[Steps]
    receives: Sequence[Receive]

    def total(self, what: str) -> float:
        """The sum of an attribute of all steps."""
        steps = [*self.sends, *(item.steps for item in self.receives)]
        return sum(getattr(step, what) for of_item in steps for step in of_item)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    """What a rank has for a kernel. Rates are in bytes per microsecond.

    Attributes:
        num_sms: that the kernel takes.
        into: of loads, of all these SMs together.
        out: likewise, of stores, with as many loads beside them as this kernel has.
        into_of_sm: of an SM that has the memory for itself.
        out_of_sm: likewise.
        link: of stores to peers.
        instructions: of an SM in a microsecond.
        warp_instructions: likewise, of a warp alone.
        load_us: from a load to its data.
        release_us: from a store's end to when a flag after it has been stored.
        flag_us: until a peer sees it.
        poll_us: from then, or from taking an item, to the first load.
        fixed_us: launch, and what an empty exchange takes: the first polls and the last
            acknowledgment.
    """

    num_sms: int
    into: float
    out: float
    into_of_sm: float
    out_of_sm: float
    link: float
    instructions: float
    warp_instructions: float
    load_us: float
    release_us: float
    flag_us: float
    poll_us: float
    fixed_us: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Launch:
    """How a kernel spreads over an SM.

    Attributes:
        num_warps: of a block.
        num_senders: of these, those that send first.
        ahead: steps whose loads run ahead of the one in use.
        waits_for_stores: whether a sender stands still until what it sent has been written.
        tickets_ahead: whether a warp takes its next item when it begins one; else when it is done.
        planned_us: when there is the plan, which is made in the same kernel. No warp receives
            before.
    """

    num_warps: int
    num_senders: int
    ahead: int
    waits_for_stores: bool
    tickets_ahead: bool = False
    planned_us: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tail:
    """More SMs, which begin to receive when all has been sent.

    Attributes:
        num_sms: beside those of `Machine`.
        into: bytes per microsecond, of loads, of all SMs that there are then.
        out: likewise, of stores.
        launch_us: from the last flag to the first ticket.
    """

    num_sms: int
    into: float
    out: float
    launch_us: float


class _Server:
    """Serves one after another."""

    __slots__ = ("_free", "_rate")

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._free = 0.0

    def set_rate(self, rate: float) -> None:
        """For what is asked for from now on."""
        self._rate = rate

    def serve(self, now: float, amount: float) -> float:
        """When so much that is asked for now has been served."""
        self._free = max(self._free, now) + amount / self._rate
        return self._free


class _Sm:
    __slots__ = ("into", "issue", "out")

    def __init__(self, machine: Machine) -> None:
        self.into = _Server(machine.into_of_sm)
        self.out = _Server(machine.out_of_sm)
        self.issue = _Server(machine.instructions)


class _Queue:
    """As csrc/device/work_queue.h: the first items by place, all others by tickets."""

    def __init__(self, num_items: int, num_places: int) -> None:
        self._num_items = num_items
        self._next = num_places

    def take(self) -> int:
        self._next += 1
        return self._next - 1

    def items(self, place: int | None, launch: Launch) -> Iterator[int]:
        """The items of a warp; without a place it begins with a ticket."""
        item = self.take() if place is None else place
        while item < self._num_items:
            ticket = self.take() if launch.tickets_ahead else None
            yield item
            item = self.take() if ticket is None else ticket


# A warp yields when it wants to go on, or the item of peers that it waits for; it is sent the time.
_Warp = Generator[float | int, float, None]
_Part = Generator[float | int, float, float]


class _Simulation:
    def __init__(self, work: Work, machine: Machine, launch: Launch, tail: Tail | None) -> None:
        self._work, self._machine, self._launch = work, machine, launch
        self._tail = tail
        self._link = _Server(machine.link)
        self._into, self._out = _Server(machine.into), _Server(machine.out)
        self._sending = _Queue(len(work.sends), launch.num_senders * machine.num_sms)
        receivers = launch.num_warps - launch.num_senders
        self._receiving = _Queue(len(work.receives), receivers * machine.num_sms)
        self._arrived: dict[int, float] = {}
        self._waiting: dict[int, list[_Warp]] = {}
        self._events: list[tuple[float, int, _Warp]] = []
        self._num_events = 0
        self._end = 0.0

    def run(self) -> float:
        sms = [_Sm(self._machine) for _ in range(self._machine.num_sms)]
        for warp in range(self._launch.num_warps):
            for block, sm in enumerate(sms):
                of_warp = self._warp(sm, block, warp)
                next(of_warp)
                self._go_on(0.0, of_warp)
        while self._events:
            now, _, of_warp = heapq.heappop(self._events)
            try:
                wanted = of_warp.send(now)
            except StopIteration:
                continue
            if isinstance(wanted, float):
                self._go_on(max(wanted, now), of_warp)
            elif wanted in self._arrived:
                self._go_on(max(self._arrived[wanted], now), of_warp)
            else:
                self._waiting.setdefault(wanted, []).append(of_warp)
        if self._waiting:
            raise RuntimeError(f"nobody sends what is waited for: {sorted(self._waiting)}")
        return self._end + self._machine.fixed_us

    def _go_on(self, at: float, warp: _Warp) -> None:
        self._num_events += 1  # of two at once, the first asked first
        heapq.heappush(self._events, (at, self._num_events, warp))

    def _arrives(self, item: int, at: float) -> None:
        self._arrived[item] = at
        for warp in self._waiting.pop(item, []):
            self._go_on(at, warp)
        if self._tail is not None and len(self._arrived) == len(self._work.sends):
            self._begin_tail(max(self._arrived.values()) + self._tail.launch_us, self._tail)

    def _begin_tail(self, at: float, tail: Tail) -> None:
        self._into.set_rate(tail.into)
        self._out.set_rate(tail.out)
        sms = [_Sm(self._machine) for _ in range(tail.num_sms)]
        for _ in range(self._launch.num_warps):
            for sm in sms:
                of_warp = self._warp_of_tail(sm)
                next(of_warp)
                self._go_on(at, of_warp)

    def _warp(self, sm: _Sm, block: int, warp: int) -> _Warp:
        launch, machine = self._launch, self._machine
        now = yield 0.0
        read = self._stages()  # when the stages of the last steps may be loaded again
        place = block * launch.num_senders + warp if warp < launch.num_senders else None
        for item in self._sending.items(place, launch) if place is not None else ():
            written = yield from self._stream(sm, self._work.sends[item], now, read)
            announced = written + machine.release_us
            self._arrives(item, announced + machine.flag_us)
            now = yield announced if launch.waits_for_stores else read[-1] + machine.release_us
        if launch.planned_us > now:
            now = yield launch.planned_us
        rest = (warp - launch.num_senders) * machine.num_sms + block
        yield from self._receive(sm, None if place is not None else rest, now, read)

    def _warp_of_tail(self, sm: _Sm) -> _Warp:
        now = yield 0.0
        yield from self._receive(sm, None, now, self._stages())

    def _stages(self) -> list[float]:
        return [0.0] * self._launch.ahead

    def _receive(self, sm: _Sm, place: int | None, now: float, read: list[float]) -> _Warp:
        for item in self._receiving.items(place, self._launch):
            receive = self._work.receives[item]
            for needed in receive.needs:
                now = yield needed
            now = yield now + self._machine.poll_us
            yield from self._stream(sm, receive.steps, now, read)
            now = yield read[-1]

    def _stream(self, sm: _Sm, steps: Steps, now: float, read: list[float]) -> _Part:
        """The steps of an item; returns when all that it stored has been written."""
        machine, ahead = self._machine, self._launch.ahead
        loaded: list[float] = []
        written = now
        for i, step in enumerate(steps):
            if read[-ahead] > now:
                now = yield read[-ahead]
            while len(loaded) < min(len(steps), i + ahead + 1):
                size = steps[len(loaded)].into
                end = max(sm.into.serve(now, size), self._into.serve(now, size))
                loaded.append(end + machine.load_us)
            if loaded[i] > now:
                now = yield loaded[i]
            if step.instructions:
                alone = now + step.instructions / machine.warp_instructions
                now = yield max(sm.issue.serve(now, step.instructions), alone)
            size = step.out + step.link
            left = max(sm.out.serve(now, size), self._out.serve(now, size)) if size else now
            if step.link:
                left = max(left, self._link.serve(now, step.link))
            read.append(left)
            del read[:-ahead]
            written = max(written, left)
        self._end = max(self._end, written)
        return written


def simulate(work: Work, machine: Machine, launch: Launch, tail: Tail | None = None) -> float:
    """Microseconds of a kernel.

    Raises:
        RuntimeError: a receiver needs what nobody sends.
    """
    return _Simulation(work, machine, launch, tail).run()
