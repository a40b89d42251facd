# SPDX-License-Identifier: Apache-2.0
"""What a supervisor and its workers tell each other. No JAX.

Both are this program, and nobody else has the socket, so messages are pickled.
"""

import dataclasses
from typing import Any

import numpy as np

from moe_lm.options import Options
from moe_serve.options import ServeOptions
from moe_serve.plans import Request, Row, StepPlan

# --- to a worker ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Begin:
    """The first message: load the model. Answered by `Ready`.

    Attributes:
        serve: options of the server.
        options: of the model.
        service: address of the coordination service.
        number: of the worker.
    """

    serve: ServeOptions
    options: Options
    service: str
    number: int


@dataclasses.dataclass(frozen=True)
class Run:
    """Run a plan, which is `packed`. Answered by `Ran`."""

    plan: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class SetExperts:
    """See `moe_serve.runner.Runner`, as of the following. Not answered."""

    has_expert: np.ndarray


@dataclasses.dataclass(frozen=True)
class SetAlive:
    """Not answered."""

    alive: np.ndarray


@dataclasses.dataclass(frozen=True)
class TakeCounts:
    """Answered by an array, of the worker's devices."""


@dataclasses.dataclass(frozen=True)
class End:
    """The last message."""


# --- to the supervisor ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Ready:
    """The model is there, and compiled.

    Attributes:
        title: a line about it.
    """

    title: str


@dataclasses.dataclass(frozen=True)
class Ran:
    """What a plan gave the rows on the worker's devices.

    Attributes:
        written: number of a row in the plan -> byte and logarithm of its probability.
    """

    written: dict[int, tuple[int, float]]


@dataclasses.dataclass(frozen=True)
class Failed:
    """The worker ends itself.

    Attributes:
        text: why.
        is_refused: whether options are the reason, and nothing is broken.
    """

    text: str
    is_refused: bool


# --- plans ----------------------------------------------------------------------------------------


def packed(plan: StepPlan) -> tuple[Any, ...]:
    """A plan without prompts and stops, which only the scheduler needs, and without our classes.

    So a step costs the same however long prompts are, and is pickled in C.
    """
    return (tuple(map(_row, plan.prefill)), plan.width, tuple(map(_row, plan.decode)))


def unpacked(message: tuple[Any, ...]) -> StepPlan:
    """The plan; its requests have empty prompts."""
    prefill, width, decode = message
    return StepPlan(tuple(map(_unpacked_row, prefill)), width, tuple(map(_unpacked_row, decode)))


def _row(row: Row) -> tuple[Any, ...]:
    r = row.request
    sampling = (r.temperature, r.top_k, r.top_p, r.seed)
    return (r.id, sampling, row.device, row.slot, row.start, row.tokens, row.writes)


def _unpacked_row(message: tuple[Any, ...]) -> Row:
    number, (temperature, top_k, top_p, seed), *others = message
    request = Request(
        id=number,
        prompt=b"",
        max_tokens=0,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
    )
    return Row(request, *others)
