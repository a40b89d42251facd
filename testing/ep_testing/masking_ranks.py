# SPDX-License-Identifier: Apache-2.0
"""Ranks of a group that goes on without those that do not come, as each rank's process runs them.

On GPUs a rank is lost with its process. In one process, on CPU devices, it makes no calls from then
on: so what these cases do, and what is checked of them, is tried where there is no GPU. All inputs
are on their devices, and all programs compiled, before a rank is lost; afterwards nothing here but
`close` needs the coordination service.
"""

import collections
import dataclasses
import functools
import itertools
import os
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from ep_testing.missing_ranks import expert_outputs, only_if, round_trip
from ep_testing.problems import EpProblem
from ep_testing.programs import make_group, over_ranks
from ep_testing.rank_programs import place
from jax_ep._src import compat

NUM_STEPS = 7  # no multiple of the kernels' banks: nothing old looks new
_SCANNED = 4
_BARRIER_MS = 60_000
# While its kernels run: until somebody must have noticed.
_LOOP_S = 15.0

Value = dict[str, Any]


class _Step(EpProblem):
    """One whose tokens differ from those of other seeds."""

    @functools.cached_property
    def x(self) -> np.ndarray:
        return self.random((self.num_ranks, self.num_tokens, self.hidden), salt=4)


def problem_of(problem: EpProblem, number: int) -> EpProblem:
    """What a step exchanges: other tokens, routing, weights and outputs in each."""
    fields = {f.name: getattr(problem, f.name) for f in dataclasses.fields(problem)}
    return _Step(**fields | {"seed": 100 * (number % NUM_STEPS) + 7})


def _is_here(mesh: Mesh, rank: int) -> bool:
    return mesh.devices.flat[rank].process_index == jax.process_index()


_meetings = itertools.count()  # alike in all processes


def _meet() -> None:
    """Waits for all processes: not after one has been lost."""
    if (client := compat.coordination_client()) is not None:
        client.wait_at_barrier(f"meeting {next(_meetings)}", _BARRIER_MS)


class Steps:
    """The programs of a group, compiled, with inputs for `NUM_STEPS` steps on their devices.

    A step is a dispatch and two combines, each of which says who was missing.
    """

    def __init__(
        self, mesh: Mesh, problem: EpProblem, *, timeout: float, on_timeout: str, victim: int = 0
    ) -> None:
        """Makes the group, and meets the other processes when everything is ready.

        Args:
            mesh: of all ranks.
            problem: of the steps, see `problem_of`.
            timeout: of the group.
            on_timeout: of the group.
            victim: the rank that will be lost.
        """
        group = make_group(problem, "ffi", mesh=mesh, timeout=timeout, on_timeout=on_timeout)
        self.group = group
        ranks = np.arange(problem.num_ranks)
        self._step = over_ranks(group, self._on_rank, check_vma=False)
        self._scan = over_ranks(group, self._scan_on_rank, check_vma=False)
        each = [self._arrays(problem_of(problem, n)) for n in range(NUM_STEPS)]
        self._inputs = [place(mesh, *arrays) for arrays in each]
        several = [np.stack(arrays, axis=1) for arrays in zip(*each[:_SCANNED], strict=True)]
        self._scanned = place(mesh, *several)
        masks = {"all": ranks >= 0, "left": ranks != victim, "nobody": ranks < 0}
        self._masks = {
            name: place(mesh, np.tile(mask, (problem.num_ranks, 1)))[0]
            for name, mask in masks.items()
        }
        here = {False: ranks >= 0, True: ranks != victim}
        self._here = {is_lost: place(mesh, value)[0] for is_lost, value in here.items()}
        self.is_lost = False  # in this process, where it is that of all ranks
        # With that mask no rank waits for another, however long these take to compile.
        for number in range(NUM_STEPS):
            jax.block_until_ready(self.start(number, "nobody"))
        self.scan("nobody")
        _meet()

    @staticmethod
    def _arrays(problem: EpProblem) -> tuple[np.ndarray, ...]:
        return problem.x, problem.topk_idx, problem.topk_weights, expert_outputs(problem)

    def _exchange(self, here: Any, *args: Any) -> Any:
        exchange = functools.partial(round_trip, self.group)
        # On GPUs who is lost runs nothing.
        return only_if(here, exchange, *args) if self.group.platform == "cpu" else exchange(*args)

    def _on_rank(self, here: Any, mask: Any, *args: Any) -> Any:
        return self._exchange(here, *args, mask)

    def _scan_on_rank(self, here: Any, mask: Any, *args: Any) -> Any:
        def turn(alive: Any, args: Any) -> Any:
            outs = self._exchange(here, *args, alive)
            received, (_, lost), (_, lost_later) = outs
            missing = lost | lost_later
            if received.missing_ranks is not None:
                missing = missing | received.missing_ranks
            return alive & ~missing, outs

        return jax.lax.scan(turn, mask, args)[1]

    def start(self, number: int, mask: str = "all") -> Any:
        """Launches a step; what it will give."""
        here, args = self._here[self.is_lost], self._inputs[number % NUM_STEPS]
        return self._step(here, self._masks[mask], *args)

    def run(self, number: int, mask: str = "all") -> Value:
        """Runs a step: its number, results and seconds."""
        began = time.monotonic()
        outs = jax.block_until_ready(self.start(number, mask))
        return {"number": number, "outs": outs, "seconds": time.monotonic() - began}

    def scan(self, mask: str = "all") -> Value:
        """Runs the first steps in one program: who is found missing is left out of the next."""
        began = time.monotonic()
        here = self._here[self.is_lost]
        outs = jax.block_until_ready(self._scan(here, self._masks[mask], *self._scanned))
        return {"outs": outs, "seconds": time.monotonic() - began}

    def close(self) -> float:
        """Closes the group; the seconds that it took."""
        began = time.monotonic()
        self.group.close()
        return time.monotonic() - began


def nobody(mesh: Mesh, problem: EpProblem, on_timeout: str, timeout: float) -> Value:
    """Steps of which nobody is missing, and a scan of some."""
    steps = Steps(mesh, problem, timeout=timeout, on_timeout=on_timeout)
    value = {"steps": [steps.run(n) for n in range(NUM_STEPS)], "scan": steps.scan()}
    return value | {"closed_s": steps.close()}


def killed(mesh: Mesh, problem: EpProblem, victim: int, timeout: float) -> Value:
    """A rank ends when it has the results of its second step; nobody is told.

    Then a step that finds out, three without it, and a scan.
    """
    steps = Steps(mesh, problem, timeout=timeout, on_timeout="mask", victim=victim)
    before = [steps.run(n) for n in (0, 1)]
    _lose(mesh, victim, steps)
    value = {"before": before, "found": [steps.run(2)]}
    return value | _without_it(steps)


def given_up(mesh: Mesh, problem: EpProblem, victim: int, timeout: float, after: float) -> Value:
    """The same, and the ranks that are left are told: `after` seconds in their wait for it.

    Then a step before which they know, and those without it.
    """
    steps = Steps(mesh, problem, timeout=timeout, on_timeout="mask", victim=victim)
    before = [steps.run(n) for n in (0, 1)]
    _lose(mesh, victim, steps)
    telling = threading.Timer(after, steps.group.give_up_on, ([victim],))
    telling.start()
    found = [steps.run(2)]
    telling.join()
    found.append(steps.run(3))
    return {"before": before, "found": found} | _without_it(steps)


def late(mesh: Mesh, problem: EpProblem, victim: int, timeout: float) -> Value:
    """A rank sleeps for two timeouts, and makes the steps that the others have made without it.

    Then all meet, and make one together.
    """
    steps = Steps(mesh, problem, timeout=timeout, on_timeout="mask", victim=victim)
    before = [steps.run(n) for n in (0, 1)]
    is_several = jax.process_count() > 1
    is_late = is_several and _is_here(mesh, victim)
    if is_late:
        time.sleep(2 * timeout)
    steps.is_lost = not is_several
    found = [steps.run(2)]
    left = [steps.run(n, "all" if is_late else "left") for n in (3, 4, 5)]
    steps.is_lost = False
    _meet()
    again = [steps.run(6)]
    _meet()
    closed_s = steps.close()
    return {"before": before, "found": found, "left": left, "again": again, "closed_s": closed_s}


def killed_in_kernels(
    mesh: Mesh, problem: EpProblem, victim: int, timeout: float, delay: float
) -> Value:
    """A rank is killed `delay` seconds after it has begun to launch steps without a pause.

    `before`: the last steps of which nobody was missing; `found`: the first other one.
    """
    steps = Steps(mesh, problem, timeout=timeout, on_timeout="mask", victim=victim)
    is_several = jax.process_count() > 1
    if is_several and _is_here(mesh, victim):
        threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
        for number in range(1_000_000):
            steps.start(number)
        raise AssertionError("it has not been killed")
    before: collections.deque[Value] = collections.deque(maxlen=3)
    deadline = time.monotonic() + _LOOP_S
    number = 0
    while True:
        step = steps.run(number)
        if _missing(step["outs"]):
            break
        if time.monotonic() > deadline:
            raise AssertionError(f"nobody was missing in {number} steps")
        before.append(step)
        number += 1
        if not is_several and number == 5:
            steps.is_lost = True
    return {"before": list(before), "found": [step]} | _without_it(steps, number + 1)


def _missing(outs: Any) -> bool:
    """Whether a rank of this process has missed another in a step."""
    received, (_, lost), (_, lost_later) = outs
    arrays = (received.missing_ranks, lost, lost_later)
    return any(np.asarray(s.data).any() for a in arrays for s in a.addressable_shards)


def _lose(mesh: Mesh, victim: int, steps: Steps) -> None:
    """Ends the process of a rank, unless it is that of all."""
    if jax.process_count() == 1:
        steps.is_lost = True
    elif _is_here(mesh, victim):
        os.kill(os.getpid(), signal.SIGKILL)


def _without_it(steps: Steps, first: int = 4) -> Value:
    left = [steps.run(first + n, "left") for n in range(3)]
    value = {"left": left, "scan": steps.scan("left")}
    return value | {"closed_s": steps.close()}


def of_all(values: Mapping[int, Any], num_ranks: int) -> Any:
    """The ranks' values, as arrays `[R, ...]`; zeros for a rank that has left none."""
    nothing = jax.tree.map(np.zeros_like, next(iter(values.values())))
    ranks: Sequence[Any] = [values.get(rank, nothing) for rank in range(num_ranks)]
    return jax.tree.map(lambda *a: np.stack(a), *ranks)
