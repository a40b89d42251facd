# SPDX-License-Identifier: Apache-2.0
"""The programs: serve, or serve and measure."""

import asyncio
import contextlib
import json
import re
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence

import httpx
import uvicorn

import jax_ep
from moe_lm.corpus import Corpus
from moe_lm.options import Options
from moe_serve.http import make_app
from moe_serve.loadgen import Planned, Record, plan, send
from moe_serve.options import ServeOptions
from moe_serve.plots import latency_picture
from moe_serve.report import latencies, summary, table
from moe_serve.served import Served, served
from moe_serve.workers import WorkerEnded

# Seconds that requests have to end in when the server is told to.
_GRACE = 60
# Seconds between two looks at whether the engine has failed.
_LOOK = 0.2
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# What the table says about the server.
_COUNTERS = ("steps", "thrown_away", "moved", "moved_slots", "reshares")


def run(serve: ServeOptions, options: Options) -> int:
    """Returns the exit status of the program."""
    try:
        if serve.bench and serve.url:
            return _report(serve, options, serve.url, None)
        with _interrupting() as come, served(serve, options) as server:
            print(server.title, flush=True)
            with _running(serve, server) as url:
                status = 0
                if serve.bench:
                    status = _report(serve, options, url, server)
                else:
                    asyncio.run(_until_told(serve, url, server, come))
            if server.engine.error is None:
                return status
            raise server.engine.error
    except (ValueError, jax_ep.EpUnavailable) as error:
        print(f"serve_moe_lm.py: error: {error}", file=sys.stderr)
        return 2
    except WorkerEnded as error:
        print(f"serve_moe_lm.py: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("serve_moe_lm.py: interrupted", file=sys.stderr)
        return 130


@contextlib.contextmanager
def _interrupting() -> Iterator[threading.Event]:
    """SIGINT and SIGTERM raise KeyboardInterrupt, until the server listens and has other handlers.

    Python loses it where it is raised in a callback of the garbage collector, as JAX has one. So
    there is an event, too.
    """
    come = threading.Event()

    def interrupt(number: int, frame: object) -> None:
        come.set()
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in _SIGNALS}
    try:
        yield come
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _running(serve: ServeOptions, what: Served) -> Iterator[str]:
    """A server on a thread of its own; gives its URL, and ends what has been begun."""
    server = _server(serve, what)
    # Not on the main thread: there uvicorn has handlers of its own, and raises the signal that has
    # ended it once more.
    thread = threading.Thread(target=server.run)
    try:
        thread.start()
        while not server.started:
            if not thread.is_alive():
                where = f"{serve.host} and {server.config.port}"
                raise ValueError(f"arguments --host, --port: {where} cannot be listened on")
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://{serve.host}:{port}"
    finally:
        server.should_exit = True
        if thread.ident is not None:
            thread.join()


async def _until_told(serve: ServeOptions, url: str, what: Served, come: threading.Event) -> None:
    """Waits for SIGINT or SIGTERM, or until the engine has failed."""
    told = asyncio.Event()
    for number in _SIGNALS:
        asyncio.get_running_loop().add_signal_handler(number, told.set)
    print(f"listens on {url}/v1/completions", flush=True)
    async with leaving(serve, url, what):
        while not (told.is_set() or come.is_set() or what.engine.error):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(told.wait(), _LOOK)


def _server(serve: ServeOptions, what: Served) -> uvicorn.Server:
    app = make_app(what.engine, health=what.health, rebalance=what.rebalance)
    config = uvicorn.Config(
        app,
        host=serve.host,
        port=0 if serve.bench else serve.port,
        # Its own would close the handlers that there are, and absl's takes stderr along.
        log_config=None,
        log_level="warning",
        timeout_graceful_shutdown=_GRACE,
    )
    return uvicorn.Server(config)


def _report(serve: ServeOptions, options: Options, url: str, what: Served | None) -> int:
    """Loads a server, and writes table, numbers and pictures."""
    planned = plan(
        Corpus.of_standard_library().held_out,
        requests=serve.requests,
        rate=serve.rate,
        prompt=serve.prompt,
        output=serve.output,
        seed=serve.load_seed,
    )
    records = asyncio.run(_load(serve, url, planned, what))
    numbers = summary(records, serve.slo)
    with httpx.Client(base_url=url) as client:
        metrics = client.get("/metrics").text
        picture = client.get("/load.png")
    numbers["server"] = {name: _counter(metrics, name) for name in _COUNTERS}
    print(table(numbers))
    for error in numbers["errors"]:
        print(f"failed: {error}")
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "serving.json").write_text(json.dumps(numbers, indent=1) + "\n")
    _draw(options, records, what)
    if picture.status_code == 200:
        (options.out / "serving_load.png").write_bytes(picture.content)
    print(f"written to {options.out}: serving.json, serving_latency.png, serving_load.png")
    return 1 if numbers["failed"] else 0


async def _load(
    serve: ServeOptions, url: str, planned: Sequence[Planned], what: Served | None
) -> list[Record]:
    async with leaving(serve, url, what):
        return await send(url, planned, temperature=serve.temperature)


@contextlib.asynccontextmanager
async def leaving(serve: ServeOptions, url: str, what: Served | None = None) -> AsyncIterator[None]:
    """Has ranks leave, or killed, at their time, unless the block has ended by then."""
    tasks = [asyncio.ensure_future(_leave(serve, url)), asyncio.ensure_future(_kill(serve, what))]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


async def _kill(serve: ServeOptions, what: Served | None) -> None:
    if serve.kill_rank is None or what is None or what.kill_rank is None:
        return
    rank, seconds = serve.kill_rank
    await asyncio.sleep(seconds)
    print(f"rank {rank} is killed: {what.kill_rank(rank)}", flush=True)


async def _leave(serve: ServeOptions, url: str) -> None:
    if serve.fail_rank is None:
        return
    rank, seconds = serve.fail_rank
    await asyncio.sleep(seconds)
    try:
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            response = await client.post(f"/admin/ranks/{rank}", json={"alive": False})
    except httpx.HTTPError as error:
        print(f"rank {rank} has not left: {type(error).__name__}: {error}", flush=True)
        return
    what = "leaves" if response.status_code == httpx.codes.OK else "has not left"
    print(f"rank {rank} {what}: {response.status_code} {response.text}", flush=True)


def _counter(metrics: str, name: str) -> int:
    found = re.search(rf"^moe_serve_{name}_total (\d+)", metrics, re.MULTILINE)
    return int(found[1]) if found else 0


def _draw(options: Options, records: Sequence[Record], what: Served | None) -> None:
    """By the server's clock, where it is this process; else from the first request on."""
    first, between = latencies(records)
    begin = what.engine.telemetry.start if what else min(record.sent for record in records)
    first = [(at - begin, took) for at, took in first]
    between = [(at - begin, took) for at, took in between]
    marks = list(what.engine.telemetry.marks) if what else []
    (options.out / "serving_latency.png").write_bytes(latency_picture(first, between, marks))
