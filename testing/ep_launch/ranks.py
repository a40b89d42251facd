# SPDX-License-Identifier: Apache-2.0
"""Runs the ranks of a group in processes of their own, many cases in one set of processes.

A case is a function of the group's mesh, see `rank_programs`. To start JAX on the GPU takes
seconds, so processes are given a list of cases, and write down how each one ended on each rank.
"""

import dataclasses
import itertools
import os
import pathlib
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from ep_launch import emulated_hosts, standing
from ep_launch.placement import Placement
from ep_launch.processes import free_port

# After a rank has failed, the others may still be waiting for it, each until its own deadline.
_GRACE_S = 30.0
_LOG_PART = 2500  # characters


@dataclasses.dataclass(frozen=True)
class Case:
    """A function to run in every process.

    Attributes:
        name: for reports.
        function: of a mesh and keyword arguments, alike in all processes.
        kwargs: its arguments.
    """

    name: str
    function: Callable[..., Any]
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a case ended on one rank.

    Attributes:
        value: what the function returned, this rank's part.
        error: the traceback, or None.
        ended: seconds since the epoch.
        seconds: that it took.
    """

    value: Any
    error: str | None
    ended: float
    seconds: float


@dataclasses.dataclass
class RankRun:
    """What is left of a rank.

    Attributes:
        rank: its rank.
        process: that ran it.
        outcomes: of the cases that it came to the end of, in order.
        exit_code: of the process; negative: the signal that ended it.
        log: the beginning and the end of what it printed.
    """

    rank: int
    process: int
    outcomes: list[Outcome]
    exit_code: int | None
    log: str


def stacked(runs: Sequence[RankRun], index: int) -> Any:
    """All ranks' values of a case, as arrays `[R, ...]`."""
    return jax.tree.map(lambda *a: np.stack(a), *(run.outcomes[index].value for run in runs))


def run_ranks(
    cases: Sequence[Case],
    *,
    num_ranks: int,
    folder: pathlib.Path,
    environment: dict[str, str],
    placement: Placement = Placement.SHARED,
    deadline: float = 240.0,
    each: Callable[[int, list[Any]], None] | None = None,
    host_ranks: int | None = None,
) -> list[RankRun]:
    """Runs the cases, one after another, in the processes of a placement.

    Args:
        cases: what to run.
        num_ranks: `R`.
        folder: an empty one, for what the processes write.
        environment: variables beside this process's own.
        placement: of the ranks.
        deadline: seconds after which processes that are still running are killed, after they have
            printed where they stand.
        each: called with a case's number and the ranks' values as soon as all ranks have them.
        host_ranks: if so many processes each are to be on hosts in name alone, how many.

    Returns:
        What became of each rank, by rank; fails nothing by itself.
    """
    (folder / "cases").write_bytes(pickle.dumps(list(cases)))
    num_processes = placement.num_processes(num_ranks)
    group = [f"127.0.0.1:{free_port()}", str(num_ranks), placement]
    standings = pathlib.Path(os.environ.get(standing.VARIABLE) or folder)
    environment = placement.environment(num_ranks) | environment
    environment |= {standing.VARIABLE: str(standings)}
    tell = _Telling(folder, num_ranks, each)
    processes = [
        _start([str(folder), *group, str(i)], folder / f"log{i}", environment, _host(i, host_ranks))
        for i in range(num_processes)
    ]
    try:
        done = _wait(processes, folder, time.monotonic() + deadline, tell)
        if not done:
            running = {process.pid for process in processes if process.poll() is None}
            standing.ask(standings, running.__contains__)
        # Together: the first process serves the others.
        for process in processes:
            process.stdin.close()
        for process in processes:
            process.wait(10 if done else 1)
    except subprocess.TimeoutExpired:
        pass
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [
        _collect(folder, rank, i, process.returncode)
        for i, process in enumerate(processes)
        for rank in placement.ranks_of(i, num_ranks)
    ]


def _host(process: int, host_ranks: int | None) -> list[str]:
    return [] if host_ranks is None else emulated_hosts.on_host(f"node{process // host_ranks}")


def _start(
    args: list[str], log_path: pathlib.Path, environment: dict[str, str], before: list[str]
) -> subprocess.Popen:
    testing = pathlib.Path(__file__).parents[1]
    variables = {
        "PYTHONPATH": os.pathsep.join([str(testing), *filter(None, sys.path)]),
        "JAX_PLATFORMS": "cuda",
        "XLA_FLAGS": "",
        "TF_CPP_MIN_LOG_LEVEL": "1",
        "PYTHONUNBUFFERED": "1",
    }
    with open(log_path, "w") as log:
        return subprocess.Popen(
            [*before, sys.executable, "-P", "-m", "ep_launch.rank_main", *args],
            env=os.environ | variables | environment,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
        )


class _Telling:
    """Tells of each case that all ranks have ended well, once, in order."""

    def __init__(
        self, folder: pathlib.Path, num_ranks: int, each: Callable[[int, list[Any]], None] | None
    ) -> None:
        self._folder = folder
        self._num_ranks = num_ranks
        self._each = each
        self._next = 0

    def __call__(self) -> None:
        while self._each is not None:
            ranks = range(self._num_ranks)
            paths = [self._folder / f"outcome{rank}.{self._next}" for rank in ranks]
            if not all(path.exists() for path in paths):
                return
            outcomes = [pickle.loads(path.read_bytes()) for path in paths]
            if any(outcome.error for outcome in outcomes):
                return
            self._each(self._next, [outcome.value for outcome in outcomes])
            self._next += 1


def _wait(
    processes: list[subprocess.Popen],
    folder: pathlib.Path,
    deadline: float,
    tell: Callable[[], None],
) -> bool:
    """Until all have ended or say that they are done; not long after one has failed.

    Returns whether they did.
    """
    while time.monotonic() < deadline:
        tell()
        paths = [folder / f"done{i}" for i in range(len(processes))]
        done = [path.exists() for path in paths]
        ended = [process.poll() is not None for process in processes]
        if all(d or e for d, e in zip(done, ended, strict=True)):
            tell()
            return True
        if any(ended) or any(p.read_text() for p in paths if p.exists()):
            deadline = min(deadline, time.monotonic() + _GRACE_S)
        time.sleep(0.05)
    return False


def _collect(folder: pathlib.Path, rank: int, process: int, exit_code: int) -> RankRun:
    outcomes = []
    for index in itertools.count():
        path = folder / f"outcome{rank}.{index}"
        if not path.exists():
            break
        outcomes.append(pickle.loads(path.read_bytes()))
    log = (folder / f"log{process}").read_text(errors="replace")
    if len(log) > 2 * _LOG_PART:
        log = f"{log[:_LOG_PART]}\n...\n{log[-_LOG_PART:]}"
    return RankRun(rank, process, outcomes, exit_code, log)


def failure_report(runs: Sequence[RankRun], cases: Sequence[Case]) -> str | None:
    """Each rank that did not come to the end of all cases, the first one to fail first.

    Of ranks in one process, which fail together, the first one alone.
    """
    failed = []
    for run in {run.process: run for run in reversed(runs)}.values():
        errors = [(o.ended, cases[i].name, o.error) for i, o in enumerate(run.outcomes) if o.error]
        if errors:
            ended, name, error = errors[0]
            failed.append((ended, f"rank {run.rank} failed in {name}:\n{error}\n{run.log}"))
        elif len(run.outcomes) < len(cases):
            name = cases[len(run.outcomes)].name
            text = f"rank {run.rank} did not end {name} (exit code {run.exit_code}):\n{run.log}"
            failed.append((float("inf"), text))
    return "\n\n".join(text for _, text in sorted(failed)) or None
