# SPDX-License-Identifier: Apache-2.0
"""The example server with a model that takes no time to compile."""

import asyncio
import contextlib
import hashlib
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import httpx
import numpy as np
import uvicorn

from moe_serve.engine import Engine
from moe_serve.experts import FixedExperts
from moe_serve.http import make_app
from moe_serve.plans import Row, StepPlan, Written
from moe_serve.scheduler import Scheduler
from moe_serve.telemetry import Telemetry

NUM_RANKS = 4


class FakeModel:
    """Writes letters that depend on the position; each has its probability of 1/4.

    Attributes:
        counts: `[2, 8]` int64, as of `ServingModel`.
        rows: of all steps.
        may_step: steps wait for it.
        pause_at: the step, from 0 on, before which `may_step` is cleared; None: there is none.
        in_step: a step has begun.
        error: what steps raise, if anything.
        has_expert: `[2, 8]` bool, once it has been set.
        alive: `[R]` bool, once it has been set.
    """

    num_devices = NUM_RANKS

    def __init__(self) -> None:
        self.counts = np.zeros((2, 8), np.int64)
        self.rows: list[list[Row]] = []
        self.may_step = threading.Event()
        self.may_step.set()
        self.pause_at: int | None = None
        self.in_step = threading.Event()
        self.error: Exception | None = None

    def run(self, plan: StepPlan) -> list[Written]:
        """As of `ServingModel`."""
        return [written for step in plan.steps for written in self.step(*step)]

    def step(self, rows: Sequence[Row], width: int) -> list[Written]:
        """Counts three experts, and waits for `may_step`."""
        if len(self.rows) == self.pause_at:
            self.may_step.clear()
        self.in_step.set()
        assert self.may_step.wait(timeout=20)
        if self.error is not None:
            raise self.error
        self.rows.append(list(rows))
        self.counts[:, 2:5] += len(rows)
        return [Written(byte_at(row.start + len(row.tokens)), float(np.log(0.25))) for row in rows]

    def set_experts(self, has_expert: np.ndarray) -> None:
        """Writes it down."""
        self.has_expert = has_expert

    def set_alive(self, alive: np.ndarray) -> None:
        """Writes it down."""
        self.alive = alive

    def abandon(self) -> None:
        """Its steps end by themselves."""

    def take_counts(self) -> np.ndarray:
        """As of `ServingModel`."""
        counts, self.counts = self.counts, np.zeros_like(self.counts)
        return counts


def byte_at(position: int) -> int:
    """What the model writes there."""
    return b"abcdefghij"[hashlib.sha256(bytes([position])).digest()[0] % 10]


def text_at(start: int, length: int) -> str:
    """What it writes from there on."""
    return bytes(byte_at(start + i) for i in range(length)).decode()


class Server:
    """An application with its parts: four ranks with a slot each."""

    def __init__(self, *, max_open: int = 16, **options: Any) -> None:
        """Does nothing before `client` or `served`; the options are those of `make_app`."""
        self.model = FakeModel()
        self.telemetry = Telemetry()
        experts = FixedExperts(self.model, self.telemetry, num_ranks=NUM_RANKS, num_topk=2, every=2)
        scheduler = Scheduler(
            num_devices=NUM_RANKS,
            slots_per_device=1,
            max_len=64,
            widths=[16],
            max_prefill_tokens=32,
        )
        self.engine = Engine(
            self.model, scheduler, experts, self.telemetry, num_ranks=NUM_RANKS, max_open=max_open
        )
        self.app = make_app(self.engine, model="tiny", **options)

    @contextlib.asynccontextmanager
    async def client(self) -> AsyncIterator[httpx.AsyncClient]:
        """Without a network; a response comes when it is whole."""
        async with self.app.router.lifespan_context(self.app):
            transport = httpx.ASGITransport(self.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                yield client

    @contextlib.asynccontextmanager
    async def served(self) -> AsyncIterator[tuple[httpx.AsyncClient, uvicorn.Server]]:
        """Over TCP, by uvicorn; gives the client, and uvicorn's server."""
        config = uvicorn.Config(self.app, port=0, log_level="error", log_config=None)
        server = uvicorn.Server(config)
        with contextlib.ExitStack() as stack:
            stack.callback(lambda: self.model.may_step.set())
            task = asyncio.ensure_future(server.serve())
            while not server.started:
                await asyncio.sleep(0.01)
            port = server.servers[0].sockets[0].getsockname()[1]
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
                yield client, server
            self.model.may_step.set()
            server.should_exit = True
            await task

    async def until(self, condition: Callable[[], Any]) -> None:
        """Waits for something that will be so."""
        for _ in range(1000):
            if condition():
                return
            await asyncio.sleep(0.01)
        raise AssertionError("it has not come to be")

    def gauge(self, name: str) -> float:
        """A value of now."""
        return self.telemetry.gauges[name]

    @property
    def num_commands(self) -> int:
        """What the engine's thread has been told and has not done yet."""
        return len(self.engine._commands)


def with_client(test: Callable[[Server, httpx.AsyncClient], Awaitable[Any]], **options: Any) -> Any:
    """The result of a test that gets a server with these options, and its client."""

    async def run() -> Any:
        server = Server(**options)
        async with server.client() as client:
            return await test(server, client)

    return asyncio.run(run())


def events_of(text: str) -> list[Any]:
    """The events of a stream that has come to its end."""
    parts = text.split("\n\n")
    assert parts.pop() == ""
    assert all(part.startswith("data: ") for part in parts)
    assert parts.pop() == "data: [DONE]"
    return [json.loads(part.removeprefix("data: ")) for part in parts]
