# SPDX-License-Identifier: Apache-2.0
"""Ranks of other domains are told that one has given up, and who was waited for is named."""

import logging

import jax
import pytest

from ep_testing.far_failures import PLACES, Clock, Store
from jax_ep._src.groups import far_failures
from jax_ep._src.groups.far_failures import FarFailures, GiveUp


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(far_failures, "time", clock)
    return clock


class Process:
    """One rank's process; `told` has what its kernels were."""

    def __init__(self, rank, store, group_index=0):
        self.rank = rank
        self.told: list[tuple[int, int, int]] = []
        self.ends: list[tuple[int, GiveUp]] = []
        self.far = FarFailures(
            "EpGroup 7", places=PLACES, local=[(group_index, rank)], store=store,
            prefix="jax_ep/abc/1", tell=self._tell,
        )  # fmt: skip

    def _tell(self, group_index, rank, word):
        self.told.append((group_index, rank, word))
        return True

    def look(self, *, waits=False, last=False):
        self.far.look(self.ends, waits=waits, last=last)


def _errors(caplog):
    return [record.message for record in caplog.records if record.levelname == "ERROR"]


def test_a_rank_that_waits_elsewhere_is_told_at_once_and_once(clock):
    store = Store()
    here, there, idle = Process(0, store), Process(2, store), Process(3, store)
    here.ends = [(0, GiveUp(0, 0, 1, 0x1234))]
    here.look()
    for _ in range(3):
        there.look(waits=True)
        idle.look(waits=False)
        clock.now += 1.0
    assert here.told == []
    assert there.told == [(0, 2, 0x1234)]
    # Who waits for nobody looks when it does.
    assert idle.told == []
    idle.look(waits=True)
    assert idle.told == [(0, 3, 0x1234)]


def test_a_told_rank_of_the_domain_tells_the_others_of_who_gave_up(clock):
    # The process of rank 0 ended before it said anything; rank 1 knows by its heap.
    store = Store()
    neighbor, there = Process(1, store), Process(2, store)
    neighbor.ends = [(1, GiveUp(0, 0, 3, 77))]
    neighbor.look()
    there.look(waits=True)
    assert there.told == [(0, 2, 77)]


def test_other_groups_of_the_mesh_go_on(clock):
    store = Store()
    here, other = Process(0, store), Process(0, store, group_index=1)
    here.ends = [(0, GiveUp(0, 0, 1, 9))]
    here.look()
    other.look(waits=True)
    assert other.told == []


def test_the_store_is_asked_only_while_somebody_waits_and_not_at_every_look(clock):
    store = Store()
    process = Process(0, store)
    for _ in range(10):
        process.look()
        clock.now += 0.1
    assert store.reads == 0
    for _ in range(10):
        process.look(waits=True)
        clock.now += 0.1
    assert store.reads == 2


def test_who_was_waited_for_is_named_with_all_that_gave_up(clock, caplog):
    store = Store()
    processes = [Process(rank, store) for rank in range(3)]
    # Ranks 0 and 2 gave up for rank 3 by their own deadlines, and rank 1 was told.
    first, second = GiveUp(0, 0, 3, 5), GiveUp(0, 2, 3, 6)
    processes[0].ends = [(0, first)]
    processes[1].ends = [(1, first)]
    processes[2].ends = [(2, second)]
    for process in processes:
        process.look()
    caplog.clear()
    processes[0].look()
    assert _errors(caplog) == []  # others may follow
    clock.now += 1.0
    text = (
        "EpGroup 7, group_index 0: 2 rank(s) of all processes gave up waiting for rank 3, which is "
        "in process 3 (pid 43 on host-1): 0, 2"
    )
    for process in processes:
        caplog.clear()
        process.look()
        assert _errors(caplog) == [text]
        process.look()
        assert _errors(caplog) == [text]


def test_the_one_that_most_name_comes_first(clock, caplog):
    store = Store()
    process = Process(0, store)
    process.ends = [(0, GiveUp(0, 0, 1, 5))]
    for rank in (2, 3):
        other = Process(rank, store)
        other.ends = [(rank, GiveUp(0, rank, 0, 8))]
        other.look()
    with caplog.at_level(logging.ERROR, logger="jax_ep"):
        process.look(last=True)
    assert ["waiting for rank 0" in text for text in _errors(caplog)] == [True, False]
    assert "2 rank(s) of all processes gave up waiting for rank 0" in _errors(caplog)[0]


def test_a_process_that_ends_says_it_without_waiting_for_others(clock, caplog):
    process = Process(0, Store())
    process.ends = [(0, GiveUp(0, 0, 1, 5))]
    process.look(last=True)
    assert len(_errors(caplog)) == 1


def test_without_the_service_what_is_known_here_is_said(clock, caplog):
    class Gone:
        def key_value_set(self, *_):
            raise jax.errors.JaxRuntimeError("UNAVAILABLE")

        key_value_dir_get = key_value_set

    for store in (Gone(), None):
        caplog.clear()
        process = Process(0, store)
        process.ends = [(0, GiveUp(0, 0, 1, 5))]
        process.look(last=True)
        assert "waiting for rank 1" in _errors(caplog)[0]


def test_in_one_process_the_other_domain_is_told_without_a_service(clock):
    told = []
    far = FarFailures(
        "EpGroup 7", places=PLACES, local=[(0, rank) for rank in range(4)], store=None, prefix="",
        tell=lambda *what: told.append(what) or True,
    )  # fmt: skip
    far.look([(0, GiveUp(0, 0, 1, 5)), (1, GiveUp(0, 0, 1, 5))], waits=True, last=False)
    assert told == [(0, 2, 5), (0, 3, 5)]
