# SPDX-License-Identifier: Apache-2.0
"""From what `EpGroup(tuning=...)` was given, and the tables that there are, to a `Tuning`."""

import dataclasses
import logging
import os
import pathlib
from typing import Any

from jax_ep._src import limits
from jax_ep._src.config import EpConfig
from jax_ep._src.ranges import most_low_latency_tokens
from jax_ep._src.tuning import files
from jax_ep._src.tuning.launches import OPERATIONS, PATHS, Tuning
from jax_ep._src.tuning.table import Entry, Key

_logger = logging.getLogger("jax_ep")

# An entry serves calls of at most so many times as many tokens as it is for, or of so many times
# less: what is best for a few tokens says nothing of thousands.
MAX_DISTANCE = 4

TuningArgument = Tuning | str | os.PathLike[str] | None
_Found = tuple[Entry, str]  # and the file


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resolved:
    """What a process found for a group.

    Attributes:
        tuning: what it would use.
        missing: what `tuning="require"` asked for and was not found; None if nothing is missing.
    """

    tuning: Tuning
    missing: str | None = None


def check(tuning: Any) -> None:
    """Raises unless `EpGroup` takes it.

    Raises:
        ValueError: it does not; or there is no table in the file that it names.
    """
    if tuning is None or isinstance(tuning, Tuning):
        return
    if not isinstance(tuning, (str, os.PathLike)):
        raise ValueError(
            f"tuning is a {type(tuning).__name__}; allowed: None, 'off', 'require', the path of a "
            "table, or a Tuning"
        )
    if tuning not in ("off", "require"):
        try:
            files.read(pathlib.Path(tuning))
        except OSError as e:
            raise ValueError(
                f"tuning is {str(tuning)!r}, which cannot be read ({e}); allowed: None, 'off', "
                "'require', the path of a table, or a Tuning"
            ) from e


def resolve(tuning: TuningArgument, config: EpConfig, num_ranks: int, device: str) -> Resolved:
    """What a group on GPUs uses.

    Args:
        tuning: as `EpGroup` takes it; checked.
        config: of the group.
        num_ranks: of the group.
        device: kind of its devices.
    """
    if isinstance(tuning, Tuning):
        return Resolved(tuning=tuning)
    if tuning == "off":
        return Resolved(tuning=Tuning())
    found: dict[Key, _Found] = {}
    first = [] if tuning in (None, "require") else [pathlib.Path(tuning)]
    for path in (*first, *files.places(device)):
        table = files.try_read(path)
        if table is not None and table.device == device:
            found = {entry.key: (entry, str(path)) for entry in table.entries} | found
    group = _GroupKeys(config, num_ranks, found)
    low_latency_tokens = group.low_latency_tokens()
    launches = [
        launch
        for op in OPERATIONS
        for path in PATHS
        for tokens in group.tokens(path)
        if (launch := group.launch(op, path, tokens)) is not None
    ]
    return Resolved(
        tuning=Tuning(launches=tuple(launches), low_latency_tokens=low_latency_tokens),
        missing=group.missing(low_latency_tokens) if tuning == "require" else None,
    )


def agreed(tuning: Tuning, config: EpConfig, num_ranks: int, *, rank_0: int | None) -> Tuning:
    """What a process uses of what it found, when it has heard what rank 0's process found.

    Args:
        tuning: what it found.
        config: of the group.
        num_ranks: of the group.
        rank_0: `low_latency_tokens` of rank 0's process: all must do as that.
    """
    if config.low_latency_tokens is not None:
        return dataclasses.replace(tuning, low_latency_tokens=None)
    if tuning.low_latency_tokens != rank_0:
        _logger.warning(
            "low_latency_tokens is %s in the tuning of rank 0, which counts, and %s in that of "
            "this process: are their tables of another date?",
            rank_0, tuning.low_latency_tokens,
        )  # fmt: skip
    if rank_0 is not None:
        most = most_low_latency_tokens(config, num_ranks)
        rank_0 = min(rank_0, most, config.max_tokens_per_rank)
    return dataclasses.replace(tuning, low_latency_tokens=rank_0)


def powers_up_to(tokens: int) -> list[int]:
    """Powers of two, the last of which is at least `tokens`."""
    return [2**i for i in range((tokens - 1).bit_length() + 1)]


class _GroupKeys:
    """What a group's calls find among entries."""

    def __init__(self, config: EpConfig, num_ranks: int, found: dict[Key, _Found]) -> None:
        self._config = config
        self._num_ranks = num_ranks
        self._found = found

    def tokens(self, path: str) -> list[int]:
        """Of the group's calls."""
        most = self._config.max_tokens_per_rank
        if path == "low_latency":
            most = min(most, limits.MAX_LOW_LATENCY_TOKENS)
        return powers_up_to(most)

    def nearest(self, op: str, path: str, tokens: int) -> _Found | None:
        """The entry for a number of tokens, or the nearest one; of two, that for more tokens."""
        for factor in (1, *(f for i in (2, MAX_DISTANCE) for f in (i, 1 / i))):
            if factor * tokens < 1:
                continue
            key = key_of(self._config, self._num_ranks, op, path, int(tokens * factor))
            if key in self._found:
                return self._found[key]
        return None

    def launch(self, op: str, path: str, tokens: int) -> Any:
        """The launch of calls, if one was found."""
        found = self.nearest(op, path, tokens)
        return found and found[0].launch(tokens, self._config.max_num_sms, found[1])

    def low_latency_tokens(self) -> int | None:
        """Up to how many tokens the low-latency kernels were faster there and back.

        None where the config says it, or where it was not measured.
        """
        if self._config.low_latency_tokens is not None:
            return None
        most = None
        for tokens in self.tokens("low_latency"):
            times = [
                [
                    self._found.get(key_of(self._config, self._num_ranks, op, path, tokens))
                    for op in OPERATIONS
                ]
                for path in PATHS
            ]
            if not all(entry for of_path in times for entry in of_path):
                continue
            slow, fast = (sum(entry[0].us for entry in of_path if entry) for of_path in times)
            if fast >= slow:
                return most or 0
            most = tokens
        return most and min(most, self._config.max_tokens_per_rank)

    def missing(self, low_latency_tokens: int | None) -> str | None:
        """What no entry serves, in words."""
        up_to = self._config.low_latency_tokens or low_latency_tokens or 0
        keys = [
            key_of(self._config, self._num_ranks, op, path, tokens)
            for op in OPERATIONS
            for tokens in self.tokens("high_throughput")
            for path in ["low_latency" if tokens <= up_to else "high_throughput"]
            if self.nearest(op, path, tokens) is None
        ]
        if not keys:
            return None
        more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
        return f"no table of tuning has ({keys[0]}){more}; `python -m jax_ep tune` measures them"


def key_of(config: EpConfig, num_ranks: int, op: str, path: str, tokens: int) -> Key:
    """The key of a group's calls of `tokens`, a power of two."""
    dispatches = op == "dispatch"
    wire, recv = (config.wire_dtype, config.recv_dtype) if dispatches else (None, None)
    return Key(
        op=op,
        path=path,
        ranks=num_ranks,
        nodes=1,
        tokens=tokens,
        hidden=config.hidden,
        topk=config.num_topk,
        experts=num_ranks * config.num_local_experts(num_ranks=num_ranks),
        dtype=config.dtype.name,
        wire=None if wire is None else wire.name,
        recv=None if recv is None else recv.name,
        layout=config.layout,
    )
