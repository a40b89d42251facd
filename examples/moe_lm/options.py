# SPDX-License-Identifier: Apache-2.0
"""Options of the command line, checked before anything slow happens."""

import argparse
import dataclasses
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What `parse` found on the command line; see `--help` for what each one does."""

    layers: int
    hidden: int
    heads: int
    ffn: int
    experts: int
    shared_experts: int
    topk: int
    seq_len: int
    batch: int
    steps: int
    lr: float
    warmup: int
    balance_loss: float
    z_loss: float
    seed: int
    mesh: tuple[int, int]
    platform: str
    processes: int
    cluster: bool
    backend: str
    capacity_factor: float | None
    fp8_wire: bool
    low_latency_tokens: int | None
    flavor: str
    dense: bool
    out: pathlib.Path
    resume: bool
    checkpoint_every: int
    eval_every: int
    eval_batches: int
    sample_bytes: int

    @property
    def num_devices(self) -> int:
        """Devices of the mesh."""
        return 1 if self.dense else math.prod(self.mesh)

    @property
    def identity(self) -> dict[str, Any]:
        """What a resumed run must have in common with the one that wrote the checkpoint."""
        names = ("layers", "hidden", "heads", "ffn", "experts", "shared_experts", "topk")
        names += ("seq_len", "batch", "steps", "lr", "warmup", "balance_loss", "z_loss", "seed")
        names += ("flavor",)
        return {name: getattr(self, name) for name in names}


def _number(kind: type, least: float, *, above: bool = False) -> Callable[[str], Any]:
    """A type for argparse: a finite number of this kind, at least (or above) `least`."""
    what = "an integer" if kind is int else "a number"
    allowed = f"{what} {'above' if above else 'of at least'} {least}"

    def convert(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or value < least or (above and value == least):
            raise argparse.ArgumentTypeError(f"{text!r}; allowed: {allowed}")
        return value

    return convert


def _mesh(text: str) -> tuple[int, int]:
    sizes = text.lower().split("x")
    if len(sizes) != 2 or not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: DATAxEXPERT, for instance 2x4")
    return int(sizes[0]), int(sizes[1])


def _capacity_factor(text: str) -> float | None:
    if text == "none":
        return None
    try:
        return _number(float, 0, above=True)(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: a number above 0, or none") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="train_moe_lm.py",
        description="Trains a Mixture-of-Experts language model on Python's standard library.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    for add_group in (_add_size, _add_training, _add_expert_parallelism, _add_files):
        add_group(parser)
    return parser


_POSITIVE, _COUNT = _number(int, 1), _number(int, 0)


def _add(group: Any, name: str, kind: Any, default: Any, text: str, **more: Any) -> None:
    group.add_argument(name, type=kind, default=default, help=text, **more)


def _add_size(parser: argparse.ArgumentParser) -> None:
    size = parser.add_argument_group("size of the model")
    _add(size, "--layers", _POSITIVE, 2, "transformer blocks")
    _add(size, "--hidden", _POSITIVE, 128, "channels of a token")
    _add(size, "--heads", _POSITIVE, 4, "attention heads")
    _add(size, "--ffn", _POSITIVE, 128, "inner channels of one expert")
    _add(size, "--experts", _POSITIVE, 8, "experts of a layer")
    _add(size, "--shared-experts", _COUNT, 1, "experts that every token uses besides")
    _add(size, "--topk", _POSITIVE, 2, "experts that a token chooses")
    _add(size, "--seq-len", _POSITIVE, 128, "bytes of a sequence")


def _add_training(parser: argparse.ArgumentParser) -> None:
    run = parser.add_argument_group("training")
    _add(run, "--batch", _POSITIVE, 16, "sequences per step, over all devices")
    _add(run, "--steps", _POSITIVE, 200, "training steps")
    _add(run, "--lr", _number(float, 0, above=True), 4e-3, "highest learning rate")
    _add(run, "--warmup", _COUNT, 50, "steps until the learning rate is at its highest")
    _add(run, "--balance-loss", _number(float, 0), 0.01, "factor of the load-balance loss")
    _add(run, "--z-loss", _number(float, 0), 1e-3, "factor of the router z-loss")
    _add(run, "--seed", _COUNT, 0, "of initial parameters and of the order of the data")


def _add_expert_parallelism(parser: argparse.ArgumentParser) -> None:
    ep = parser.add_argument_group("expert parallelism")
    _add(ep, "--mesh", _mesh, "2x4", "devices, as DATAxEXPERT", metavar="DATAxEXPERT")
    _add(
        ep,
        "--platform",
        str,
        "auto",
        "of the devices; auto: that of JAX_PLATFORMS, or else cpu",
        choices=("auto", "cpu", "cuda"),
    )
    _add(
        ep,
        "--processes",
        _POSITIVE,
        1,
        "processes on this machine, which share the devices of the mesh out",
    )
    ep.add_argument(
        "--cluster",
        action="store_true",
        help="this is one of several processes that SLURM, or another launcher that JAX knows, has "
        "started on one or more machines, each with its own devices",
    )
    _add(ep, "--backend", str, "auto", "of dispatch and combine", choices=("auto", "ffi", "xla"))
    _add(
        ep,
        "--capacity-factor",
        _capacity_factor,
        None,
        "room for this many times what even routing sends to a device; the rest is dropped. none: "
        "room for all",
        metavar="{none,FACTOR}",
    )
    ep.add_argument("--fp8-wire", action="store_true", help="send tokens to experts in float8")
    _add(
        ep,
        "--low-latency-tokens",
        _COUNT,
        None,
        "GPU kernels for few tokens serve at most so many of a device, as when the model writes",
    )
    _add(ep, "--flavor", str, "nnx", "of Flax", choices=("nnx", "linen"))
    ep.add_argument(
        "--dense",
        action="store_true",
        help="the same model on one device without dispatch and combine, to compare with",
    )


def _add_files(parser: argparse.ArgumentParser) -> None:
    files = parser.add_argument_group("files and reports")
    _add(files, "--out", pathlib.Path, pathlib.Path("runs/moe_lm"), "folder for what is written")
    files.add_argument(
        "--resume", action="store_true", help="go on from the newest checkpoint in --out, if any"
    )
    _add(files, "--checkpoint-every", _COUNT, 100, "steps; 0: only at the end")
    _add(files, "--eval-every", _COUNT, 50, "steps between held-out losses; 0: only at the end")
    _add(files, "--eval-batches", _POSITIVE, 8, "batches of held-out text")
    _add(files, "--sample-bytes", _COUNT, 400, "bytes that the model writes at the end")


def parse(argv: Sequence[str] | None = None) -> Options:
    """Reads the command line; a bad option ends the program with a message that names it."""
    parser = _parser()
    options = Options(**vars(parser.parse_args(argv)))
    problem = _what_does_not_fit(options)
    if problem:
        parser.error(problem)
    return options


def _what_does_not_fit(options: Options) -> str | None:
    """What is wrong with options that are fine one by one."""
    data, expert = options.mesh
    if options.topk > options.experts:
        return (
            f"argument --topk: {options.topk}; allowed: at most --experts, which is "
            f"{options.experts}"
        )
    if options.hidden % options.heads or options.hidden // options.heads % 2:
        return (
            f"argument --heads: {options.heads}; allowed: such that --hidden ({options.hidden}) "
            "divided by it is an even integer"
        )
    if options.processes > 1 and (options.dense or options.cluster):
        other = "--dense" if options.dense else "--cluster"
        return f"argument --processes: {options.processes}; allowed: 1 with {other}"
    if options.dense:
        if options.fp8_wire:
            return "argument --fp8-wire: not allowed with --dense, which sends nothing"
        return None
    if options.num_devices % options.processes:
        return (
            f"argument --processes: {options.processes}; allowed: divisors of "
            f"{options.num_devices}, the devices of --mesh {data}x{expert}"
        )
    if options.experts % expert:
        return (
            f"argument --experts: {options.experts}; allowed: multiples of {expert}, the expert "
            f"axis of --mesh {data}x{expert}"
        )
    if options.batch % (data * expert):
        return (
            f"argument --batch: {options.batch}; allowed: multiples of {data * expert}, the "
            f"devices of --mesh {data}x{expert}"
        )
    return None
