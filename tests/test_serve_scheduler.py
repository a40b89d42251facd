# SPDX-License-Identifier: Apache-2.0
"""The example server's scheduler and texts, without JAX and without a model."""

import dataclasses
import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_serve.plans import Request, StepPlan
from moe_serve.scheduler import Scheduler
from moe_serve.text import TextStream

MAX_LEN = 40
WIDTHS = (4, 8)


def _next_byte(read: bytes) -> int:
    """The model that these tests have: what follows depends on all that was read."""
    return hashlib.sha256(read).digest()[0] % 8


def _text(request: Request) -> bytes:
    """What it writes, one request at a time."""
    text = b""
    while len(text) < request.max_tokens and not any(text.endswith(s) for s in request.stop):
        text += bytes([_next_byte(request.prompt + text)])
    return text


class Simulation:
    """A scheduler, and devices that remember what was read into their slots."""

    def __init__(self, num_devices: int, slots: int, budget: int = 12) -> None:
        self.slots = slots
        self.budget = budget
        self.scheduler = Scheduler(
            num_devices=num_devices,
            slots_per_device=slots,
            max_len=MAX_LEN,
            widths=WIDTHS,
            max_prefill_tokens=budget,
        )
        self.alive = [True] * num_devices
        self.memory: dict[tuple[int, int], bytes] = {}
        self.texts: dict[int, bytearray] = {}
        self.finish: dict[int, str] = {}

    def add(self, request: Request) -> None:
        self.scheduler.add(request)
        self.texts[request.id] = bytearray()

    def set_alive(self, alive: list[bool]) -> None:
        self.alive = alive
        self.scheduler.set_alive(alive)
        for at in [at for at in self.memory if not alive[at[0]]]:
            del self.memory[at]

    def run(self, plan: StepPlan) -> list[int]:
        """Checks a plan, and reads and writes what it says."""
        places = [(row.device, row.slot) for row in (*plan.prefill, *plan.decode)]
        assert len(set(places)) == len(places)
        assert all(self.alive[d] and 0 <= s < self.slots for d, s in places)
        assert len({row.device for row in plan.prefill}) == len(plan.prefill)
        assert all(len(row.tokens) == 1 for row in plan.decode)
        assert all(1 < len(row.tokens) <= plan.width for row in plan.prefill)
        assert sum(len(row.tokens) for row in plan.prefill) <= self.budget
        assert plan.width in (0, *WIDTHS)
        tokens = []
        for row in (*plan.prefill, *plan.decode):
            before = self.memory.get((row.device, row.slot), b"")[: row.start]
            assert len(before) == row.start, "it reads on where nothing was read before"
            self.memory[row.device, row.slot] = before + row.tokens
            tokens.append(_next_byte(before + row.tokens))
        return tokens

    def step(self) -> None:
        plan = self.scheduler.plan()
        self.commit(plan, self.run(plan))

    def commit(self, plan: StepPlan, tokens: list[int]) -> None:
        for event in self.scheduler.commit((*plan.prefill, *plan.decode), tokens):
            assert event.request_id not in self.finish
            self.texts[event.request_id].append(event.token)
            if event.finish:
                self.finish[event.request_id] = event.finish


REQUESTS = st.lists(
    st.builds(
        Request,
        id=st.just(0),
        prompt=st.binary(min_size=1, max_size=25),
        max_tokens=st.integers(1, 15),
        stop=st.lists(st.binary(min_size=1, max_size=2), max_size=1).map(tuple),
    ),
    min_size=1,
    max_size=12,
).map(lambda rs: [dataclasses.replace(r, id=i) for i, r in enumerate(rs)])


@given(REQUESTS, st.integers(1, 3), st.integers(1, 3), st.data())
def test_texts_do_not_depend_on_who_else_is_there_nor_on_who_leaves(requests, devices, slots, data):
    simulation = Simulation(devices, slots)
    waiting, cancelled = list(requests), set()
    for _ in range(2000):
        what = data.draw(st.integers(0, 9)) if waiting or simulation.scheduler.num_running else 9
        if waiting and what < 4:
            simulation.add(waiting.pop(0))
        elif what == 4 and devices > 1:
            alive = data.draw(st.lists(st.booleans(), min_size=devices, max_size=devices))
            if any(alive):
                simulation.set_alive(alive)
        elif what == 5 and simulation.texts:
            victim = data.draw(st.sampled_from(sorted(simulation.texts)))
            simulation.scheduler.cancel(victim)
            cancelled.add(victim)
        elif what == 6:
            # A plan that is thrown away, as when a rank leaves while the step runs.
            simulation.run(simulation.scheduler.plan())
        else:
            simulation.step()
        if not waiting and simulation.scheduler.is_idle:
            break
    assert simulation.scheduler.is_idle, "somebody starves"
    for request in requests:
        text, want = bytes(simulation.texts[request.id]), _text(request)
        if request.id in cancelled and request.id not in simulation.finish:
            assert want.startswith(text)
        else:
            assert text == want
            stops = any(text.endswith(stop) for stop in request.stop)
            assert simulation.finish[request.id] == ("stop" if stops else "length")
    # All slots are free again: as many run as there is room for.
    simulation.set_alive([True] * devices)
    for i in range(devices * slots + 1):
        simulation.add(Request(id=1000 + i, prompt=b"x", max_tokens=2))
    simulation.step()
    assert (simulation.scheduler.num_running, simulation.scheduler.num_waiting) == (
        devices * slots,
        1,
    )


def test_first_come_is_first_served_and_devices_fill_evenly():
    simulation = Simulation(num_devices=2, slots=2)
    for i in range(5):
        simulation.add(Request(id=i, prompt=b"p", max_tokens=3 + i))
    plan = simulation.scheduler.plan()
    assert [(r.request.id, r.device, r.slot) for r in plan.decode] == [
        (0, 0, 0),
        (1, 1, 0),
        (2, 0, 1),
        (3, 1, 1),
    ]
    for _ in range(3):
        simulation.step()
    assert simulation.finish == {0: "length"}
    rows = {r.request.id: (r.device, r.slot) for r in simulation.scheduler.plan().decode}
    assert rows[4] == (0, 0)


def test_who_writes_waits_for_no_more_than_one_step_of_prompts():
    simulation = Simulation(num_devices=2, slots=3, budget=10)
    simulation.add(Request(id=0, prompt=b"w", max_tokens=20))
    simulation.step()
    for i in range(1, 6):
        simulation.add(Request(id=i, prompt=bytes(range(20)), max_tokens=5))
    for _ in range(15):
        plan = simulation.scheduler.plan()
        assert 0 in [row.request.id for row in plan.decode]
        assert sum(len(row.tokens) for row in plan.prefill) <= 10
        simulation.commit(plan, simulation.run(plan))


def test_sequences_of_a_rank_that_leaves_go_first_and_read_again():
    simulation = Simulation(num_devices=2, slots=1)
    for i in range(3):
        simulation.add(Request(id=i, prompt=b"abc", max_tokens=9))
    for _ in range(4):
        simulation.step()
    before = bytes(simulation.texts[0])
    assert len(before) == 4
    assert simulation.scheduler.set_alive([False, True]) == 1
    simulation.scheduler.cancel(1)
    (row,) = simulation.scheduler.plan().prefill
    assert (row.request.id, row.device, row.start) == (0, 1, 0)
    assert row.tokens == b"abc" + before
    assert row.writes


@pytest.mark.parametrize(("prompt", "wanted"), [(b"", 1), (b"x", 0), (b"x" * 30, 11)])
def test_what_does_not_fit_is_refused(prompt, wanted):
    scheduler = Simulation(1, 1).scheduler
    with pytest.raises(
        ValueError, match=rf"has {len(prompt)} bytes and wants {wanted}; allowed: .*40"
    ):
        scheduler.add(Request(id=0, prompt=prompt, max_tokens=wanted))
    scheduler.add(Request(id=0, prompt=b"x" * 30, max_tokens=10))


@pytest.mark.parametrize("widths", [(), (1, 4), (8, 4), (4, 4)])
def test_bad_widths_are_refused(widths):
    with pytest.raises(ValueError, match="widths is"):
        Scheduler(num_devices=1, slots_per_device=1, max_len=9, widths=widths, max_prefill_tokens=9)


# --- text ----------------------------------------------------------------------------------------


@given(
    *(st.text("ab€", max_size=12), st.text("ab€", max_size=3)),
    *(st.text("ab€", max_size=12), st.integers(1, 3), st.data()),
)
def test_text_is_the_same_however_it_is_cut(before, stop, after, kept, data):
    # Whole or in part, the stop sequence is there.
    encoded = (before + stop[:kept] + after).encode()
    stops = (stop.encode(),) if stop else ()
    want = encoded.partition(*stops)[0] if stops else encoded
    stream, shown, rest = TextStream(stops), [], encoded
    while rest:
        length = data.draw(st.integers(1, 3))
        shown.append(stream.add(rest[:length]))
        rest = rest[length:]
    shown.append(stream.end())
    assert "".join(shown) == want.decode(errors="replace")


def test_nothing_is_shown_that_is_taken_back():
    stream = TextStream((b"\n\n",))
    assert [stream.add(bytes([b])) for b in "a€\nb\n\nc".encode()] == [
        *("a", "", "", "€"),
        *("", "\nb", "", "", ""),
    ]
    assert stream.end() == ""


def test_bytes_that_are_no_text_are_replaced():
    stream = TextStream()
    assert stream.add(b"x\xff\xe2\x82") == "x\ufffd"
    assert stream.end() == "\ufffd"
