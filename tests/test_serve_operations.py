# SPDX-License-Identifier: Apache-2.0
"""The example server as operators and load generators see it."""

import asyncio
import re
import socket

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from ep_serving.fake_server import Server, events_of, text_at, with_client
from moe_serve import loadgen
from moe_serve.loadgen import plan, send
from moe_serve.options import parse
from moe_serve.run import _running, leaving
from moe_serve.served import Served


def test_a_rank_leaves_in_the_middle_of_a_step():
    async def test(server, client):
        server.model.may_step.clear()
        body = {"prompt": "hello", "max_tokens": 12}
        tasks = [asyncio.ensure_future(client.post("/v1/completions", json=body)) for _ in range(4)]
        await server.until(lambda: server.telemetry.counters["requests"] == 4)
        await server.until(server.model.in_step.is_set)
        num_others = server.num_commands
        leave = asyncio.ensure_future(client.post("/admin/ranks/2", json={"alive": False}))
        await server.until(lambda: server.num_commands > num_others)
        server.model.may_step.set()
        texts = [(await task).json()["choices"][0]["text"] for task in tasks]
        assert (await leave).json() == {"alive": [True, True, False, True]}
        assert texts == [text_at(5, 12)] * 4
        assert server.telemetry.counters["thrown_away"] == 1
        assert server.gauge("alive_ranks") == 3
        # 8 experts on 4 ranks.
        assert server.model.has_expert.tolist() == [[True] * 4 + [False] * 2 + [True] * 2] * 2
        assert server.model.alive.tolist() == [True, True, False, True]
        assert all(row.device != 2 for rows in server.model.rows[-3:] for row in rows)
        (await client.post("/admin/ranks/2", json={"alive": True})).raise_for_status()
        assert server.model.has_expert.all()
        assert server.model.alive.all()
        assert [text for _, text in server.telemetry.marks] == [
            f"rank 2 leaves, {server.telemetry.counters['moved']} sequences move",
            "rank 2 comes back",
        ]

    with_client(test)


def test_a_prompt_is_counted_again_where_its_sequence_moves():
    async def test(server, client):
        server.model.pause_at = 4
        body = {"prompt": "hello", "max_tokens": 12}
        task = asyncio.ensure_future(client.post("/v1/completions", json=body))
        await server.until(lambda: server.telemetry.counters["written_bytes"] == 4)
        leave = asyncio.ensure_future(client.post("/admin/ranks/0", json={"alive": False}))
        await server.until(lambda: server.num_commands == 1)
        server.model.may_step.set()
        await leave
        assert (await task).json()["choices"][0]["text"] == text_at(5, 12)
        rows = [row for rows in server.model.rows for row in rows]
        assert [len(row.tokens) for row in rows if len(row.tokens) > 1] == [5, 5 + 4]
        assert server.telemetry.counters["moved"] == 1
        assert server.telemetry.counters["prompt_bytes"] == 5 + 5

    with_client(test)


# uvicorn ends its thread by SystemExit, which Python passes over there, and pytest does not.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_port_that_is_taken_is_named():
    served = Served(engine=Server().engine, title="", health=lambda: None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        message = re.escape(f"--host, --port: 127.0.0.1 and {port} cannot be listened on")
        with (
            pytest.raises(ValueError, match=message),
            _running(parse(["--port", str(port)])[0], served),
        ):
            pass


def test_the_program_says_whether_its_rank_has_left(capsys):
    said = []

    def says() -> bool:
        said.extend(capsys.readouterr().out.splitlines())
        return len(said) == len(asked)

    async def test():
        server = Server()
        async with server.served() as (client, _):
            url = str(client.base_url)
            for rank in range(4):
                asked.append(rank)
                async with leaving(parse(["--fail-rank", f"{rank}@0s"])[0], url):
                    await server.until(says)
            async with leaving(parse(["--fail-rank", "0@60s"])[0], url):
                await asyncio.sleep(0)
        asked.append(1)
        async with leaving(parse(["--fail-rank", "1@0s"])[0], url):
            await server.until(says)

    asked: list[int] = []
    asyncio.run(test())
    assert said[2] == 'rank 2 leaves: 200 {"alive":[false,false,false,true]}'
    assert said[3].startswith("rank 3 has not left: 422 ")
    assert "which have 0 experts" in said[3]
    assert said[4:] == ["rank 1 has not left: ConnectError: All connection attempts failed"]


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/admin/ranks/4", {"alive": False}, "rank is 4; allowed: 0 to 3"),
        ("/admin/ranks/0", {"alive": 1}, 'allowed: {"alive": true or false}'),
        ("/admin/ranks/0", {}, "body is {}"),
    ],
)
def test_what_an_operator_cannot_do(path, body, message):
    async def test(server, client):
        return await client.post(path, json=body)

    response = with_client(test)
    assert response.status_code == 422
    assert message in response.json()["error"]["message"]


def test_the_last_experts_do_not_leave():
    async def test(server, client):
        for rank in range(3):
            (await client.post(f"/admin/ranks/{rank}", json={"alive": False})).raise_for_status()
        last = await client.post("/admin/ranks/3", json={"alive": False})
        text = await client.post("/v1/completions", json={"prompt": "a", "max_tokens": 2})
        return last, text.json()["choices"][0]["text"], await client.post("/admin/rebalance")

    last, text, rebalance = with_client(test)
    assert last.status_code == 422
    assert "which have 0 experts; allowed: at least 2" in last.json()["error"]["message"]
    assert text == text_at(1, 2)
    assert rebalance.status_code == 409


def test_an_engine_that_fails_says_so_to_everybody():
    async def test(server, client):
        server.model.may_step.clear()
        body = {"prompt": "a", "max_tokens": 5}
        tasks = [
            asyncio.ensure_future(client.post("/v1/completions", json={**body, "stream": stream}))
            for stream in (False, True)
        ]
        await server.until(lambda: server.telemetry.counters["requests"] == 2)
        server.model.error = RuntimeError("no such luck")
        server.model.may_step.set()
        one, stream = await asyncio.gather(*tasks)
        later = await client.post("/v1/completions", json=body)
        admin = await client.post("/admin/ranks/0", json={"alive": False})
        return one, stream, later, admin, await client.get("/healthz")

    one, stream, later, admin, health = with_client(test)
    assert [r.status_code for r in (one, later, admin, health)] == [503] * 4
    assert all("no such luck" in r.text for r in (one, stream, later, admin, health))
    assert events_of(stream.text)[-1]["error"]["code"] == 503


def test_health_is_that_of_the_group():
    problems = [None, "rank 2 has waited 10 s for rank 5"]

    async def test(server, client):
        return await client.get("/healthz"), await client.get("/healthz")

    fine, bad = with_client(test, health=lambda: problems.pop(0))
    assert (fine.status_code, fine.text) == (200, "ok")
    assert (bad.status_code, bad.text) == (503, "rank 2 has waited 10 s for rank 5")


def test_metrics_are_what_prometheus_reads():
    async def test(server, client):
        assert (await client.get("/load.png")).status_code == 404
        body = {"prompt": "hello", "max_tokens": 7}
        bodies = [*[body] * 5, {**body, "prompt": "a"}]
        await asyncio.gather(*[client.post("/v1/completions", json=body) for body in bodies])
        picture = await client.get("/load.png")
        assert picture.headers["content-type"] == "image/png"
        assert picture.content.startswith(b"\x89PNG")
        return (await client.get("/metrics")).text, (await client.get("/v1/models")).json()

    text, models = with_client(test)
    assert models["data"][0]["id"] == "tiny"
    samples = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation
        assert family.type in ("counter", "gauge", "histogram")
        samples |= {(s.name, *s.labels.values()): s.value for s in family.samples}
    assert samples["moe_serve_requests_total",] == 6
    assert samples["moe_serve_prompt_bytes_total",] == 5 * 5 + 1
    assert samples["moe_serve_written_bytes_total",] == 6 * 7
    assert samples["moe_serve_running",] == samples["moe_serve_queue",] == 0
    assert samples["moe_serve_first_byte_seconds_count",] == 6
    assert samples["moe_serve_next_byte_seconds_count",] == 6 * 6
    assert samples["moe_serve_next_byte_seconds_bucket", "+Inf"] == 6 * 6
    assert samples["moe_serve_next_byte_seconds_sum",] > 0
    # Of 8 experts, 2 to 4 have all loads: rank 1 has two of them, rank 2 one, two ranks none.
    assert samples["moe_serve_rank_imbalance", "0"] == pytest.approx(2 / 3 * 4, abs=1e-3)


def test_the_load_generator_gets_what_it_has_asked_for():
    async def test():
        server = Server(max_open=8)
        planned = plan(
            np.frombuffer(b"some text that is longer than a prompt", np.uint8),
            requests=20,
            rate=0,
            prompt=(3, 20),
            output=(1, 9),
            seed=0,
        )
        async with server.served() as (client, _):
            return planned, await send(str(client.base_url), planned, temperature=0.7)

    planned, records = asyncio.run(test())
    assert [record.planned for record in records] == planned
    good = [record for record in records if not record.error]
    assert len(good) >= 8
    for record in good:
        assert len(record.times) == record.num_written == record.planned.max_tokens
        assert record.sent < record.times[0]
        assert (np.diff(record.times) >= 0).all()
    assert all(r.error.startswith("429: ") for r in records if r.error)


def test_a_request_whose_bytes_stop_coming_has_failed(monkeypatch):
    monkeypatch.setattr(loadgen, "_SILENCE", 0.2)
    text = np.frombuffer(b"some text", np.uint8)
    sizes = {"prompt": (3, 3), "output": (9, 9)}

    async def test():
        server = Server()
        server.model.pause_at = 2
        async with server.served() as (client, _):
            planned = plan(text, requests=1, rate=0, **sizes, seed=0)
            return await send(str(client.base_url), planned, temperature=0)

    (record,) = asyncio.run(test())
    assert record.error.startswith("ReadTimeout")
    assert len(record.times) == 2
