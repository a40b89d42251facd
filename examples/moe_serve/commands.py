# SPDX-License-Identifier: Apache-2.0
"""What other threads want done by the thread that steps the model."""

import queue
import threading
from collections.abc import Callable


class Commands:
    """Functions that one thread runs, in their order, between two steps."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._has_ended = False
        self._end = threading.Lock()  # what is put before it runs

    def __len__(self) -> int:
        """How many have not run yet."""
        return self._queue.qsize()

    def put(self, command: Callable[[], None]) -> bool:
        """Has the thread run it; False where that has ended, and nobody will."""
        with self._end:
            if not self._has_ended:
                self._queue.put(command)
            return not self._has_ended

    def run(self, *, wait: bool = False) -> None:
        """Runs those that there are; waits for something if there is nothing else to do."""
        if wait:
            self._queue.get()()
        while True:
            try:
                self._queue.get_nowait()()
            except queue.Empty:
                return

    def end(self) -> None:
        """Runs those that there are, and takes no more."""
        with self._end:
            self._has_ended = True
        self.run()
