# SPDX-License-Identifier: Apache-2.0
"""What `python -m jax_ep tune` measures: cells, and the groups that they are measured in."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.sharding import Mesh

from jax_ep._src.config import EpConfig
from jax_ep._src.errors import EpUnavailable
from jax_ep._src.groups import native
from jax_ep._src.groups.group import EpGroup
from jax_ep._src.limits import MAX_LOW_LATENCY_TOKENS
from jax_ep._src.ranges import most_low_latency_tokens
from jax_ep._src.tuner.measure import GroupMeasure, GroupPrograms
from jax_ep._src.tuner.search import Grid, search
from jax_ep._src.tuning.launches import OPERATIONS, PATHS
from jax_ep._src.tuning.lookup import key_of
from jax_ep._src.tuning.table import Entry, Key

_SMS = (8, 16, 24, 32, 48, 64, 96)
_SENDERS = {"dispatch": (2, 3, 4, 5, 6, 8, 10, 12), "combine": (4, 6, 8, 10, 12, 14)}
# Smaller calls have no tail: nothing is left to do when all has been sent.
_LEAST_TAIL_TOKENS = 256
_TIMEOUT_S = 100.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is tuned. Fields as in `EpConfig`, several of some.

    Attributes:
        tokens: `T` of calls, powers of two.
        wires: `EpConfig.wire_dtype` of the groups.
        max_num_sms: a budget that nothing is measured beyond; None: all SMs.
    """

    num_experts: int
    num_topk: int
    hidden: int
    tokens: tuple[int, ...]
    dtype: str = "bfloat16"
    wires: tuple[str | None, ...] = (None,)
    layout: Any = "expert"
    max_num_sms: int | None = None

    def config(self, wire: str | None, low_latency_tokens: int, max_tokens: int) -> EpConfig:
        """Of a group. The worst case of rows, of which those without a token are left alone."""
        return EpConfig(
            num_experts=self.num_experts,
            num_topk=self.num_topk,
            hidden=self.hidden,
            max_tokens_per_rank=max_tokens,
            dtype=self.dtype,
            wire_dtype=wire,
            layout=self.layout,
            zero_fill=False,
            low_latency_tokens=low_latency_tokens,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """One operation and size."""

    key: Key
    config: EpConfig


def cells(sizes: Sizes, num_ranks: int) -> list[Cell]:
    """All there are; those of one group follow each other. A combine knows no wire."""
    found = []
    for path in PATHS:
        for wire in sizes.wires:
            probe = sizes.config(wire, 0, max(sizes.tokens))
            most = max(sizes.tokens)
            if path == "low_latency":
                most = min(most, MAX_LOW_LATENCY_TOKENS, most_low_latency_tokens(probe, num_ranks))
            tokens = [t for t in sizes.tokens if t <= most]
            if not tokens:
                continue
            up_to = max(tokens)
            config = sizes.config(wire, up_to if path == "low_latency" else 0, up_to)
            keys = [key_of(config, num_ranks, op, path, t) for t in tokens for op in OPERATIONS]
            found += [Cell(key=key, config=config) for key in keys]
    unique: dict[Key, Cell] = {}
    for cell in found:
        unique.setdefault(cell.key, cell)
    return list(unique.values())


def grid(key: Key, device_sms: int, max_num_sms: int | None) -> Grid:
    """The candidates of a cell."""
    limits = native.load_cuda().launch_limits()
    by_default = limits["low_latency_num_sms" if key.path == "low_latency" else "num_sms"]
    most = min(device_sms, max_num_sms or device_sms)
    num_sms = sorted({*(n for n in _SMS if n < most), most, min(by_default, most)})
    if key.path == "low_latency":
        return Grid(default_sms=min(by_default, most), num_sms=tuple(num_sms))
    warps = limits[f"{key.op}_warps"]
    return Grid(
        default_sms=min(by_default, most),
        num_sms=tuple(num_sms),
        num_senders=tuple(n for n in _SENDERS[key.op] if n < warps),
        tail=key.op == "dispatch" and key.tokens >= _LEAST_TAIL_TOKENS,
    )


def device_sms(device: jax.Device) -> int:
    """SMs of a GPU; many where JAX does not say: no launch takes more than there are."""
    return int(getattr(device, "core_count", 0) or 132)


def mesh_of(num_ranks: int | None) -> Mesh:
    """A mesh of this process's devices.

    Raises:
        ValueError: there are not so many.
    """
    devices = jax.local_devices()
    num_ranks = len(devices) if num_ranks is None else num_ranks
    if not 1 <= num_ranks <= len(devices):
        raise ValueError(f"ranks is {num_ranks}; allowed: 1 to {len(devices)}, the devices here")
    return jax.make_mesh((num_ranks,), ("expert",), devices=devices[:num_ranks])


def measure_all(
    mesh: Mesh,
    found: list[Cell],
    max_num_sms: int | None,
    *,
    begins: Callable[[Key], None],
    tries: Callable[[str], None],
    num_samples: int,
) -> Iterator[Entry]:
    """Measures cells one by one.

    Args:
        mesh: of GPUs of this process, with one axis.
        found: cells; those of one group follow each other.
        max_num_sms: as in `Sizes`.
        begins: called before each.
        tries: gets what is tried.
        num_samples: of the finalists.

    Raises:
        WrongBitsError: a launch changes a result.
    """
    sms = device_sms(mesh.devices.flat[0])
    for config in dict.fromkeys(cell.config for cell in found):
        with open_programs(mesh, config) as programs:
            for key in (cell.key for cell in found if cell.config == config):
                begins(key)
                measure = GroupMeasure(programs, key.op, key.path, key.tokens)
                candidates = grid(key, sms, max_num_sms)
                yield search(key, candidates, measure, num_samples=num_samples, report=tries)


@contextlib.contextmanager
def open_programs(mesh: Mesh, config: EpConfig) -> Iterator[GroupPrograms]:
    """Those of a group that is closed at the end.

    Raises:
        EpUnavailable: the devices are no GPUs, or the kernels cannot serve them.
    """
    if mesh.devices.flat[0].platform not in ("gpu", "cuda"):
        raise EpUnavailable("the devices here are no GPUs, and only on GPUs launches are tuned")
    with EpGroup(mesh, "expert", config, backend="ffi", timeout=_TIMEOUT_S, tuning="off") as group:
        yield GroupPrograms(group)
