# SPDX-License-Identifier: Apache-2.0
"""The server's HTTP side, on Starlette."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from moe_serve.completions import Answer, Asked, BadField, parse
from moe_serve.engine import Engine
from moe_serve.plots import load_picture
from moe_serve.streams import EngineClosed, QueueFull, Stream, Token
from moe_serve.text import TextStream

_MAX_BODY = 1 << 20
# nginx's number for a client that has gone; nobody reads it.
_GONE = 499
# Seconds after which who was refused may ask again.
_RETRY_AFTER = {"Retry-After": "1"}


def make_app(
    engine: Engine,
    *,
    model: str = "moe_lm",
    health: Callable[[], str | None] = lambda: None,
    rebalance: Callable[[], Any] | None = None,
) -> Starlette:
    """The application; the engine runs as long as its lifespan.

    Args:
        engine: has not been started.
        model: its name.
        health: says what is wrong, if anything; called by `/healthz`.
        rebalance: run by the engine's thread for `/admin/rebalance`; None: there are no copies.
    """
    return _Server(engine, model, health, rebalance).app()


class _Server:
    def __init__(
        self,
        engine: Engine,
        model: str,
        health: Callable[[], str | None],
        rebalance: Callable[[], Any] | None,
    ) -> None:
        self._engine = engine
        self._model = model
        self._health = health
        self._rebalance = rebalance
        self._num_requests = 0

    def app(self) -> Starlette:
        routes = [
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/models", self.models),
            Route("/healthz", self.healthz),
            Route("/metrics", self.metrics),
            Route("/load.png", self.load),
            Route("/admin/ranks/{rank:int}", self.set_rank, methods=["POST"]),
            Route("/admin/rebalance", self.rebalance, methods=["POST"]),
        ]
        return Starlette(
            routes=routes, lifespan=self._lifespan, exception_handlers={HTTPException: _refuse}
        )

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        self._engine.start()
        try:
            yield
        finally:
            # By now the requests that were open are answered.
            await run_in_threadpool(self._engine.close)

    # --- completions ----------------------------------------------------------------------------

    async def completions(self, request: Request) -> Response:
        """A text that goes on from a prompt, at once or as a stream."""
        try:
            asked = parse(await _body(request), model=self._model)
        except BadField as error:
            raise HTTPException(422, str(error)) from error
        try:
            stream = self._engine.open(asked.request)
        except ValueError as error:
            raise HTTPException(422, str(error)) from error
        except QueueFull as error:
            raise HTTPException(429, str(error), _RETRY_AFTER) from error
        except EngineClosed as error:
            raise HTTPException(503, str(error), _RETRY_AFTER) from error
        self._num_requests += 1
        answer = Answer(asked, f"cmpl-{self._num_requests}", self._model)
        if asked.stream:
            return _EventStream(stream, asked, answer)
        try:
            return await _unless_gone(request, _whole(stream, asked, answer))
        except EngineClosed as error:
            raise HTTPException(503, str(error), _RETRY_AFTER) from error
        finally:
            stream.close()

    # --- what it tells --------------------------------------------------------------------------

    async def models(self, request: Request) -> Response:
        """The one that there is."""
        model = {"id": self._model, "object": "model", "created": 0, "owned_by": "jax_ep"}
        return JSONResponse({"object": "list", "data": [model]})

    async def healthz(self, request: Request) -> Response:
        """200, or 503 with what is wrong."""
        try:
            self._engine.check()
            problem = self._health()
        except EngineClosed as error:
            problem = str(error)
        return PlainTextResponse(problem or "ok", 503 if problem else 200)

    async def metrics(self, request: Request) -> Response:
        """For Prometheus."""
        text = self._engine.telemetry.prometheus()
        return Response(text, media_type="text/plain; version=0.0.4")

    async def load(self, request: Request) -> Response:
        """Loads of the experts and ranks over time, as a picture."""
        telemetry = self._engine.telemetry
        if not telemetry.loads:
            raise HTTPException(404, "no step has been written down yet")
        loads, marks = list(telemetry.loads), list(telemetry.marks)
        picture = await run_in_threadpool(load_picture, loads, marks)
        return Response(picture, media_type="image/png")

    # --- what operators do ----------------------------------------------------------------------

    async def set_rank(self, request: Request) -> Response:
        """Has a rank leave, or come back."""
        body = await _body(request)
        if not isinstance(body, dict) or not isinstance(body.get("alive"), bool) or len(body) > 1:
            raise HTTPException(422, f'body is {body!r}; allowed: {{"alive": true or false}}')
        rank = request.path_params["rank"]
        await self._administer(self._engine.set_alive(rank, body["alive"]))
        return JSONResponse({"alive": self._engine.alive})

    async def rebalance(self, request: Request) -> Response:
        """Plans anew for the loads since the last time."""
        if self._rebalance is None:
            raise HTTPException(409, "experts have no copies; start with --spare-slots")
        answer = await self._administer(self._engine.call(self._rebalance))
        return JSONResponse({"decision": answer})

    async def _administer(self, change: Awaitable[Any]) -> Any:
        try:
            return await change
        except ValueError as error:
            raise HTTPException(422, str(error)) from error
        except EngineClosed as error:
            raise HTTPException(503, str(error), _RETRY_AFTER) from error


async def _body(request: Request) -> Any:
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > _MAX_BODY:
            raise HTTPException(413, f"the body is longer than {_MAX_BODY} bytes")
    try:
        return json.loads(body)
    except ValueError as error:
        raise HTTPException(400, f"the body is no JSON: {error}") from error


async def _whole(stream: Stream, asked: Asked, answer: Answer) -> Response:
    """All of a text."""
    tokens = [token async for token in stream]
    text = TextStream(asked.request.stop)
    shown = text.add(bytes(token.byte for token in tokens)) + text.end()
    return JSONResponse({**answer.part(shown, tokens), "usage": answer.usage(len(tokens))})


class _EventStream(StreamingResponse):
    """A text as server-sent events, a byte or a whole character each."""

    def __init__(self, stream: Stream, asked: Asked, answer: Answer) -> None:
        super().__init__(_events(stream, asked, answer), media_type="text/event-stream")
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends it; ends when the client goes."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._stream.close()


async def _events(stream: Stream, asked: Asked, answer: Answer) -> AsyncIterator[str]:
    text, num_written = TextStream(asked.request.stop), 0
    held: list[Token] = []  # of which nothing can be shown yet
    try:
        async for token in stream:
            num_written += 1
            held.append(token)
            shown = text.add(bytes([token.byte])) + (text.end() if token.finish else "")
            if shown or token.finish:
                yield _event(answer.part(shown, held))
                held = []
    except EngineClosed as error:
        yield _event(_error(503, str(error)))
    else:
        if asked.with_usage:
            yield _event({**answer.part("", []), "choices": [], "usage": answer.usage(num_written)})
    yield "data: [DONE]\n\n"


def _event(data: Any) -> str:
    return f"data: {json.dumps(data)}\n\n"


async def _unless_gone(request: Request, answer: Coroutine[Any, Any, Response]) -> Response:
    """The answer, unless the client goes before it is there."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks: list[asyncio.Future[Any]]
    tasks = [asyncio.ensure_future(answer), asyncio.ensure_future(gone())]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0] in done else Response(status_code=_GONE)
    finally:
        for task in tasks:
            task.cancel()


def _error(status: int, text: str) -> dict[str, Any]:
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": text, "type": kind, "code": status}}


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    status = error.status_code
    return JSONResponse(_error(status, error.detail), status, error.headers)
