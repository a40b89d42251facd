# SPDX-License-Identifier: Apache-2.0
"""From options to an engine: over a model in this process, or over one in several."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax_ep
from moe_lm.options import Options
from moe_serve import wire
from moe_serve.engine import Engine
from moe_serve.experts import FixedExperts, PlacedExperts
from moe_serve.options import ServeOptions
from moe_serve.remote import RemoteModel
from moe_serve.runner import Experts, Runner
from moe_serve.scheduler import Scheduler
from moe_serve.telemetry import Telemetry
from moe_serve.workers import Workers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Served:
    """What is served.

    Attributes:
        engine: has not been started.
        title: a line about the model and where it runs.
        health: what is wrong, if anything.
        rebalance: see `moe_serve.http.make_app`.
        kill_rank: ends the process of a rank, and names it; None: it would be this one.
    """

    engine: Engine
    title: str
    health: Callable[[], str | None]
    rebalance: Callable[[], Any] | None = None
    kill_rank: Callable[[int], str] | None = None


@contextlib.contextmanager
def served(serve: ServeOptions, options: Options) -> Iterator[Served]:
    """Loads, with as many processes as `options` says, and ends these.

    Raises:
        ValueError: a checkpoint is of another model, or there are too few devices.
        jax_ep.EpUnavailable: the backend that was asked for cannot serve.
        moe_serve.workers.WorkerEnded: a process has ended before it was ready.
    """
    with contextlib.ExitStack() as stack:
        make = _here if options.processes == 1 else _elsewhere
        yield make(serve, options, stack)


def _here(serve: ServeOptions, options: Options, stack: contextlib.ExitStack) -> Served:
    # Only now: a supervisor needs neither Flax nor what else this imports.
    from moe_serve.loading import loaded  # noqa: PLC0415

    found = stack.enter_context(loaded(serve, options))
    experts, group = found.experts, found.model.group
    return Served(
        engine=make_engine(serve, options, found.model, experts, found.telemetry),
        title=found.title,
        health=lambda: problem_of(group.health(), group.warn_after),
        rebalance=experts.decide if isinstance(experts, PlacedExperts) else None,
    )


def _elsewhere(serve: ServeOptions, options: Options, stack: contextlib.ExitStack) -> Served:
    """This process has no devices: what it imports of JAX is never asked for any."""
    service = stack.enter_context(jax_ep.serving.start_service(options.processes))
    workers = stack.enter_context(Workers(serve, options, service.address))
    ready: wire.Ready = workers.answers()[0]
    model, telemetry = RemoteModel(workers, options.num_devices), Telemetry()
    experts = FixedExperts(
        model,
        telemetry,
        num_ranks=options.mesh[1],
        num_topk=options.topk,
        every=serve.rebalance_every,
    )
    engine = make_engine(serve, options, model, experts, telemetry)
    workers.when_ended(engine.fail)
    return Served(
        engine=engine,
        title=f"{ready.title}, {options.processes} processes",
        health=workers.problem,
        kill_rank=workers.kill_rank,
    )


def make_engine(
    serve: ServeOptions,
    options: Options,
    model: Runner,
    experts: Experts,
    telemetry: Telemetry,
) -> Engine:
    """An engine that has not been started."""
    scheduler = Scheduler(
        num_devices=options.num_devices,
        slots_per_device=serve.slots,
        max_len=serve.max_len,
        widths=serve.widths,
        max_prefill_tokens=serve.max_prefill_tokens,
    )
    return Engine(
        model,
        scheduler,
        experts,
        telemetry,
        num_ranks=options.mesh[1],
        max_open=serve.slots * options.num_devices + serve.queue,
    )


def problem_of(state: jax_ep.EpHealth, warn_after: float) -> str | None:
    """What is wrong with a group; None where nothing is."""
    if state.aborted is not None:
        return f"a rank has given up: {state.aborted}"
    # Ranks always wait for each other, but not for long.
    if state.seconds < warn_after:
        return None
    ranks = ", ".join(map(str, state.waiting_for))
    return f"late for {state.seconds:.0f} s: ranks {ranks}; {state.root}"
