# SPDX-License-Identifier: Apache-2.0
"""What kernels say while they run reaches the log, and a group's health."""

import logging
import math
import time

import pytest

import jax_ep
from ep_testing import fake_cuda
from ep_testing.programs import make_mesh
from jax_ep._src.groups import kernel_errors as cuda_watch
from jax_ep._src.groups.kernel_errors import GroupWatch, RankWait

CONFIG = jax_ep.EpConfig(num_experts=8, num_topk=2, hidden=16, max_tokens_per_rank=4)
PLACES = {(0, rank): f"process {rank} (pid {40 + rank} on host-a)" for rank in range(4)}


def _group(**changes) -> GroupWatch:
    known = {"warn_after": 2.0, "timeout": 60.0, "places": PLACES}
    return GroupWatch("EpGroup 7", **known | changes)


def _wait(rank, peer, seconds, *, ended=False, given_up=False, exchange=9, op="dispatch") -> tuple:
    """A wait as a status has it."""
    return (peer, op, f"the rows of rank {peer}", exchange, seconds, ended, given_up)


def _status(rank, *waits, error=None, name="EpGroup 7") -> tuple:
    return (name, 0, rank, error, list(waits))


def _log(group, *statuses, caplog) -> list[tuple[str, str]]:
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="jax_ep"):
        group.log(list(statuses))
    return [(record.levelname, record.message) for record in caplog.records]


def test_a_wait_is_logged_from_warn_after_on_and_once_for_each_report(caplog):
    group = _group()
    assert _log(group, _status(2, _wait(2, 3, 1.0)), caplog=caplog) == []
    text = (
        "EpGroup 7, group_index 0: rank 2 has waited {} s in dispatch for the rows of rank 3 "
        "(exchange 9); rank 3 waits for nobody: look at process 3 (pid 43 on host-a). Giving up "
        "after 60 s"
    )
    for seconds in (2.0, 4.0):
        status = _status(2, _wait(2, 3, seconds))
        assert _log(group, status, caplog=caplog) == [("WARNING", text.format(f"{seconds:g}"))]
        assert _log(group, status, caplog=caplog) == []
    came = _status(2, _wait(2, 3, 4.0, ended=True))
    assert _log(group, came, caplog=caplog) == [
        (
            "INFO",
            "EpGroup 7, group_index 0: rank 3 came, after more than 4 s that rank 2 waited for it "
            "in dispatch",
        )
    ]
    assert _log(group, came, caplog=caplog) == []
    # The next long wait for the same rank is another exchange's.
    assert len(_log(group, _status(2, _wait(2, 3, 2.0, exchange=12)), caplog=caplog)) == 1


def test_a_rank_that_is_left_out_has_not_come(caplog):
    group = _group()
    _log(group, _status(2, _wait(2, 3, 2.0)), caplog=caplog)
    without = _status(2, _wait(2, 3, 4.0, ended=True, given_up=True))
    assert _log(group, without, caplog=caplog) == [
        (
            "WARNING",
            "EpGroup 7, group_index 0: rank 2 goes on without rank 3, for which it has waited more "
            "than 4 s in dispatch (exchange 9)",
        )
    ]
    assert _log(group, without, caplog=caplog) == []
    assert group.health([without]) == jax_ep.EpHealth()


def test_short_waits_and_infinite_patience_are_not_logged(caplog):
    ended = _status(2, _wait(2, 3, 1.0, ended=True))
    assert _log(_group(), ended, caplog=caplog) == []
    endless = _group(warn_after=math.inf)
    assert _log(endless, _status(2, _wait(2, 3, 1e6)), caplog=caplog) == []


def test_the_root_is_named_and_not_the_messenger(caplog):
    statuses = [_status(0, _wait(0, 1, 2.0)), _status(1, _wait(1, 3, 1.0, exchange=8, op="plan"))]
    [(_, text)] = _log(_group(), *statuses, caplog=caplog)
    assert (
        "rank 1 waits in plan for the rows of rank 3 (exchange 8); rank 3 waits for nobody: look "
        "at process 3 (pid 43 on host-a)"
    ) in text


def test_a_kernel_that_waits_for_a_peer_is_not_said_to_wait_for_itself(caplog):
    # Some of its blocks, or warps, wait for the others, which wait for the peer.
    group = _group()
    # A barrier of its own counts otherwise than exchanges.
    status = _status(0, _wait(0, 0, 2.0, exchange=3), _wait(0, 1, 2.0))
    [(_, text)] = _log(group, status, caplog=caplog)
    assert "rank 0 has waited 2 s in dispatch for the rows of rank 1" in text
    assert "rank 1 waits for nobody" in text
    assert group.health([status]).waiting_for == (1,)
    # For itself alone, as where its blocks do not fit.
    for more in ([], [_wait(0, 1, 2.0, ended=True)]):
        alone = _log(_group(), _status(0, _wait(0, 0, 2.0), *more), caplog=caplog)
        assert any("for the rows of rank 0" in message for _, message in alone)


def test_a_circle_is_called_one(caplog):
    statuses = [_status(0, _wait(0, 1, 2.0)), _status(1, _wait(1, 0, 1.0))]
    [(_, text)] = _log(_group(), *statuses, caplog=caplog)
    assert "they wait for one another: the ranks run different operations" in text


class Store:
    """JAX's coordination client, as far as it is used."""

    def __init__(self):
        self.texts: dict[str, str] = {}

    def key_value_set(self, key, text, overwrite):
        assert overwrite
        self.texts[key] = text

    def key_value_dir_get(self, prefix):
        return [(key, text) for key, text in self.texts.items() if key.startswith(prefix)]

    def key_value_delete(self, key):
        del self.texts[key]


def test_a_wait_that_is_over_is_no_reason_of_a_later_one(caplog, monkeypatch):
    monkeypatch.setattr(cuda_watch, "_OTHERS_S", 0.0)
    store = Store()
    here, there = (_group(store=store, prefix="jax_ep/abc/1") for _ in range(2))
    # Rank 0 waits for long for rank 1, and has waited for rank 2 as well, which is told with it.
    late = [_wait(0, 1, 2.0), _wait(0, 2, 1.0)]
    _log(there, _status(0, *late), caplog=caplog)
    assert len(store.texts) == 2
    over = [_wait(0, 1, 2.0, ended=True), _wait(0, 2, 1.0, ended=True)]
    _log(there, _status(0, *over), caplog=caplog)
    assert store.texts == {}
    [(_, text)] = _log(here, _status(2, _wait(2, 0, 2.0, exchange=99)), caplog=caplog)
    assert "rank 0 waits for nobody" in text


def test_the_watch_survives_what_raises(monkeypatch, capfd):
    calls = []

    class Module:
        def statuses(self):
            calls.append(len(calls))
            if len(calls) == 1:
                raise OSError("a handler raised")
            return []

    monkeypatch.setattr(cuda_watch, "_PERIOD_S", 0.01)
    watch = cuda_watch.Watch(Module())
    watch.add(_group())
    deadline = time.monotonic() + 10
    while len(calls) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    watch.stop()
    assert len(calls) >= 3
    assert "a handler raised" in capfd.readouterr().err


def test_ranks_of_other_processes_say_whom_they_wait_for(caplog, monkeypatch):
    monkeypatch.setattr(cuda_watch, "_OTHERS_S", 0.0)
    store = Store()
    here, there = (_group(store=store, prefix="jax_ep/abc/1") for _ in range(2))
    _log(there, _status(1, _wait(1, 3, 2.0)), caplog=caplog)
    [(_, text)] = _log(here, _status(0, _wait(0, 1, 2.0)), caplog=caplog)
    assert "rank 1 waits in dispatch for the rows of rank 3 (exchange 9); rank 3 waits for" in text
    assert len(store.texts) == 2
    _log(there, _status(1, _wait(1, 3, 2.0, ended=True)), caplog=caplog)
    assert [key.rsplit("/", 1)[1] for key in store.texts] == ["0-0-1"]


def test_an_error_is_logged_once(caplog):
    group = _group()
    status = _status(2, error="rank 2 waited 60 s in dispatch for the rows of rank 5")
    assert _log(group, status, caplog=caplog) == [
        (
            "ERROR",
            "EpGroup 7, group_index 0: rank 2 waited 60 s in dispatch for the rows of rank 5",
        )
    ]
    assert _log(group, status, caplog=caplog) == []


def test_health_is_of_the_longest_wait():
    group = _group()
    statuses = [
        _status(0, _wait(0, 1, 0.5), _wait(0, 3, 4.0), _wait(0, 2, 1.0, ended=True)),
        _status(1, _wait(1, 2, 2.0)),
    ]
    health = group.health(statuses)
    assert not health.ok
    assert health.waiting_for == (1, 3)
    assert 4.0 <= health.seconds < 5.0
    assert (health.operation, health.exchange, health.group_index) == ("dispatch", 9, 0)
    assert health.root == "rank 3 waits for nobody: look at process 3 (pid 43 on host-a)"
    assert health.aborted is None
    time.sleep(0.01)
    assert group.health(statuses).seconds > health.seconds
    assert group.health([_status(0, error="gone")]).aborted == "gone"
    assert group.health([]).ok


# --- with a group, its thread and a stand-in for the kernels ------------------------------------


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(cuda_watch, "_PERIOD_S", 0.01)
    return fake_cuda.install(monkeypatch)


def _wait_for(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_group_is_watched_also_when_it_has_been_closed(fake, caplog):
    with caplog.at_level(logging.INFO, logger="jax_ep"):
        mesh = make_mesh((4,), ("expert",))
        with jax_ep.EpGroup(mesh, "expert", CONFIG, timeout=8.0) as group:
            assert group.health() == jax_ep.EpHealth()
            fake.said = [_status(2, _wait(2, 3, 4.0), name=group.name)]
            _wait_for(lambda: "rank 2 has waited 4 s" in caplog.text)
            assert "look at process 0 (pid " in caplog.text
            assert group.health().waiting_for == (3,)
            fake.said = []
        caplog.clear()
        fake.said = [_status(1, name=group.name, error="plan of rank 1 was called after")]
        _wait_for(lambda: "plan of rank 1 was called after" in caplog.text)
        assert group.health() == jax_ep.EpHealth()  # closed


def test_what_a_kernel_says_last_is_logged_by_close(fake, caplog, monkeypatch):
    monkeypatch.setattr(cuda_watch, "_PERIOD_S", 1000.0)
    with caplog.at_level(logging.ERROR, logger="jax_ep"):
        group = jax_ep.EpGroup(make_mesh((4,), ("expert",)), "expert", CONFIG)
        fake.said = [_status(0, name=group.name, error="rank 0 waited")]
        group.close()
    assert [r.message for r in caplog.records] == [f"{group.name}, group_index 0: rank 0 waited"]


def test_the_wait_of_a_status_is_what_the_compiled_module_gives():
    assert RankWait(0, 2, *_wait(2, 3, 1.0)).awaited == "the rows of rank 3"
