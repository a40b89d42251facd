# SPDX-License-Identifier: Apache-2.0
"""Where the processes of a run stand, for whoever has to end it: announced by each of them.

    python testing/ep_launch/standing.py PROGRAM [ARGUMENTS...]

runs a program that knows nothing of this as one that has announced itself.
"""

import dataclasses
import faulthandler
import json
import os
import pathlib
import re
import runpy
import signal
import sys
import time
from collections.abc import Callable

# Names the folder of announcements; without it there are none.
VARIABLE = "JAX_EP_STANDING"
_SUFFIX = ".standing"
# Threads of some processes are in calls that take a moment to be interrupted, on a busy machine.
_DUMP_S = 1.0
_LAST_LINES = 40
# As logging.basicConfig has them.
_LOGGED = re.compile(r"^(?:DEBUG|INFO|WARNING|ERROR|CRITICAL):jax_ep\b.*", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Standing:
    """What a process has announced.

    Attributes:
        pid: its number.
        who: it is.
        log: a file with what it prints; None: it prints where the run does.
        doing: what it was at when it last said so.
    """

    pid: int
    who: str
    log: str | None
    doing: str


_mine: Standing | None = None


def announce(who: str, log: pathlib.Path | None = None) -> None:
    """Says who this process is; from now on SIGUSR1 has it print its stacks, and nothing else.

    In C++ too, where Python's own handlers of signals would have to wait.
    """
    global _mine
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    _mine = Standing(os.getpid(), who, str(log) if log else None, "starting")
    _write()


def doing(what: str) -> None:
    """Says what a process that has announced itself is at."""
    global _mine
    if _mine is not None:
        _mine = dataclasses.replace(_mine, doing=what)
        _write()


def _write() -> None:
    if folder := os.environ.get(VARIABLE):
        path = pathlib.Path(folder, f"{_mine.pid}{_SUFFIX}")
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(dataclasses.asdict(_mine)))
        partial.rename(path)


def ask(folder: pathlib.Path, is_ours: Callable[[int], bool]) -> list[Standing]:
    """Has the processes print their stacks; returns those that did, by name.

    Args:
        folder: of the announcements.
        is_ours: whether a process, by its number, belongs to the run: numbers are used again.
    """
    announced = [Standing(**json.loads(p.read_text())) for p in folder.glob(f"*{_SUFFIX}")]
    asked = [standing for standing in announced if is_ours(standing.pid)]
    for standing in asked:
        os.kill(standing.pid, signal.SIGUSR1)
    if asked:
        time.sleep(_DUMP_S)
    return sorted(asked, key=lambda standing: standing.who)


def report(folder: pathlib.Path, session: int) -> str:
    """Where each process of a session stands that has a log: its last lines, with its stacks.

    Those that print where the run does have their stacks there by then.
    """

    def is_ours(pid: int) -> bool:
        try:
            return os.getsid(pid) == session
        except ProcessLookupError:
            return False

    parts = []
    for standing in ask(folder, is_ours):
        parts.append(f"--- {standing.who} (process {standing.pid}): {standing.doing}")
        if standing.log is not None:
            parts.append(_ending(pathlib.Path(standing.log)))
    return "\n".join(parts)


def _ending(log: pathlib.Path) -> str:
    """The last lines, and before them what the library logged earlier."""
    try:
        text = log.read_text(errors="replace")
    except OSError as e:
        return str(e)
    lines = text.rstrip().splitlines()
    earlier = "\n".join(lines[:-_LAST_LINES])
    return "\n".join([*_LOGGED.findall(earlier), *lines[-_LAST_LINES:]])


def main() -> None:
    """Runs the program as Python would."""
    program = pathlib.Path(sys.argv[1]).resolve()  # as Python makes a program's `__file__`
    sys.argv = sys.argv[1:]
    sys.path[0] = str(program.parent)
    announce(program.name)
    runpy.run_path(str(program), run_name="__main__")


if __name__ == "__main__":
    main()
