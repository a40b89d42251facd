# SPDX-License-Identifier: Apache-2.0
"""Sends requests as many users would, and writes down when bytes come. No JAX."""

import asyncio
import dataclasses
import json
import time
from collections.abc import Sequence

import httpx
import numpy as np

# Seconds without a byte after which a request has failed; the longest queue is to move in them.
_SILENCE = 120


@dataclasses.dataclass(frozen=True)
class Planned:
    """A request to come.

    Attributes:
        second: when it is sent, from the start.
        prompt: bytes of the held-out text.
        max_tokens: bytes to write.
        seed: of what is drawn.
    """

    second: float
    prompt: bytes
    max_tokens: int
    seed: int


@dataclasses.dataclass
class Record:
    """What became of a request.

    Attributes:
        planned: which it was.
        sent: when, in seconds of `time.perf_counter`.
        times: when each part of its text came.
        num_written: bytes that the server has written, as it says.
        error: what went wrong; empty if nothing.
    """

    planned: Planned
    sent: float = 0.0
    times: list[float] = dataclasses.field(default_factory=list)
    num_written: int = 0
    error: str = ""


def plan(
    text: np.ndarray,
    *,
    requests: int,
    rate: float,
    prompt: tuple[int, int],
    output: tuple[int, int],
    seed: int,
) -> list[Planned]:
    """Requests of a Poisson process, with lengths that are evenly distributed.

    Args:
        text: `[N]` uint8, from which prompts are taken.
        requests: how many.
        rate: a second, in the mean; 0: all at once.
        prompt: fewest and most bytes of a prompt.
        output: fewest and most bytes to write.
        seed: of all that is random.
    """
    rng = np.random.default_rng(seed)
    gaps = rng.exponential(1 / rate, requests) if rate else np.zeros(requests)
    planned = []
    for second in np.cumsum(gaps) - gaps[0]:
        length = int(rng.integers(prompt[0], prompt[1], endpoint=True))
        at = int(rng.integers(len(text) - length))
        most = int(rng.integers(output[0], output[1], endpoint=True))
        own = int(rng.integers(1 << 31))
        planned.append(Planned(float(second), text[at : at + length].tobytes(), most, own))
    return planned


async def send(url: str, planned: Sequence[Planned], *, temperature: float) -> list[Record]:
    """Sends each at its time, whatever has become of those before."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    timeout = httpx.Timeout(None, connect=30, read=_SILENCE)
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=timeout) as client:
        begin = time.perf_counter()
        tasks = [asyncio.ensure_future(_send(client, one, begin, temperature)) for one in planned]
        return await asyncio.gather(*tasks)


async def _send(
    client: httpx.AsyncClient, planned: Planned, begin: float, temperature: float
) -> Record:
    await asyncio.sleep(begin + planned.second - time.perf_counter())
    record = Record(planned)
    body = {
        "prompt": list(planned.prompt),
        "max_tokens": planned.max_tokens,
        "temperature": temperature,
        "seed": planned.seed,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    record.sent = time.perf_counter()
    try:
        async with client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                await response.aread()
                record.error = f"{response.status_code}: {response.text}"
                return record
            async for line in response.aiter_lines():
                _take(record, line)
    except httpx.HTTPError as error:
        record.error = f"{type(error).__name__}: {error}"
    if not record.error and not record.num_written:
        record.error = "the stream has ended early"
    return record


def _take(record: Record, line: str) -> None:
    """A line of a stream."""
    if not line.startswith("data: {"):
        return
    event = json.loads(line.removeprefix("data: "))
    if "error" in event:
        record.error = event["error"]["message"]
    elif "usage" in event:
        record.num_written = event["usage"]["completion_tokens"]
    else:
        record.times.append(time.perf_counter())
