# SPDX-License-Identifier: Apache-2.0
"""Measures dispatch + combine on 8 CPU devices against what users write with lax collectives.

Every variant is checked against the oracle first. Times are taken in turns, in random order;
memory in a process for each variant.
"""

import argparse
import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from ep_bench import environment, memory
from ep_bench.cases import DEFAULT_CASES, DTYPES, NUM_RANKS, SMOKE_CASES, Case
from ep_bench.checks import Expected
from ep_bench.timing import Spread, paired_ratio, time_in_turns
from ep_bench.variants import (
    BASELINES,
    DIRECTIONS,
    VARIANTS,
    Variant,
    as_numpy,
    ep_config,
    make_mesh,
    open_variant,
    put,
)

NUM_PAIRS = 30
NUM_SMOKE_PAIRS = 3
# The slow fallback is no baseline: a few samples must do.
ROUNDS_PER_SAMPLE = {"xla": 6}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What to measure.

    Attributes:
        cases: sizes.
        dtypes: keys of `DTYPES`.
        num_pairs: samples of `ours` and of each baseline, taken in pairs.
        backend: of `ours`; None: the library's choice.
        with_memory: whether to measure memory too.
    """

    cases: Sequence[Case]
    dtypes: Sequence[str]
    num_pairs: int
    backend: str | None
    with_memory: bool

    @property
    def num_steps(self) -> int:
        """How often `run` reports a step."""
        times = len(self.cases) * len(self.dtypes) * len(DIRECTIONS) * self.num_pairs
        return times + (len(self.cases) * len(VARIANTS) if self.with_memory else 0)


Step = Callable[[str], None]


def run(settings: Settings, step: Step) -> list[dict[str, Any]]:
    """Measures everything; one result for each case, dtype and direction.

    Args:
        settings: what to measure.
        step: called with a few words after each round, and after each memory measurement.

    Raises:
        WrongResultError: a variant does not compute what it should.
    """
    mesh = make_mesh()
    results = []
    for case in settings.cases:
        for dtype in settings.dtypes:
            results += _measure_times(case, dtype, mesh, settings, step)
    if settings.with_memory:
        for case in settings.cases:
            of_case = [r for r in results if r["case"] == case.name]
            _add_memory(case, of_case, settings, step)
    return results


def _measure_times(
    case: Case, dtype: str, mesh: jax.sharding.Mesh, settings: Settings, step: Step
) -> list[dict[str, Any]]:
    inputs = case.inputs(dtype)
    expected = Expected.of(case, inputs, dtype)
    args = put(inputs, mesh)
    results = []
    with contextlib.ExitStack() as stack:
        variants = {
            key: stack.enter_context(
                open_variant(key, case, ep_config(case, dtype), mesh, settings.backend)
            )
            for key in VARIANTS
        }
        if variants["ours"].backend == "xla":
            del variants["xla"]  # the same thing twice
        for direction, with_gradient in DIRECTIONS.items():
            functions = {key: v.compile(with_gradient) for key, v in variants.items()}
            errors = _check(functions, variants, args, expected, with_gradient)
            what = f"{case.name} {dtype} {direction}"
            samples = time_in_turns(
                functions,
                args,
                num_rounds=settings.num_pairs,
                every=ROUNDS_PER_SAMPLE,
                on_round=lambda what=what: step(what),
            )
            results.append(
                {
                    **_description(case, dtype, direction),
                    "variants": {
                        key: _timing(variants[key], samples[key], errors[key]) for key in variants
                    },
                    **_ratios(samples),
                }
            )
    return results


def _check(
    functions: Mapping[str, Any],
    variants: Mapping[str, Variant],
    args: tuple[jax.Array, ...],
    expected: Expected,
    with_gradient: bool,
) -> dict[str, float]:
    """Compiles, warms up and checks every function; see `Expected.check`."""
    names = ("x_bar", "topk_weights_bar") if with_gradient else ("out",)
    return {
        key: expected.check(variants[key].label, names, as_numpy(function(*args)))
        for key, function in functions.items()
    }


def _description(case: Case, dtype: str, direction: str) -> dict[str, Any]:
    return {
        "case": case.name,
        **dataclasses.asdict(case),
        "dtype": dtype,
        "direction": direction,
        "recv_capacity": case.recv_capacity,
        "max_received": case.max_received,
        "bucket_capacity": case.bucket_capacity,
        "logical_bytes": case.logical_bytes(dtype),
    }


def _timing(variant: Variant, samples: np.ndarray, error: float) -> dict[str, Any]:
    taken = samples[~np.isnan(samples)]
    return {
        "label": variant.label,
        "seconds": dataclasses.asdict(Spread.of(taken)),
        "samples": [float(s) for s in taken],
        "error_of_allowed": error,
    }


def _ratios(samples: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Time of `ours` by the time of each baseline, in pairs; and which baseline is the faster."""
    faster = min(BASELINES, key=lambda key: np.median(samples[key]))
    ratios = {
        key: dataclasses.asdict(paired_ratio(samples["ours"], samples[key])) for key in BASELINES
    }
    return {"ratios": ratios, "faster_baseline": faster, "ratio": ratios[faster]}


def _add_memory(
    case: Case, results: Sequence[dict[str, Any]], settings: Settings, step: Step
) -> None:
    for key in VARIANTS:
        of_variant = [r for r in results if key in r["variants"]]
        if of_variant:
            found = memory.probe_in_subprocess(
                key, case, list(settings.dtypes), settings.backend if key == "ours" else None
            )
            by_name = {(f["dtype"], f["direction"]): f for f in found}
            for result in of_variant:
                measured = by_name[result["dtype"], result["direction"]]
                for field in ("peak_rss_bytes", "planned_bytes"):
                    result["variants"][key][field] = measured[field]
        step(f"{case.name} memory of {key}")


# --- the command -------------------------------------------------------------------------------


def check(args: argparse.Namespace) -> None:
    """Fills in cases, dtypes and pairs.

    Raises:
        ValueError: something is wrong with them; the message has the option.
    """
    default = SMOKE_CASES if args.smoke else DEFAULT_CASES
    args.cases = [Case.parse(c) for c in args.cases.split(",")] if args.cases else default
    args.dtypes = args.dtypes.split(",") if args.dtypes else list(DTYPES)
    if unknown := set(args.dtypes) - set(DTYPES):
        raise ValueError(f"unknown dtypes {sorted(unknown)}; allowed: {', '.join(DTYPES)}")
    if args.pairs is None:
        args.pairs = NUM_SMOKE_PAIRS if args.smoke else NUM_PAIRS
    if args.pairs < 1:
        raise ValueError(f"--pairs is {args.pairs}; it must be at least 1")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Runs everything, with a progress bar; the numbers, for the JSON."""
    environment.use_host_devices()
    where = environment.describe()
    console = Console(stderr=True)
    if where["load_before"] > 0.5:
        console.print(
            f"[yellow]The load average is {where['load_before']}: what else runs here will show "
            "in the spread of the times."
        )
    settings = Settings(
        cases=args.cases,
        dtypes=args.dtypes,
        num_pairs=args.pairs,
        backend=args.backend,
        with_memory=not args.no_memory,
    )
    columns = (TextColumn("{task.description:48}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("compiling", total=settings.num_steps)
        results = run(settings, lambda what: progress.update(task, advance=1, description=what))
    return {
        "environment": where,
        "num_ranks": NUM_RANKS,
        "num_pairs": args.pairs,
        "results": results,
    }
