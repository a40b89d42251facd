# SPDX-License-Identifier: Apache-2.0
"""A kernel that does not come back from NVSHMEM is found, and its process ends if it is to."""

import logging
import math
import signal
import subprocess
import sys
import threading

import pytest

from ep_testing.far_failures import PLACES, Clock, Store
from jax_ep._src.groups import far_failures, stuck_kernels
from jax_ep._src.groups import kernel_errors as cuda_watch
from jax_ep._src.groups.far_failures import FarFailures, GiveUp
from jax_ep._src.groups.kernel_errors import GroupWatch, Watch
from jax_ep._src.groups.stuck_kernels import Running, StuckKernels

DISPATCH = 1
KERNEL = Running(0, 1, DISPATCH, "dispatch", 9)
STUCK = "EpGroup 7, group_index 0: rank 1 is stuck inside NVSHMEM in dispatch; likely peers: "


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(stuck_kernels, "time", clock)
    monkeypatch.setattr(far_failures, "time", clock)
    return clock


def _far(store, rank, told=None):
    return FarFailures(
        "EpGroup 7", places=PLACES, local=[(0, rank)], store=store, prefix="jax_ep/abc/1",
        tell=lambda *what: told.append(what) or True,
    )  # fmt: skip


class Process:
    """That of rank 1; `ended` has the text with which it was ended."""

    def __init__(self, *, store=None, timeout=60.0, unread=(), aborts=False):
        self.ended: list[str] = []
        self.far = _far(store, 1)
        self.stuck = StuckKernels(
            "EpGroup 7",
            timeout=timeout,
            domain_size=2,
            places=PLACES,
            far=self.far,
            unread=unread if callable(unread) else lambda *_: unread,
            word=lambda by, blamed, op: by | blamed << 7 | op << 19,
            aborts=aborts,
            end=self.ended.append,
        )

    def look(self, *running, waits=(), error=None):
        status = ("EpGroup 7", 0, 1, error, list(waits))
        self.stuck.look(running, [status] if waits or error else [])


def _errors(caplog):
    return [record.message for record in caplog.records if record.levelname == "ERROR"]


def test_a_kernel_without_a_sign_of_life_is_named_once_after_twice_the_timeout(clock, caplog):
    process = Process(unread=(3,))
    process.look(KERNEL)
    clock.now += 120.0
    process.look(KERNEL)
    assert _errors(caplog) == []  # a wait for the own blocks may take just as long
    clock.now += 0.2
    process.look(KERNEL)
    [text] = _errors(caplog)
    assert text == (
        STUCK + "rank 3 in process 3 (pid 43 on host-1). Its kernel (exchange 9) has given no sign "
        "of life for more than 120 s, which no wait of its own takes, and will not end by itself; "
        "JAX_EP_ABORT=1 would end this process"
    )
    clock.now += 500.0
    process.look(KERNEL)
    assert len(_errors(caplog)) == 1
    assert process.ended == []


def test_a_kernel_that_ends_is_alive_and_so_is_the_next_one(clock, caplog):
    process = Process()
    for exchange in range(5):
        process.look(KERNEL._replace(exchange=exchange))
        clock.now += 100.0
        process.look(KERNEL._replace(exchange=exchange))
    process.look()  # none runs
    clock.now += 1000.0
    process.look(KERNEL)
    clock.now += 100.0
    process.look(KERNEL)
    assert _errors(caplog) == []


def test_what_it_says_of_its_waits_is_a_sign_of_life(clock, caplog):
    # Such waits end at their deadlines: one after the other, they may take longer than two.
    process = Process()
    for seconds in (1.0, 2.0, 4.0, 8.0, 16.0, 32.0):
        process.look(KERNEL, waits=[(3, "dispatch", "a message of rank 3", 9, seconds, False)])
        clock.now += 119.0
    assert _errors(caplog) == []
    ended = [(3, "dispatch", "a message of rank 3", 9, 32.0, True)]
    process.look(KERNEL, waits=ended)
    clock.now += 121.0
    process.look(KERNEL, waits=ended)
    assert len(_errors(caplog)) == 1


def test_a_kernel_that_has_given_up_is_not_stuck(clock, caplog):
    process = Process()
    for _ in range(3):
        process.look(KERNEL, error="rank 1 waited 60 s in dispatch for a message of rank 3")
        clock.now += 500.0
    assert _errors(caplog) == []


def test_without_a_deadline_nothing_is_too_late(clock, caplog):
    process = Process(timeout=math.inf)
    for _ in range(3):
        process.look(KERNEL)
        clock.now += 1e9
    assert _errors(caplog) == []


def test_peers_are_those_of_other_hosts_that_others_name_or_that_wait_for_the_rank(clock, caplog):
    store = Store()
    for give_up in (
        GiveUp(0, 3, 1, 5),  # of the other host: waited for this one
        GiveUp(0, 0, 2, 6),  # of this host: waited for one of the other
        GiveUp(0, 2, 0, 7),  # of the other host: waited for the neighbor, which is no such peer
        GiveUp(1, 2, 3, 8),  # of another EP group
    ):
        _far(store, give_up.by).post(give_up)
    process = Process(store=store)
    process.look(KERNEL)
    clock.now += 121.0
    process.look(KERNEL)
    [text] = _errors(caplog)
    named = text[len(STUCK) :].partition(". Its kernel")[0].split(", ")
    assert sorted(named) == [f"rank {rank} in {PLACES[0, rank]}" for rank in (2, 3)]


def test_who_has_not_read_comes_first_and_nobody_is_said_to_be_nobody(clock, caplog):
    store = Store()
    _far(store, 0).post(GiveUp(0, 0, 2, 6))
    for unread, expected in (
        ((3,), "rank 3 in process 3 (pid 43 on host-1), rank 2 in process 2 (pid 42 on host-1)."),
        ((), "rank 2 in process 2 (pid 42 on host-1)."),
    ):
        caplog.clear()
        process = Process(store=store, unread=unread)
        process.look(KERNEL)
        clock.now += 121.0
        process.look(KERNEL)
        assert STUCK + expected in _errors(caplog)[0]
    caplog.clear()
    alone = Process()
    alone.look(KERNEL)
    clock.now += 121.0
    alone.look(KERNEL)
    assert STUCK + "nothing is known of them." in _errors(caplog)[0]


def test_cuda_that_does_not_answer_delays_it_but_a_moment(clock, caplog, monkeypatch):
    monkeypatch.setattr(stuck_kernels, "_UNREAD_S", 0.05)
    never = threading.Event()
    process = Process(unread=lambda *_: never.wait(30) and ())
    process.look(KERNEL)
    clock.now += 121.0
    process.look(KERNEL)
    never.set()
    assert "nothing is known of them" in _errors(caplog)[0]


def test_a_process_that_is_to_end_tells_the_others_first(clock, caplog):
    store, told = Store(), []
    process = Process(store=store, unread=(3,), aborts=True)
    other = _far(store, 2, told)
    process.look(KERNEL)
    clock.now += 121.0
    process.look(KERNEL)
    [text] = process.ended
    assert text.startswith(STUCK)
    assert text.endswith("; the process ends, as JAX_EP_ABORT=1 says")
    assert len(_errors(caplog)) == 1
    # The kernels of the other host end at once, and say who is to blame.
    other.look([], waits=True, last=False)
    assert told == [(0, 2, 1 | 3 << 7 | DISPATCH << 19)]
    assert other.known() == [GiveUp(0, 1, 3, told[0][2])]


def test_without_a_peer_to_blame_it_blames_itself(clock):
    store = Store()
    process = Process(store=store, aborts=True)
    process.look(KERNEL)
    clock.now += 121.0
    process.look(KERNEL)
    assert [(g.by, g.blamed) for g in process.far.known()] == [(1, 1)]


def test_the_process_ends_with_the_text_on_stderr():
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_CORE, (0, 0))\n"
        "from jax_ep._src.groups import stuck_kernels\n"
        "stuck_kernels.end_process('rank 1 is stuck')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == -signal.SIGABRT
    assert "jax_ep: rank 1 is stuck\n" in done.stderr


@pytest.mark.parametrize(("text", "aborts"), [("", False), ("0", False), ("1", True)])
def test_the_variable_says_whether_it_ends(text, aborts, monkeypatch):
    monkeypatch.setenv("JAX_EP_ABORT", text)
    assert stuck_kernels.aborts() == aborts


def test_another_value_of_the_variable_is_an_error(monkeypatch):
    monkeypatch.setenv("JAX_EP_ABORT", "yes")
    with pytest.raises(ValueError, match="JAX_EP_ABORT is 'yes'; allowed: 0, 1"):
        stuck_kernels.aborts()


def test_the_watch_looks_also_where_no_kernel_has_said_anything(clock, caplog):
    class Module:
        def statuses(self):
            return []

        def give_ups(self):
            return []

        def running(self):
            return [("EpGroup 7", *KERNEL), ("EpGroup 8", *KERNEL)]

    process = Process(unread=(3,))
    watch = Watch(Module())
    group = GroupWatch(
        "EpGroup 7", warn_after=10.0, timeout=60.0, places=PLACES, far=process.far,
        stuck=process.stuck,
    )  # fmt: skip
    watch._groups[group.name] = group
    with caplog.at_level(logging.ERROR, logger="jax_ep"):
        watch.look()
        clock.now += 121.0
        watch.look()
    assert len(_errors(caplog)) == 1
    assert "rank 1 is stuck inside NVSHMEM in dispatch" in caplog.text


def test_a_group_that_nvshmem_does_not_join_asks_for_nothing():
    class Module:
        def statuses(self):
            return []

    watch = Watch(Module())
    group = cuda_watch.GroupWatch("EpGroup 7", warn_after=10.0, timeout=60.0, places=PLACES)
    watch._groups[group.name] = group
    watch.look()
