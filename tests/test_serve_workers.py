# SPDX-License-Identifier: Apache-2.0
"""The example server's workers: what they are told, how they end, and who is told of it."""

import contextlib
import multiprocessing
import queue
import re
import threading
import time

import numpy as np
import pytest

from ep_serving import stub_worker
from ep_serving.fake_server import text_at
from ep_serving.processes import TINY, assert_gone, scheduler, write
from moe_serve import engine as engines
from moe_serve import wire, workers
from moe_serve.experts import FixedExperts
from moe_serve.options import parse
from moe_serve.plans import Request
from moe_serve.remote import RemoteModel
from moe_serve.telemetry import Telemetry
from moe_serve.workers import WorkerEnded, Workers

pytestmark = pytest.mark.example


# --- messages ------------------------------------------------------------------------------------


def test_a_plan_over_the_socket_is_the_plan_without_what_the_scheduler_keeps():
    order, random = scheduler(), np.random.default_rng(0)
    for number in range(6):
        order.add(
            Request(
                id=number,
                prompt=random.bytes(3 + 9 * number),
                max_tokens=5,
                stop=(b"stop",),
                temperature=number / 7,
                top_k=number,
                top_p=1 - number / 10,
                seed=-number,
            )
        )
    ours, theirs = multiprocessing.Pipe()
    kinds = set()
    for _ in range(8):
        plan = order.plan()
        ours.send(wire.Run(wire.packed(plan)))
        found = wire.unpacked(theirs.recv().plan)
        assert (found.width, len(found.prefill)) == (plan.width, len(plan.prefill))
        for row, other in zip(plan.rows, found.rows, strict=True):
            same = ("device", "slot", "start", "tokens", "writes")
            assert all(getattr(row, name) == getattr(other, name) for name in same)
            same = ("id", "temperature", "top_k", "top_p", "seed")
            assert all(getattr(row.request, n) == getattr(other.request, n) for n in same)
            assert (other.request.prompt, other.request.stop) == (b"", ())
        kinds.add((bool(plan.prefill), bool(plan.decode)))
        order.commit(plan.rows, [7] * len(plan.rows))
    assert {(True, True), (False, True)} <= kinds
    long = Request(id=1, prompt=bytes(60), max_tokens=5)
    order.add(long)
    assert len(str(wire.packed(order.plan()))) < 1000


# --- workers -------------------------------------------------------------------------------------


@pytest.fixture
def start(monkeypatch):
    """Starts two stubs, which get words of `stub_worker`."""
    monkeypatch.setattr(workers, "_PROGRAM", (stub_worker.__file__,))
    with contextlib.ExitStack() as stack:

        def start(words: str = "", *, is_ready: bool = True) -> Workers:
            monkeypatch.setenv("STUB_WORKER", words)
            serve, options = parse([*TINY, "--processes", "2"])
            found = stack.enter_context(Workers(serve, options, "nowhere"))
            if is_ready:
                titles = [ready.title for ready in found.answers()]
                assert titles == ["a stub of 2"] * 2
            return found

        yield start


def pids(found: Workers) -> list[int]:
    return [worker.process.pid for worker in found._workers]


def test_each_row_is_written_by_the_worker_that_has_its_device(start):
    model = RemoteModel(start(), 2)
    texts = write(model, [bytes(5), bytes(40), bytes(9)], 6)
    assert [text.decode() for text in texts] == [text_at(start, 6) for start in (5, 40, 9)]
    counts = model.take_counts()
    assert counts.shape == (1, 8)
    assert (counts[:, :2] > 0).all()
    assert counts[:, 2:].sum() == 0


def test_workers_end_with_the_block(start):
    serve, options = parse([*TINY, "--processes", "2"])
    start()  # sets the program
    with Workers(serve, options, "nowhere") as found:
        found.answers()
    assert [worker.process.returncode for worker in found._workers] == [0, 0]
    with pytest.raises(KeyError), Workers(serve, options, "nowhere") as found:
        raise KeyError
    assert [worker.process.returncode for worker in found._workers] == [-9, -9]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_worker_that_is_killed_is_named_and_takes_the_others_along(start, victim):
    found = start("stuck")
    told: queue.Queue[WorkerEnded] = queue.Queue()
    found.when_ended(told.put)
    model, order = RemoteModel(found, 2), scheduler()
    order.add(Request(id=1, prompt=b"x", max_tokens=3))
    plan = order.plan()
    threading.Timer(0.2, found._workers[victim].process.kill).start()
    name = rf"worker {victim} \(pid {pids(found)[victim]}, device {victim}\) was ended by SIGKILL"
    with pytest.raises(WorkerEnded, match=f"^{name}$"):
        model.run(plan)
    assert re.fullmatch(name, str(told.get(timeout=10)))
    found.when_ended(told.put)  # whoever asks later is told, too
    assert re.fullmatch(name, str(told.get(timeout=10)))
    assert_gone(pids(found))
    for ask in (lambda: model.run(plan), model.take_counts, lambda: model.set_alive(np.ones(2))):
        with pytest.raises(WorkerEnded, match=name):
            ask()


def test_a_worker_that_is_killed_while_there_is_nothing_to_do_is_named(start):
    found = start()
    told: queue.Queue[WorkerEnded] = queue.Queue()
    found.when_ended(told.put)
    assert found.kill_rank(1).startswith("worker 1 ")
    assert_gone(pids(found))
    assert "device 1) was ended by SIGKILL" in str(told.get(timeout=10))


def test_a_worker_that_fails_says_why(start):
    found = start("fail")
    model = RemoteModel(found, 2)
    with pytest.raises(WorkerEnded, match=r"^worker \d .* has failed: RuntimeError: byte 1$"):
        write(model, [b"a\x01"], 3)
    assert_gone(pids(found))


def test_workers_that_refuse_the_options_say_why(start):
    with pytest.raises(ValueError, match=r"^argument --x: it is odd$"):
        start("refuse")


def test_a_worker_that_is_late_is_a_problem(start, monkeypatch):
    monkeypatch.setattr(workers, "_LATE", 0.3)
    found = start("stuck")
    assert found.problem() is None
    order = scheduler()
    order.add(Request(id=1, prompt=b"x", max_tokens=3))

    def run() -> None:
        with pytest.raises(WorkerEnded):
            RemoteModel(found, 2).run(order.plan())

    asking = threading.Thread(target=run)
    asking.start()
    deadline = time.monotonic() + 10
    while not (problem := found.problem()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert re.fullmatch(r"late for 0 s: worker 0 \(.*\), worker 1 \(.*\)", problem)
    found.kill_rank(0)
    asking.join()


def test_an_engine_that_is_closed_ends_workers_that_stand_still(start, monkeypatch):
    """Else a server whose worker hangs would not end either."""
    monkeypatch.setattr(engines, "_LAST_STEP", 0.3)
    found = start("stuck")
    model, telemetry, order = RemoteModel(found, 2), Telemetry(), scheduler()
    experts = FixedExperts(model, telemetry, num_ranks=2, num_topk=2, every=8)
    engine = engines.Engine(model, order, experts, telemetry, num_ranks=2, max_open=4)
    order.add(Request(id=1, prompt=b"x", max_tokens=3))
    engine.start()
    while not found._pending:
        time.sleep(0.01)
    engine.close()
    assert str(engine.error) == "a step does not end"
    assert_gone(pids(found))


def test_a_worker_that_does_not_start_is_named(start, monkeypatch):
    monkeypatch.setattr(workers, "_PROGRAM", ("-c", "raise SystemExit(3)"))
    monkeypatch.setattr(workers, "_start", slow_start(workers._start))
    serve, options = parse([*TINY, "--processes", "2"])
    with (
        pytest.raises(WorkerEnded, match=r"worker \d \(.*\) has ended with status 3"),
        Workers(serve, options, "nowhere") as found,
    ):
        found.answers()


def slow_start(start):
    """By when it returns, the process has ended."""

    def started(number, each):
        worker = start(number, each)
        worker.process.wait(timeout=30)
        return worker

    return started
