# SPDX-License-Identifier: Apache-2.0
"""One thread that steps the model, and asyncio on the other side.

All programs with exchanges are launched by this thread, one after the other: on GPUs ranks are
matched by the order of launches.
"""

import asyncio
import concurrent.futures
import dataclasses
import threading
import time
from collections.abc import Callable
from typing import Any

from moe_serve.commands import Commands
from moe_serve.plans import Event, Request, StepPlan
from moe_serve.runner import Experts, Runner
from moe_serve.scheduler import Scheduler
from moe_serve.streams import EngineClosed, QueueFull, Stream, Token
from moe_serve.telemetry import Telemetry

# Seconds that a step may go on when the engine is closed.
_LAST_STEP = 30


class Engine:
    """Steps the model while there is something to do.

    Attributes:
        telemetry: what it tells.
        alive: which ranks take part.
        error: why it has stopped by itself, if it has.
    """

    def __init__(
        self,
        model: Runner,
        scheduler: Scheduler,
        experts: Experts,
        telemetry: Telemetry,
        *,
        num_ranks: int,
        max_open: int,
    ) -> None:
        """Does nothing before `start`.

        Args:
            model: what is stepped, from now on by this engine alone.
            scheduler: likewise.
            experts: of the model.
            telemetry: what is told.
            num_ranks: of an EP group; device `d` is rank `d % num_ranks`.
            max_open: requests at a time, those that wait included.
        """
        self.telemetry = telemetry
        self.alive = [True] * num_ranks
        self.error: BaseException | None = None
        self._model = model
        self._scheduler = scheduler
        self._experts = experts
        self._max_open = max_open
        self._commands = Commands()
        self._streams: dict[int, Stream] = {}
        self._num_open = 0
        self._next_id = 0
        self._is_draining = False
        self._is_closed = False
        self._num_masks = 0
        self._thread = threading.Thread(target=self._run, name="engine")

    # --- from the side of asyncio ---------------------------------------------------------------

    def start(self) -> None:
        """Starts the thread."""
        self.telemetry.begin()
        self.telemetry.gauges["alive_ranks"] = sum(self.alive)
        self._thread.start()

    def close(self) -> None:
        """Ends the thread, after the step that runs; who still waits gets `EngineClosed`."""
        self._is_draining = True
        self._commands.put(self._set_closed)
        self._thread.join(_LAST_STEP)
        if self._thread.is_alive():
            self._model.abandon()
            self._thread.join()

    def drain(self) -> None:
        """Takes no more requests; those it has go on."""
        self._is_draining = True

    def fail(self, error: BaseException) -> None:
        """Ends the thread after the step that runs, as if that had raised the error."""
        self._commands.put(lambda: self._fail(error))

    def check(self) -> None:
        """Raises `EngineClosed`, with the reason, unless requests are taken."""
        if self.error is not None:
            raise EngineClosed(f"the engine has failed: {self.error}")
        if self._is_draining:
            raise EngineClosed("the server is shutting down")

    def open(self, request: Request) -> Stream:
        """Queues a request, whose id is replaced; to be called where an asyncio loop runs.

        Raises:
            ValueError: the request does not fit into a slot.
            QueueFull: too many wait.
            EngineClosed: the engine takes no requests.
        """
        self.check()
        self._scheduler.check(request)
        if self._num_open >= self._max_open:
            self.telemetry.counters["rejected"] += 1
            raise QueueFull(f"{self._num_open} requests are open; allowed: {self._max_open}")
        self._next_id += 1
        request = dataclasses.replace(request, id=self._next_id)
        stream = Stream(asyncio.get_running_loop(), lambda: self._ended(request.id))
        if not self._commands.put(lambda: self._open(request, stream)):
            raise EngineClosed("the engine has stopped")
        self._num_open += 1
        self.telemetry.counters["requests"] += 1
        return stream

    def _ended(self, request_id: int) -> None:
        self._num_open -= 1
        self._commands.put(lambda: self._cancel(request_id))  # unless all was written

    async def set_alive(self, rank: int, alive: bool) -> None:
        """A rank leaves, or comes back; returns when it has.

        Raises:
            ValueError: there is no such rank, or the others cannot do without it.
            EngineClosed: the engine has stopped.
        """
        await self.call(lambda: self._set_alive(rank, alive))

    async def call(self, function: Callable[[], Any]) -> Any:
        """The result of a function that the thread runs, between two steps.

        Raises:
            EngineClosed: the engine has stopped.
        """
        self.check()
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return  # who has called does not wait any more
            try:
                future.set_result(function())
            except Exception as error:  # noqa: BLE001 - to who has called
                future.set_exception(error)

        if not self._commands.put(run):
            raise EngineClosed("the engine has stopped")
        return await asyncio.wrap_future(future)

    # --- on the thread --------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._is_closed:
                self._commands.run(wait=self._scheduler.is_idle)
                plan = self._scheduler.plan()
                self._update_gauges()
                if not plan.is_empty and not self._is_closed:
                    self._step(plan)
        except Exception as error:  # noqa: BLE001 - who waits is told
            self._fail(error)
        self._commands.end()
        for stream in self._streams.values():
            stream.put(EngineClosed(f"the engine has stopped: {self.error or 'closed'}"))

    def _step(self, plan: StepPlan) -> None:
        masks = self._num_masks
        written = self._model.run(plan)
        self._commands.run()
        counters = self.telemetry.counters
        counters["steps"] += 1
        if self._num_masks != masks:
            # These bytes are not of the ranks that take part now. The cache needs no repair: what
            # the step wrote there is written again, at the same positions.
            counters["thrown_away"] += 1
            return
        counters["prompt_bytes"] += sum(row.num_of_prompt for row in plan.rows)
        events = self._scheduler.commit(plan.rows, [w.token for w in written])
        logprobs = {row.request.id: w.logprob for row, w in zip(plan.rows, written, strict=True)}
        self._deliver(events, logprobs)
        self._experts.observe(steps=1)

    def _deliver(self, events: list[Event], logprobs: dict[int, float]) -> None:
        now = time.perf_counter()
        self.telemetry.counters["written_bytes"] += len(events)
        for event in events:
            stream = self._streams[event.request_id]
            kind = self.telemetry.first if stream.is_new else self.telemetry.between
            kind.add(now - stream.last)
            stream.is_new, stream.last = False, now
            stream.put(Token(event.token, logprobs[event.request_id], event.finish))
            if event.finish:
                del self._streams[event.request_id]

    def _update_gauges(self) -> None:
        self.telemetry.gauges.update(
            queue=self._scheduler.num_waiting, running=self._scheduler.num_running
        )

    def _open(self, request: Request, stream: "Stream") -> None:
        self._streams[request.id] = stream
        self._scheduler.add(request)
        self._update_gauges()

    def _cancel(self, request_id: int) -> None:
        if self._streams.pop(request_id, None) is not None:
            self._scheduler.cancel(request_id)
            self.telemetry.counters["cancelled"] += 1
            self._update_gauges()

    def _set_alive(self, rank: int, alive: bool) -> None:
        if not 0 <= rank < len(self.alive):
            raise ValueError(f"rank is {rank}; allowed: 0 to {len(self.alive) - 1}")
        wanted = [alive if r == rank else a for r, a in enumerate(self.alive)]
        if wanted == self.alive:
            return
        self._experts.set_alive(wanted)
        self.alive = wanted
        self._num_masks += 1
        groups = self._model.num_devices // len(wanted)
        moved = self._scheduler.set_alive(wanted * groups)
        self.telemetry.counters["moved"] += moved
        self.telemetry.gauges["alive_ranks"] = sum(wanted)
        what = "comes back" if alive else f"leaves, {moved} sequences move"
        self.telemetry.mark(f"rank {rank} {what}")

    def _set_closed(self) -> None:
        self._is_closed = True

    def _fail(self, error: BaseException) -> None:
        self._is_closed = True
        if self.error is None:
            self.error = error
            self.telemetry.mark(f"failed: {error}")
