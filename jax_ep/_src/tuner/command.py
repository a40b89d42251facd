# SPDX-License-Identifier: Apache-2.0
"""`python -m jax_ep tune`."""

import argparse
import dataclasses
import os
import pathlib
import sys
import time
from collections.abc import Iterator

import jax

from jax_ep._src.tuner import cells, plot, progress
from jax_ep._src.tuner.measure import NO_GRAPHS
from jax_ep._src.tuner.search import MANY, WrongBitsError
from jax_ep._src.tuning import files
from jax_ep._src.tuning.lookup import powers_up_to
from jax_ep._src.tuning.table import Entry, Table
from jax_ep._src.version import version

_WIRES = {"none": None, "fp8": "float8_e4m3fn"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of the command."""
    parser.add_argument("--tokens", default="1:8192", metavar="A:B", help="T, powers of two")
    parser.add_argument("--hidden", type=int, required=True, metavar="H")
    parser.add_argument("--topk", type=int, required=True, metavar="K")
    parser.add_argument("--experts", type=int, required=True, metavar="E", help="of all ranks")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--wire", default="none", help="comma-separated: none, fp8")
    parser.add_argument("--layout", default="expert", choices=("expert", "rank"))
    parser.add_argument("--ranks", type=int, metavar="R", help="default: all GPUs of this host")
    parser.add_argument("--num-sms", type=int, metavar="N", help="measure nothing beyond")
    parser.add_argument("--minutes", type=float, help="stop then; the next run goes on")
    parser.add_argument("--samples", type=int, default=MANY, help=argparse.SUPPRESS)
    parser.add_argument("--again", action="store_true", help="measure what is in the table, too")
    parser.add_argument("--dry-run", action="store_true", help="say what would be measured")
    parser.add_argument("--out", type=pathlib.Path, help="file; default: where groups look for it")
    parser.add_argument("--plot", type=pathlib.Path, help="draw what the table has: .svg or .png")


def prepare_environment() -> None:
    """What must be set before JAX starts: launches are changed between runs of a program."""
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} {NO_GRAPHS}".strip()


def sizes_of(args: argparse.Namespace) -> cells.Sizes:
    """What the command line asks for.

    Raises:
        ValueError: it cannot be; the message names the option.
    """
    first, _, last = args.tokens.partition(":")
    try:
        least, most = int(first), int(last or first)
    except ValueError:
        least, most = 0, 0
    if not 1 <= least <= most:
        raise ValueError(f"--tokens is {args.tokens}; allowed: A:B with 1 <= A <= B")
    wires = args.wire.split(",")
    if unknown := [wire for wire in wires if wire not in _WIRES]:
        raise ValueError(f"--wire is {', '.join(unknown)}; allowed: {', '.join(_WIRES)}")
    if args.plot and args.plot.suffix not in (".svg", ".png"):
        raise ValueError(f"--plot is {args.plot}; allowed: a name that ends in .svg or .png")
    return cells.Sizes(
        num_experts=args.experts,
        num_topk=args.topk,
        hidden=args.hidden,
        tokens=tuple(t for t in powers_up_to(most) if t >= least),
        dtype=args.dtype,
        wires=tuple(_WIRES[wire] for wire in wires),
        layout=args.layout,
        max_num_sms=args.num_sms,
    )


def run(args: argparse.Namespace) -> int:
    """Tunes; the exit status. What is finished stays, whatever ends it.

    Raises:
        ValueError: a bad argument, or sizes that no group can have.
        EpUnavailable: there are no GPUs, or the kernels cannot serve them.
    """
    sizes = sizes_of(args)
    mesh = cells.mesh_of(args.ranks)
    device = mesh.devices.flat[0]
    path = args.out or files.cache_path(device.device_kind)
    empty = Table(
        device=device.device_kind,
        capability=str(getattr(device, "compute_capability", "")),
        jax_ep=version(),
    )
    done = set() if args.again else _measured(path, empty)
    todo = [cell for cell in cells.cells(sizes, mesh.size) if cell.key not in done]
    print(f"{len(todo)} of {len(todo) + len(done)} to measure; table: {path}")
    if args.dry_run:
        for cell in todo:
            print(cell.key)
        return 0
    try:
        for entry in _measured_now(args, mesh, todo):
            files.merge_into(path, dataclasses.replace(empty, entries=(entry,)))
    except KeyboardInterrupt:
        print("interrupted; what is finished is in the table", file=sys.stderr)
    except WrongBitsError as error:
        print(f"python -m jax_ep tune: {error}", file=sys.stderr)
        return 1
    if args.plot:
        plot.draw(files.read(path), args.plot)
    return 0


def _measured(path: pathlib.Path, like: Table) -> set[object]:
    """Keys that the table has, of this device and version."""
    table = files.try_read(path)
    if table is None or (table.device, table.jax_ep) != (like.device, like.jax_ep):
        return set()
    return set(table.by_key())


def _measured_now(
    args: argparse.Namespace, mesh: jax.sharding.Mesh, todo: list[cells.Cell]
) -> Iterator[Entry]:
    """Entries, until all are there or the time is over."""
    deadline = time.monotonic() + (args.minutes or 1e9) * 60
    title = f"tuning on {mesh.size} x {mesh.devices.flat[0].device_kind}"
    with progress.shown(title, len(todo)) as shown:
        entries = cells.measure_all(
            mesh,
            todo,
            args.num_sms,
            begins=shown.begins,
            tries=shown.tries,
            num_samples=args.samples,
        )
        for entry in entries:
            shown.finished(entry)
            yield entry
            if time.monotonic() > deadline:
                shown.say("the time is over; the next run goes on from here")
                return
