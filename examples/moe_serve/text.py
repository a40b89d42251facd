# SPDX-License-Identifier: Apache-2.0
"""Bytes to text while they come: nothing is shown that a later byte would change."""

import codecs
from collections.abc import Sequence


class TextStream:
    """One request's text.

    Holds back bytes that may turn out to be the beginning of a stop sequence, and characters of
    UTF-8 that are not whole yet. What is no UTF-8 becomes U+FFFD.
    """

    def __init__(self, stop: Sequence[bytes] = ()) -> None:
        """The text ends before the first of `stop`, each at least one byte."""
        self._stop = stop
        self._held = b""
        self._has_ended = False
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, data: bytes) -> str:
        """What can be shown now that these have come; nothing after a stop sequence."""
        if self._has_ended:
            return ""
        data = self._held + data
        starts = [at for at in (data.find(stop) for stop in self._stop) if at >= 0]
        if starts:
            self._has_ended = True
            self._held = b""
            return self._decoder.decode(data[: min(starts)])
        held = max((_overlap(data, stop) for stop in self._stop), default=0)
        self._held = data[len(data) - held :]
        return self._decoder.decode(data[: len(data) - held])

    def end(self) -> str:
        """The rest."""
        held, self._held = self._held, b""
        return self._decoder.decode(held, final=True)


def _overlap(data: bytes, stop: bytes) -> int:
    """How many bytes at the end of the data a stop sequence begins with."""
    longest = min(len(data), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if data.endswith(stop[:n])), 0)
