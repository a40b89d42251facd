# SPDX-License-Identifier: Apache-2.0
"""Draws a step on CPU devices from a profile, and says which exchanges waited for whom.

    python tools/docs/trace_picture.py docs/images/trace.svg
    python tools/docs/trace_picture.py picture.svg --trace FOLDER --ranks 4

The first one trains for a few steps as examples/train_moe_lm.py does, and profiles one; the second
one takes what `jax.profiler.trace(FOLDER)` has written, its last execution. Needs matplotlib.
"""

import argparse
import collections
import dataclasses
import gzip
import json
import pathlib
import sys
import tempfile
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).resolve().parents[2]
# XLA's collectives, by its names and by JAX's; all else is a device's own work.
COLLECTIVES = (
    *("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter"),
    *("psum", "pmax", "pmin", "all_gather", "all_to_all", "ppermute", "reduce_scatter"),
)


@dataclasses.dataclass(frozen=True)
class Event:
    """An operation on a device, in µs; of an exchange, as long as the rank does not wait."""

    device: int
    run: str
    name: str
    start: float
    duration: float

    @property
    def end(self) -> float:
        """When it ends, or the rank begins to wait."""
        return self.start + self.duration


@dataclasses.dataclass(frozen=True)
class Exchange:
    """An exchange of an EP group. The rank that comes last does the work of all."""

    name: str
    events: tuple[Event, ...]  # of each rank, in the order in which they came

    @property
    def last(self) -> Event:
        """That of the rank that came last."""
        return self.events[-1]

    def waits(self) -> dict[int, float]:
        """Device -> µs from when it had come until the last one came."""
        return {event.device: max(0.0, self.last.start - event.end) for event in self.events[:-1]}


def read(folder: pathlib.Path) -> list[Event]:
    """Events of the last execution of a program in the newest profile of a folder.

    ValueError if there is no profile, or none of CPU devices.
    """
    profiles = sorted(folder.rglob("*.trace.json.gz"))
    if not profiles:
        raise ValueError(f"{folder} has no *.trace.json.gz")
    with gzip.open(profiles[-1]) as file:
        traced = json.load(file)["traceEvents"]
    events = [
        Event(
            int(event["args"]["device_ordinal"]), event["args"]["run_id"],
            event["name"], event["ts"], event["dur"],
        )
        for event in traced
        if event.get("ph") == "X" and {"device_ordinal", "hlo_op"} <= event.get("args", {}).keys()
    ]  # fmt: skip
    exchanges = [event for event in events if event.name.startswith("jax_ep_")]
    if not exchanges:
        raise ValueError(f"{profiles[-1]}: no exchange on a CPU device, backend ffi")
    run = max(exchanges, key=lambda event: event.start).run
    return sorted((event for event in events if event.run == run), key=lambda event: event.start)


def exchanges(events: list[Event], ranks: int) -> list[Exchange]:
    """Those of EP groups of `ranks` devices each, by when they began.

    A first half of one waits for nobody, and is none.
    """
    visits: dict[tuple[str, int], int] = collections.Counter()
    met: dict[tuple[str, int, int], list[Event]] = collections.defaultdict(list)
    for event in events:
        if event.name.startswith("jax_ep_") and "_start" not in event.name:
            visit = visits[event.name, event.device]
            visits[event.name, event.device] += 1
            met[event.name, event.device // ranks, visit].append(event)
    return [
        Exchange(name, tuple(sorted(of_ranks, key=lambda event: event.end)))
        for (name, _, _), of_ranks in met.items()
    ]


def lines(found: list[Exchange]) -> Iterator[str]:
    """A table of exchanges: who was last, how long others waited for it, what the work took."""
    begin = min(event.start for exchange in found for event in exchange.events)
    yield "   at ms  exchange                    last  longest wait, ms  mean wait, ms  copying, ms"
    for exchange in found:
        waits = list(exchange.waits().values()) or [0.0]
        mean = sum(waits) / len(waits)
        yield (
            f"{(exchange.last.start - begin) / 1e3:8.2f}  {exchange.name:26}"
            f"{exchange.last.device:6}{max(waits) / 1e3:18.2f}{mean / 1e3:15.2f}"
            f"{exchange.last.duration / 1e3:13.2f}"
        )


# In the order in which they are drawn.
COLORS = {
    "own work": "0.6",
    "XLA's collectives, waiting included": "tab:purple",
    "waiting for a rank": "#ffbb78",
    "waiting while one copies": "#aec7e8",
    "copying, for all": "tab:blue",
}
OWN, COLLECTIVE, WAITING, MEANWHILE, COPYING = COLORS

Spans = dict[int, list[tuple[float, float]]]  # device -> (start, duration)


def spans(events: list[Event], found: list[Exchange]) -> dict[str, Spans]:
    """What the devices do, of each kind of COLORS, in ms since the first event."""
    begin = events[0].start
    kinds: dict[str, Spans] = {kind: collections.defaultdict(list) for kind in COLORS}

    def add(kind: str, device: int, start: float, duration: float) -> None:
        if duration > 0:
            kinds[kind][device].append(((start - begin) / 1e3, duration / 1e3))

    for event in events:
        if not event.name.startswith("jax_ep_"):
            kind = COLLECTIVE if event.name.startswith(COLLECTIVES) else OWN
            add(kind, event.device, event.start, event.duration)
    for exchange in found:
        last = exchange.last
        add(COPYING, last.device, last.start, last.duration)
        for event in exchange.events[:-1]:
            add(WAITING, event.device, event.end, last.start - event.end)
            begins = max(event.end, last.start)
            add(MEANWHILE, event.device, begins, last.end - begins)
    return kinds


def draw(events: list[Event], found: list[Exchange], title: str, path: pathlib.Path) -> None:
    """A lane for each device: what it does, where it waits, and who copies for all."""
    import matplotlib as mpl  # noqa: PLC0415
    from matplotlib import pyplot as plt  # noqa: PLC0415

    figure, axes = plt.subplots(figsize=(11, 4.2), layout="constrained")
    gap = (events[-1].end - events[0].start) / 1e3 / 4000  # a fourth of what one sees
    for kind, lanes in spans(events, found).items():
        axes.broken_barh([], (0, 0), color=COLORS[kind], label=kind)
        for device, of_device in lanes.items():
            axes.broken_barh(merged(of_device, gap), (device - 0.4, 0.8), color=COLORS[kind])
    devices = sorted({event.device for event in events})
    axes.set_yticks(devices, [f"device {device}" for device in devices])
    axes.invert_yaxis()
    axes.set_xlabel("ms")
    axes.set_title(title, fontsize=10)
    figure.legend(loc="outside lower center", ncols=len(COLORS), fontsize=8, frameon=False)
    mpl.rcParams["svg.hashsalt"] = path.name
    mpl.rcParams["svg.fonttype"] = "none"
    figure.savefig(path, dpi=110, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)


def merged(parts: list[tuple[float, float]], gap: float) -> list[tuple[float, float]]:
    """(start, duration) of what lies no further apart than `gap`, so that a picture stays small."""
    whole: list[list[float]] = []
    for start, duration in sorted(parts):
        if whole and start - whole[-1][1] <= gap:
            whole[-1][1] = max(whole[-1][1], start + duration)
        else:
            whole.append([start, start + duration])
    return [(start, end - start) for start, end in whole]


def record(folder: pathlib.Path, arguments: list[str]) -> int:
    """Profiles a step of the training example, not its first; returns the ranks of an EP group."""
    sys.path.insert(0, str(ROOT / "examples"))
    from moe_lm.devices import set_up_devices  # noqa: PLC0415
    from moe_lm.options import parse  # noqa: PLC0415

    options = parse(arguments)
    set_up_devices(options)
    import jax  # noqa: PLC0415

    from moe_lm.build import build, place  # noqa: PLC0415
    from moe_lm.corpus import Corpus  # noqa: PLC0415
    from moe_lm.training import initial_state, make_optimizer, make_step  # noqa: PLC0415

    setup = build(options)
    optimizer = make_optimizer(options)
    state = initial_state(options, setup, optimizer)
    step = jax.jit(make_step(options, setup.model, optimizer))
    corpus = Corpus.of_standard_library()
    for number in range(4):
        text = corpus.training_batch(
            number, batch=options.batch, seq_len=options.seq_len, seed=options.seed
        )
        text = place(text, setup.by_batch)
        if number == 3:
            jax.profiler.start_trace(folder)
        state, *_ = jax.block_until_ready(step(state, text))
    jax.profiler.stop_trace()
    setup.group.close()
    return options.mesh[1]


def main() -> None:
    """Draws, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("picture", type=pathlib.Path)
    parser.add_argument("--trace", type=pathlib.Path, help="a folder of jax.profiler.trace")
    parser.add_argument("--ranks", type=int, help="devices of an EP group, with --trace")
    parser.add_argument("--title", default="A training step on 8 devices of a CPU, mesh 2 x 4")
    args, others = parser.parse_known_args()
    if (args.trace is None) != (args.ranks is None):
        parser.error("--trace and --ranks go together")
    with tempfile.TemporaryDirectory() as folder:
        if args.trace:
            ranks, where = args.ranks, args.trace
        else:
            where = pathlib.Path(folder)
            ranks = record(where, others)
        events = read(where)
    found = exchanges(events, ranks)
    print(*lines(found), sep="\n")
    draw(events, found, args.title, args.picture)


if __name__ == "__main__":
    main()
