# SPDX-License-Identifier: Apache-2.0
"""A table of measured launches, as a file has it: docs/guide/tuning.md says what is in it."""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from typing import Any

from jax_ep._src.tuning.launches import OPERATIONS, PATHS, TunedLaunch

FORMAT = 1
# Counts changes of the kernels after which old measurements mislead. Their tables are then ignored.
PROTOCOL = 1
# Of the best time: what a smaller number of SMs may cost.
KNEE = 1.05


@dataclasses.dataclass(frozen=True, kw_only=True)
class Key:
    """What a measurement is for.

    Attributes:
        op: "dispatch" or "combine".
        path: as `TunedLaunch.path`.
        ranks: `R`.
        nodes: hosts, or domains, that the ranks fall into.
        tokens: `T`, a power of two.
        hidden: `H`.
        topk: `K`.
        experts: `E`, with those that pad it.
        dtype: of rows: its name.
        wire: name of `EpConfig.wire_dtype`, or None; None of a combine.
        recv: name of `EpConfig.recv_dtype`, or None; None of a combine.
        layout: "expert" or "rank".
    """

    op: str
    path: str
    ranks: int
    nodes: int
    tokens: int
    hidden: int
    topk: int
    experts: int
    dtype: str
    wire: str | None
    recv: str | None
    layout: str

    def __str__(self) -> str:
        fields = dataclasses.asdict(self)
        return ", ".join(f"{name} {value}" for name, value in fields.items() if value is not None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """What a kernel is launched with. Fields as in `TunedLaunch`; None is the model's choice."""

    num_sms: int | None = None
    num_senders: int | None = None
    tail: bool | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """The fastest launch with at most some number of SMs.

    Attributes:
        us: microseconds of an operation: the median, of the slowest rank.
        choice: the launch.
    """

    us: float
    choice: Choice


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """A measurement.

    Attributes:
        key: what it is for.
        use: what was chosen.
        us: its time, as in `Point`.
        default_us: time of the model's choice, measured in turns with it.
        samples: of each of the two.
        spread: half of the interval between quartiles of `us`, as a fraction of it.
        by_sms: by number of SMs.
    """

    key: Key
    use: Choice
    us: float
    default_us: float
    samples: int
    spread: float
    by_sms: tuple[Point, ...]

    def choice(self, max_num_sms: int | None) -> Choice:
        """What is used with a budget of SMs: `use`, or if that is larger, what is best within it.

        That is the smallest number of SMs that takes at most `KNEE` of the best time. Where nothing
        was measured within the budget, it is the model's choice.
        """
        if max_num_sms is None or (self.use.num_sms or 0) <= max_num_sms:
            return self.use
        within = [p for p in self.by_sms if (p.choice.num_sms or max_num_sms) <= max_num_sms]
        return knee(within) if within else Choice()

    def launch(self, tokens: int, max_num_sms: int | None, source: str) -> TunedLaunch:
        """For calls of `tokens`, a power of two."""
        choice = dataclasses.asdict(self.choice(max_num_sms))
        op: Any = self.key.op
        path: Any = self.key.path
        return TunedLaunch(op=op, path=path, num_tokens=tokens, source=source, **choice)


def knee(points: Iterable[Point], most_us: float | None = None) -> Choice:
    """The choice with the fewest SMs that takes at most `KNEE` of the best time.

    Args:
        points: at least one, with numbers of SMs.
        most_us: it must not take more, either; the best one may.
    """
    ordered = sorted(points, key=lambda point: (point.choice.num_sms or 0, point.us))
    best = min(point.us for point in ordered)
    limit = best * KNEE if most_us is None else max(best, min(best * KNEE, most_us))
    return next(point.choice for point in ordered if point.us <= limit)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """What was measured on one kind of device.

    Attributes:
        device: name of the kind, as JAX has it.
        capability: its compute capability.
        jax_ep: version that measured last.
        entries: at most one of each key.
    """

    device: str
    capability: str = ""
    jax_ep: str = ""
    entries: tuple[Entry, ...] = ()

    def by_key(self) -> dict[Key, Entry]:
        """The entries by what they are for."""
        return {entry.key: entry for entry in self.entries}

    def merged(self, new: "Table") -> "Table":
        """This table with the entries of another one, which win.

        Raises:
            ValueError: they are of different devices.
        """
        if new.device != self.device:
            raise ValueError(f"device is {new.device!r}; allowed: {self.device!r}, as the table's")
        entries = self.by_key() | new.by_key()
        return dataclasses.replace(new, entries=tuple(entries.values()))


class UnknownFormatError(ValueError):
    """A table of another format or protocol."""


def to_json(table: Table) -> str:
    """The text of a file: one entry a line."""
    head = {
        "format": FORMAT,
        "protocol": PROTOCOL,
        "device": table.device,
        "capability": table.capability,
        "jax_ep": table.jax_ep,
    }
    lines = [json.dumps(_entry_to_json(entry)) for entry in table.entries]
    return json.dumps(head)[:-1] + ', "entries": [\n' + ",\n".join(lines) + "\n]}\n"


def _choice_to_json(choice: Choice) -> dict[str, Any]:
    fields = {"num_sms": choice.num_sms, "senders": choice.num_senders, "tail": choice.tail}
    return {name: value for name, value in fields.items() if value is not None}


def _entry_to_json(entry: Entry) -> dict[str, Any]:
    by_sms = {}
    for point in entry.by_sms:
        choice = _choice_to_json(point.choice)
        by_sms[str(choice.pop("num_sms"))] = {"us": point.us, **choice}
    return {
        "key": dataclasses.asdict(entry.key),
        "use": _choice_to_json(entry.use),
        "us": entry.us,
        "default_us": entry.default_us,
        "samples": entry.samples,
        "spread": entry.spread,
        "by_sms": by_sms,
    }


def from_json(text: str) -> Table:
    """The table of a file's text.

    Raises:
        UnknownFormatError: it is of another format or protocol.
        ValueError: it is no table; the message says why.
    """
    try:
        whole = json.loads(text)
        found = (whole["format"], whole["protocol"])
    except (ValueError, TypeError, KeyError) as e:
        raise ValueError(f"no table of tuning: {type(e).__name__}: {e}") from e
    if found != (FORMAT, PROTOCOL):
        raise UnknownFormatError(
            f"format and protocol are {found}; allowed: {(FORMAT, PROTOCOL)}: tune again"
        )
    try:
        return Table(
            device=_text(whole["device"]),
            capability=_text(whole.get("capability", "")),
            jax_ep=_text(whole.get("jax_ep", "")),
            entries=tuple(_entry_from_json(entry) for entry in whole["entries"]),
        )
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        raise ValueError(f"no table of tuning: {type(e).__name__}: {e}") from e


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _choice_from_json(found: Mapping[str, Any], num_sms: int | None) -> Choice:
    return Choice(num_sms=num_sms, num_senders=found.get("senders"), tail=found.get("tail"))


def _entry_from_json(found: Mapping[str, Any]) -> Entry:
    key = Key(**found["key"])
    if key.op not in OPERATIONS or key.path not in PATHS:
        raise ValueError(f"op {key.op!r}, path {key.path!r}")
    points = [
        Point(us=float(point["us"]), choice=_choice_from_json(point, int(num_sms)))
        for num_sms, point in found["by_sms"].items()
    ]
    entry = Entry(
        key=key,
        use=_choice_from_json(found["use"], found["use"].get("num_sms")),
        us=float(found["us"]),
        default_us=float(found["default_us"]),
        samples=int(found["samples"]),
        spread=float(found["spread"]),
        by_sms=tuple(points),
    )
    for most in (None, *(point.choice.num_sms for point in points)):
        entry.launch(key.tokens, most, "file")  # or raises
    hash(entry)  # all fields are plain values
    return entry
