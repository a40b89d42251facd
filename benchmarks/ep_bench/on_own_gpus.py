# SPDX-License-Identifier: Apache-2.0
"""Measures dispatch and combine with a GPU for each rank, beside what XLA's collectives take."""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ep_bench import (
    comparison_programs,
    environment,
    link_probe,
    on_ranks,
    operation_programs,
    own_gpu_tables,
)
from ep_bench.bytes_moved import ROW
from ep_bench.cases import (
    LOW_LATENCY_OPERATIONS,
    MEASURED,
    TOKENS,
    GpuCase,
    own_gpu_cases,
    routings_of,
)
from ep_bench.checks import check_against_oracle
from ep_bench.variants import GPU_BASELINES, OURS
from ep_launch.placement import Placement, count_gpus
from ep_launch.ranks import Case

NUM_SAMPLES = 50
LINK_BYTES = 2**28
# On CPU devices: does it run at all?
SMOKE_RANKS, SMOKE_TOKENS, SMOKE_SAMPLES, SMOKE_CALLS, SMOKE_LINK_BYTES = 2, 4, 2, 2, 2**16
RAGGED_FLAGS = (
    "--xla_gpu_experimental_ragged_all_to_all_use_device_kernel=true "
    "--xla_gpu_experimental_enable_nccl_symmetric_buffers=true"
)
# Of a rank's buckets: what arrives, and what goes back, are as large again.
MAX_BUCKET_BYTES = 8e9


def check(args: argparse.Namespace) -> None:
    """Fills in ranks, tokens and placement.

    Raises:
        ValueError: something is wrong with them; the message has the option.
    """
    check_ranks(args, TOKENS, SMOKE_TOKENS, 256)


def check_ranks(
    args: argparse.Namespace, default_tokens: Sequence[int], smoke_tokens: int, num_experts: int
) -> None:
    """The same for other programs: which tokens they measure, and how many experts there are."""
    if args.smoke and (args.placement != "one_process" or args.ranks or args.tokens):
        raise ValueError("--smoke has its own ranks and tokens, and placement one_process")
    args.placement = Placement(args.placement)
    tokens = args.tokens or ",".join(map(str, default_tokens))
    try:
        args.tokens = [smoke_tokens] if args.smoke else [int(t) for t in tokens.split(",")]
    except ValueError:
        raise ValueError(f"--tokens is {tokens}; allowed: numbers, comma-separated") from None
    if args.ranks is None:
        args.ranks = SMOKE_RANKS if args.smoke else min(8, count_gpus())
    if min(args.tokens) < 1:
        raise ValueError(f"--tokens is {min(args.tokens)}; allowed: 1 or more")
    if args.ranks < 2 or num_experts % args.ranks:
        raise ValueError(f"{args.ranks} ranks; allowed: 2 or more, and a divisor of {num_experts}")


def compared_in(case: GpuCase) -> list[str]:
    """What runs in one program with a case: all but the ragged ones, which may fail."""
    fits = case.num_experts * case.bucket_capacity * ROW <= MAX_BUCKET_BYTES
    return [*OURS, "gather_scatter", *(["all_to_all"] if fits else [])]


def knows_ragged_flags() -> bool:
    """Whether this jaxlib has the flags of `RAGGED_FLAGS`; XLA ends a process that has others."""
    done = subprocess.run(
        [sys.executable, "-c", "import jax; jax.devices()"],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": RAGGED_FLAGS},
        capture_output=True,
        check=False,
    )
    return done.returncode == 0


def run_size(
    args: argparse.Namespace,
    cases: list[GpuCase],
    variables: Mapping[str, str],
    found: dict[str, Any],
    save: Callable[[], None],
) -> None:
    """All that is measured with one number of tokens, but for the ragged collective.

    Args:
        args: of the command line.
        cases: of this number of tokens.
        variables: of the processes.
        found: gets what each item of the work has measured, as soon as all ranks have it.
        save: called after each.

    Raises:
        RuntimeError: a rank failed; the message has the first one's traceback first.
    """
    samples = SMOKE_SAMPLES if args.smoke else NUM_SAMPLES
    compared = routings_of(cases)
    for case in compared:
        check_against_oracle(case)
    num_bytes = SMOKE_LINK_BYTES if args.smoke else LINK_BYTES
    link = {"num_bytes": num_bytes, "num_samples": samples}
    ours = {"only": {*MEASURED, *LOW_LATENCY_OPERATIONS}, "num_samples": samples}
    work = [
        Case("links", comparison_programs.measure_links, link),
        *(Case(case.name, operation_programs.measure, {"case": case, **ours}) for case in cases),
        *(_comparison(args, case, compared_in(case)) for case in compared),
    ]
    where = args.placement.value
    key = own_gpu_tables.where(args.ranks, where)

    def add(index: int, values: list[Any]) -> None:
        if index == 0:
            found["links"][key] = own_gpu_tables.links(values)
        elif index <= len(cases):
            probe = found["probes"].get(key)
            found["results"].append(own_gpu_tables.result(cases[index - 1], values, where, probe))
        else:
            case = compared[index - 1 - len(cases)]
            found["comparisons"].append(own_gpu_tables.comparison(case, values, where))
        print(f"measured: {work[index].name}", file=sys.stderr, flush=True)
        save()

    on_ranks.run_on_ranks(work, args.ranks, args.placement, variables, add)


def _comparison(args: argparse.Namespace, case: GpuCase, keys: list[str]) -> Case:
    how_often = {
        "num_samples": SMOKE_SAMPLES if args.smoke else NUM_SAMPLES,
        "num_calls": SMOKE_CALLS if args.smoke else None,
    }
    kwargs = {"case": case, "keys": keys, **how_often}
    return Case(f"{', '.join(keys)}: {case.name}", comparison_programs.compare, kwargs)


def add_ragged(
    args: argparse.Namespace, cases: list[GpuCase], found: dict[str, Any], variables: Any
) -> None:
    """Adds `lax.ragged_all_to_all`, in processes of its own: it may fail, or not end.

    Neither its failure nor that of the flags is ours, but the report names it.
    """
    compared = routings_of(cases)
    for key, flags in (
        ("ragged_all_to_all", ""),
        ("ragged_with_flags", RAGGED_FLAGS),
    ):
        what = f"{GPU_BASELINES[key]}, T {compared[0].num_tokens}"
        if flags and not knows_ragged_flags():
            found["failures"].append(f"{what}: this jaxlib does not know the flags {flags}")
            continue
        work = [_comparison(args, case, ["ragged_all_to_all"]) for case in compared]
        xla_flags = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
        try:
            values = on_ranks.run_on_ranks(
                work,
                args.ranks,
                args.placement,
                {**variables, "XLA_FLAGS": xla_flags},
                deadline=on_ranks.DEADLINE_OF_OTHERS_S,
            )
        except RuntimeError as error:
            print(error, file=sys.stderr)
            found["failures"].append(f"{what}: {_in_short(error)}")
            continue
        for case, of_case, entry in zip(compared, values, found["comparisons"], strict=True):
            more = own_gpu_tables.comparison(case, of_case, args.placement.value)
            for field in ("seconds", "error_of_allowed"):
                entry[field][key] = more[field]["ragged_all_to_all"]


def _in_short(error: RuntimeError) -> str:
    """Which rank failed first in what, and the line of its traceback that names the exception."""
    lines = str(error).strip().splitlines()
    return f"{lines[0]} {next((line for line in lines if 'Error: ' in line), '')}".strip()


def add_probe(args: argparse.Namespace, cases: list[GpuCase], found: dict[str, Any]) -> None:
    """Adds what the hardware moves at most, if the probe is there; the report names its failure.

    Before there are other users of the GPUs.
    """
    if args.link_probe is None:
        return
    try:
        found["probes"][own_gpu_tables.where(args.ranks, args.placement.value)] = link_probe.run(
            args.link_probe, num_gpus=args.ranks, sms={case.num_sms for case in cases}
        )
    except (OSError, RuntimeError, ValueError) as error:
        found["failures"].append(f"link probe: {error}")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Runs everything; the numbers, for the JSON, which is written whenever there are more."""
    variables = {"JAX_PLATFORMS": "cpu"} if args.smoke else {}
    parts: list[dict[str, Any]] = []
    for num_tokens in args.tokens:
        start = time.monotonic()
        cases = own_gpu_cases(args.ranks, num_tokens, full=args.full)
        found: dict[str, Any] = {
            "environment": environment.describe_gpu(args.commit),
            "links": {},
            "probes": {},
            **{name: [] for name in ("results", "comparisons", "failures")},
        }
        parts.append(found)
        add_probe(args, cases, found)
        try:
            run_size(args, cases, variables, found, lambda: _save(args.json, parts))
        except RuntimeError as error:
            found["failures"].append(f"T {num_tokens}: {_in_short(error)}")
            _save(args.json, parts)
            raise
        if args.smoke:
            found["failures"].append("ragged_all_to_all: XLA does not compile it for CPUs")
        else:
            add_ragged(args, cases, found, variables)
        print(f"T {num_tokens}: {time.monotonic() - start:.0f} s", file=sys.stderr)
        _save(args.json, parts)
    return own_gpu_tables.merged(parts)


def _save(path: pathlib.Path | None, parts: list[dict[str, Any]]) -> None:
    """Writes the numbers, at once: what follows may fail, or the loan of the GPUs may end."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(own_gpu_tables.merged(parts), indent=1) + os.linesep)
    partial.rename(path)
