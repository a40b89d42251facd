# SPDX-License-Identifier: Apache-2.0
"""What the scheduler takes and gives: requests, rows, plans, events. No JAX."""

import dataclasses
from typing import NamedTuple


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What somebody wants to have written.

    Attributes:
        id: distinct.
        prompt: at least one byte.
        max_tokens: bytes to write, at least 1.
        stop: each ends the text when it has been written.
        temperature: see `moe_serve.sampling.Sampling`, as the following.
        top_k: of the likeliest so many; 0: of all.
        top_p: of the fewest that have this probability.
        seed: of what is drawn.
    """

    id: int
    prompt: bytes
    max_tokens: int
    stop: tuple[bytes, ...] = ()
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Row:
    """What a step reads of one sequence.

    Attributes:
        request: of the sequence.
        device: where its slot is.
        slot: of the device.
        start: the position of the first byte.
        tokens: at least one.
        writes: whether the byte that follows is the next of the text, because all that was written
            before has been read with this row.
    """

    request: Request
    device: int
    slot: int
    start: int
    tokens: bytes
    writes: bool

    @property
    def num_of_prompt(self) -> int:
        """Bytes that are of the prompt; the others are text that was written."""
        return max(0, min(len(self.tokens), len(self.request.prompt) - self.start))


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """Rows of one step.

    Attributes:
        prefill: of more than one byte, at most one for each device.
        width: bytes that the longest of them takes, rounded up to one of the scheduler's; 0
            without any.
        decode: of one byte, at most one for each slot.
    """

    prefill: tuple[Row, ...]
    width: int
    decode: tuple[Row, ...]

    @property
    def rows(self) -> tuple[Row, ...]:
        """All of them, in the order of what a runner writes."""
        return (*self.prefill, *self.decode)

    @property
    def steps(self) -> tuple[tuple[tuple[Row, ...], int], ...]:
        """Rows with their width, of each step that there is, in the order of `rows`."""
        steps = ((self.prefill, self.width), (self.decode, 1))
        return tuple((rows, width) for rows, width in steps if rows)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to do."""
        return not self.prefill and not self.decode


class Written(NamedTuple):
    """What a step gave a row: the byte that follows it, and the logarithm of its probability."""

    token: int
    logprob: float


@dataclasses.dataclass(frozen=True)
class Event:
    """A byte that was written.

    Attributes:
        request_id: of whom.
        token: the byte.
        finish: why it is the last: "length" or "stop"; None: it is not.
    """

    request_id: int
    token: int
    finish: str | None
