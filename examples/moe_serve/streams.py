# SPDX-License-Identifier: Apache-2.0
"""What goes from the engine's thread to who waits for it on asyncio's."""

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncIterator, Callable


class EngineClosed(RuntimeError):
    """The engine has stopped, or is about to."""


class QueueFull(RuntimeError):
    """As many requests wait as may."""


@dataclasses.dataclass(frozen=True)
class Token:
    """A byte of a stream.

    Attributes:
        byte: which.
        logprob: logarithm of its probability.
        finish: why it is the last one, or None.
    """

    byte: int
    logprob: float
    finish: str | None


class Stream:
    """The bytes of one request, as they come. To be closed, at the end or before."""

    def __init__(self, loop: asyncio.AbstractEventLoop, when_closed: Callable[[], None]) -> None:
        """Made by `Engine.open`."""
        self.is_new = True
        self.last = time.perf_counter()
        self._loop = loop
        self._queue: asyncio.Queue[Token | EngineClosed] = asyncio.Queue()
        self._when_closed = when_closed
        self._is_closed = False

    async def __aiter__(self) -> AsyncIterator[Token]:
        """All bytes.

        Raises:
            EngineClosed: the engine has stopped before the last.
        """
        while True:
            token = await self._queue.get()
            if isinstance(token, EngineClosed):
                raise token
            yield token
            if token.finish:
                return

    def close(self) -> None:
        """Nobody waits any longer; what has not been written is cancelled."""
        if not self._is_closed:
            self._is_closed = True
            self._when_closed()

    def put(self, item: Token | EngineClosed) -> None:
        """By the engine's thread."""
        # Where the loop has ended, so has who waited.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._queue.put_nowait, item)
