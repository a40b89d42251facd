# SPDX-License-Identifier: Apache-2.0
"""Options of serve_moe_lm.py, beside those of the model that it serves."""

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any

from moe_lm.options import Options
from moe_lm.options import parse as parse_model


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """What was found on the command line; see `--help` for what each one does."""

    bench: bool
    host: str
    port: int
    slots: int
    max_len: int
    widths: tuple[int, ...]
    max_prefill_tokens: int
    queue: int
    spare_slots: int
    rebalance_every: int
    fail_rank: tuple[int, float] | None
    kill_rank: tuple[int, float] | None
    train_steps: int
    url: str | None
    rate: float
    requests: int
    prompt: tuple[int, int]
    output: tuple[int, int]
    temperature: float
    load_seed: int
    slo: dict[str, float]


def parse(argv: Sequence[str]) -> tuple[ServeOptions, Options]:
    """Options of this program, and those of the model.

    A bad one ends the program with a message that names it.
    """
    argv = list(argv)
    bench = argv[:1] == ["bench"]
    parser = _parser()
    own, others = parser.parse_known_args(argv[1:] if bench else argv)
    serve = ServeOptions(bench=bench, **vars(own))
    options = parse_model(others)
    for name, least in _LEAST.items():
        if (value := getattr(serve, name)) < least:
            parser.error(f"argument --{name.replace('_', '-')}: {value}; allowed: at least {least}")
    if problem := _what_does_not_fit(serve, options):
        parser.error(problem)
    return serve, options


_LEAST = {
    "slots": 1,
    "max_len": 2,
    "max_prefill_tokens": 2,
    "queue": 0,
    "spare_slots": 0,
    "rebalance_every": 1,
    "train_steps": 1,
    "requests": 1,
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="serve_moe_lm.py",
        usage="%(prog)s [bench] [options]",
        description="Serves the model of train_moe_lm.py over HTTP, or with `bench` also sends it "
        "requests and measures; takes the options of train_moe_lm.py, too.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    _add_server(parser.add_argument_group("server"))
    _add_bench(parser.add_argument_group("bench"))
    return parser


def _add_server(group: Any) -> None:
    add = group.add_argument
    add("--host", default="127.0.0.1", help="to listen on; there is no authentication")
    add("--port", type=int, default=8000, help="0: any")
    add("--slots", type=int, default=4, help="sequences that a device writes at a time")
    add("--max-len", type=int, default=512, help="bytes of a sequence, prompt and text")
    add(
        "--widths",
        type=_ints,
        default="32,128",
        help="lengths of rows in which prompts are read; each is a program",
        metavar="N,...",
    )
    add(
        "--max-prefill-tokens",
        type=int,
        default=512,
        help="bytes of prompts between two bytes of those who write, over all devices",
    )
    add("--queue", type=int, default=256, help="requests that may wait for a slot")
    add("--spare-slots", type=int, default=0, help="of each rank, for copies of popular experts")
    add("--rebalance-every", type=int, default=200, help="steps of a window of loads")
    add(
        "--fail-rank",
        type=_rank_at,
        default=None,
        help="a rank leaves after so many seconds of the load, or of the server",
        metavar="RANK@SECONDS",
    )
    add(
        "--kill-rank",
        type=_rank_at,
        default=None,
        help="with --processes: the process of a rank gets SIGKILL then, and the server ends",
        metavar="RANK@SECONDS",
    )
    add(
        "--train-steps",
        type=int,
        default=100,
        help="where --out has no checkpoint, a model is trained for so many steps first",
    )


def _add_bench(group: Any) -> None:
    add = group.add_argument
    add("--url", default=None, help="of a server that runs; none: one is started")
    add("--rate", type=float, default=10.0, help="requests a second, at random times; 0: at once")
    add("--requests", type=int, default=100, help="how many")
    add("--prompt", type=_range, default="16:256", help="bytes of a prompt", metavar="LOW:HIGH")
    add("--output", type=_range, default="32:128", help="bytes to write", metavar="LOW:HIGH")
    add("--temperature", type=float, default=0.7, help="of the requests")
    add("--load-seed", type=int, default=0, help="of what is random about the load")
    add(
        "--slo",
        type=_slo,
        default={},
        help="milliseconds, for the share of requests that kept them: ttft, tpot, itl (99 %%), e2e",
        metavar="NAME:MS,...",
    )


def _ints(text: str) -> tuple[int, ...]:
    try:
        values = tuple(int(part) for part in text.split(","))
    except ValueError:
        values = ()
    if list(values) != sorted(set(values)) or not values or values[0] < 2:
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: ascending numbers of at least 2")
    return values


def _range(text: str) -> tuple[int, int]:
    low, _, high = text.partition(":")
    if not low.isdecimal() or not high.isdecimal() or not 1 <= int(low) <= int(high):
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: LOW:HIGH, at least 1")
    return int(low), int(high)


def _rank_at(text: str) -> tuple[int, float]:
    rank, _, seconds = text.partition("@")
    try:
        found = int(rank), float(seconds.removesuffix("s"))
    except ValueError:
        found = -1, -1.0
    if min(found) < 0:
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: RANK@SECONDS, for instance 3@5s")
    return found


def _slo(text: str) -> dict[str, float]:
    found = {}
    for part in text.split(","):
        name, _, value = part.partition(":")
        try:
            found[name] = float(value)
        except ValueError:
            found[""] = 0.0
    if found.keys() - {"ttft", "tpot", "itl", "e2e"}:
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: for instance ttft:200,itl:50")
    return found


def _what_does_not_fit(serve: ServeOptions, options: Options) -> str | None:
    if options.cluster:
        return "argument --cluster: not allowed, the server is on one machine; --processes"
    if options.dense:
        return "argument --dense: not allowed, the server exchanges"
    if options.flavor != "nnx":
        return f"argument --flavor: {options.flavor}; allowed: nnx"
    if options.processes > 1 and serve.spare_slots:
        return f"argument --spare-slots: {serve.spare_slots}; allowed: 0 with --processes"
    if serve.kill_rank is not None and (options.processes == 1 or serve.url):
        return "argument --kill-rank: allowed with --processes, and without --url"
    ranks = options.mesh[1]
    for name in ("fail_rank", "kill_rank"):
        at = getattr(serve, name)
        if at is not None and at[0] >= ranks:
            name = name.replace("_", "-")
            return f"argument --{name}: {at[0]}; allowed: ranks 0 to {ranks - 1}"
    if serve.rate < 0:
        return f"argument --rate: {serve.rate}; allowed: at least 0"
    most = options.batch * options.seq_len // options.num_devices
    if max(serve.widths[-1], serve.slots) > most:
        return (
            f"argument --widths, --slots: {serve.widths[-1]} and {serve.slots}; allowed: up to "
            f"{most} bytes on each device, which is --batch times --seq-len over the devices"
        )
    if serve.bench and serve.prompt[1] + serve.output[1] > serve.max_len:
        return (
            f"argument --prompt, --output: up to {serve.prompt[1]} and {serve.output[1]}; "
            f"allowed: --max-len together, which is {serve.max_len}"
        )
    return None
