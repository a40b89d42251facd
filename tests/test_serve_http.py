# SPDX-License-Identifier: Apache-2.0
"""The example server's completions, as its clients see them."""

import asyncio
import contextlib
import json

import numpy as np
import pytest

from ep_serving.fake_server import Server, events_of, text_at, with_client


def test_a_text_at_once():
    async def test(server, client):
        body = {"prompt": "hello", "max_tokens": 12, "logprobs": 1, "temperature": 0}
        return (await client.post("/v1/completions", json=body)).json()

    answer = with_client(test)
    (choice,) = answer["choices"]
    assert choice["text"] == text_at(5, 12)
    assert choice["finish_reason"] == "length"
    assert choice["logprobs"]["tokens"] == list(text_at(5, 12))
    np.testing.assert_allclose(choice["logprobs"]["token_logprobs"], np.log(0.25))
    assert answer["usage"] == {"prompt_tokens": 5, "completion_tokens": 12, "total_tokens": 17}
    assert (answer["object"], answer["model"]) == ("text_completion", "tiny")


def test_a_stream_has_the_same_text_and_says_how_much():
    async def test(server, client):
        body = {"prompt": "hello", "max_tokens": 12, "stream": True}
        plain = await client.post("/v1/completions", json=body)
        body["stream_options"] = {"include_usage": True}
        return plain, await client.post("/v1/completions", json=body)

    plain, with_usage = with_client(test)
    assert plain.headers["content-type"].startswith("text/event-stream")
    events = events_of(plain.text)
    assert len(events) == 12
    assert "".join(e["choices"][0]["text"] for e in events) == text_at(5, 12)
    assert [e["choices"][0]["finish_reason"] for e in events] == [None] * 11 + ["length"]
    *_, last = events_of(with_usage.text)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 12


def test_a_text_ends_before_its_stop():
    whole = text_at(5, 12)
    stop = whole[6:8]

    async def test(server, client):
        body = {"prompt": "hello", "max_tokens": 12, "stop": stop}
        one = await client.post("/v1/completions", json=body)
        return one.json(), await client.post("/v1/completions", json={**body, "stream": True})

    one, stream = with_client(test)
    want = whole[: whole.index(stop)]
    assert one["choices"][0]["text"] == want
    assert one["choices"][0]["finish_reason"] == "stop"
    assert one["usage"]["completion_tokens"] == len(want) + 2
    events = events_of(stream.text)
    assert "".join(e["choices"][0]["text"] for e in events) == want
    assert events[-1]["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"heat": 1}, "heat is 1; allowed: fields that"),
        ({"max_tokens": 64}, "the request has 1 bytes and wants 64; allowed: "),
    ],
)
def test_what_is_asked_for_wrongly_is_refused(field, message):
    async def test(server, client):
        response = await client.post("/v1/completions", json={"prompt": "a", **field})
        fine = await client.post("/v1/completions", json={"prompt": "a", "n": 1, "user": "me"})
        assert fine.status_code == 200
        return response

    response = with_client(test)
    assert response.status_code == 422
    assert message in response.json()["error"]["message"]


def test_what_is_no_json_or_too_long_is_refused():
    async def test(server, client):
        bad = await client.post("/v1/completions", content=b"{")
        long = await client.post("/v1/completions", content=b" " * (1 << 21))
        return bad, long, await client.get("/v1/completions"), await client.get("/nowhere")

    statuses = [response.status_code for response in with_client(test)]
    assert statuses == [400, 413, 405, 404]


def test_a_full_queue_says_when_to_come_again():
    async def test(server, client):
        server.model.may_step.clear()
        body = {"prompt": "a", "max_tokens": 3}
        tasks = [asyncio.ensure_future(client.post("/v1/completions", json=body)) for _ in range(5)]
        await server.until(lambda: server.telemetry.counters["requests"] == 5)
        refused = await client.post("/v1/completions", json=body)
        server.model.may_step.set()
        served = await asyncio.gather(*tasks)
        again = await client.post("/v1/completions", json=body)
        return refused, served, again

    refused, served, again = with_client(test, max_open=5)
    assert refused.status_code == 429
    assert refused.headers["retry-after"] == "1"
    assert "5 requests are open; allowed: 5" in refused.json()["error"]["message"]
    assert [response.status_code for response in [*served, again]] == [200] * 6


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_leaves_its_slot(stream):
    async def test():
        server = Server()
        async with server.served() as (client, _):
            server.model.may_step.clear()
            body = {"prompt": "a", "max_tokens": 60, "stream": stream}
            task = asyncio.ensure_future(client.post("/v1/completions", json=body))
            await server.until(
                lambda: server.gauge("running") == 1 and server.model.in_step.is_set()
            )
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            # It has gone before the step has ended, and is seen to have before the next begins.
            await server.until(lambda: server.num_commands == 1)
            server.model.may_step.set()
            await server.until(lambda: server.telemetry.counters["cancelled"] == 1)
            await server.until(lambda: server.gauge("running") == 0)
            assert server.telemetry.counters["written_bytes"] <= 1
            fine = await client.post("/v1/completions", json={"prompt": "a", "max_tokens": 2})
            assert fine.json()["choices"][0]["text"] == text_at(1, 2)

    asyncio.run(test())


def test_bytes_come_while_others_are_written():
    async def test():
        server = Server()
        async with server.served() as (client, _):
            server.model.may_step.clear()
            body = {"prompt": "a", "max_tokens": 3, "stream": True}
            async with client.stream("POST", "/v1/completions", json=body) as response:
                lines = response.aiter_lines()
                assert response.status_code == 200  # before any byte
                server.model.may_step.set()
                first = json.loads((await anext(lines)).removeprefix("data: "))
                assert first["choices"][0]["text"] == text_at(1, 1)
                assert len([line async for line in lines if line]) == 3

    asyncio.run(test())


def test_a_server_that_is_told_to_end_writes_what_it_has_begun():
    async def test():
        server = Server()
        async with server.served() as (client, uvicorn_server):
            server.model.may_step.clear()
            body = {"prompt": "a", "max_tokens": 20}
            task = asyncio.ensure_future(client.post("/v1/completions", json=body))
            await server.until(lambda: server.gauge("running") == 1)
            uvicorn_server.should_exit = True  # as SIGTERM does
            (listening,) = uvicorn_server.servers
            await server.until(lambda: not listening.is_serving())
            assert not task.done()
            server.model.may_step.set()
            return (await task).json()

    assert asyncio.run(test())["choices"][0]["text"] == text_at(1, 20)
