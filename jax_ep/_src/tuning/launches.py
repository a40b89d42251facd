# SPDX-License-Identifier: Apache-2.0
"""`Tuning`: how the kernels of a group are launched, where the model's choice is not taken."""

import dataclasses
from typing import Literal

from jax_ep._src import limits
from jax_ep._src.public import set_module

OPERATIONS = ("dispatch", "combine")
PATHS = ("high_throughput", "low_latency")


@set_module("jax_ep")
@dataclasses.dataclass(frozen=True, kw_only=True)
class TunedLaunch:
    """How kernels of one operation are launched for calls of some number of tokens.

    It moves work between the SMs and warps of one GPU. It has no effect on the numbers, and ranks
    need not agree on it. Frozen, hashable, checked when it is made.

    Attributes:
        op: "dispatch" (with its plan, as `dispatch` runs it) or "combine".
        path: the kernels: "high_throughput", or "low_latency", of which all warps send.
        num_tokens: `T` of calls, a power of two; calls of more than half as many take it, too.
        num_sms: SMs that a kernel takes at most; `EpConfig.max_num_sms` still holds. None: by
            default.
        num_senders: warps of each block that send before they receive. None: the model's choice.
        tail: whether a dispatch ends on idle SMs, of which it takes `EpConfig.tail_num_sms` at
            most. None: the model's choice.
        source: where it comes from, for people.

    Raises:
        ValueError: a field has a value that is not allowed.
    """

    op: Literal["dispatch", "combine"]
    path: Literal["high_throughput", "low_latency"] = "high_throughput"
    num_tokens: int
    num_sms: int | None = None
    num_senders: int | None = None
    tail: bool | None = None
    source: str = "argument"

    def __post_init__(self) -> None:
        for name, allowed in (("op", OPERATIONS), ("path", PATHS)):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"TunedLaunch.{name} is {getattr(self, name)!r}; allowed: "
                    f"{', '.join(map(repr, allowed))}"
                )
        if not limits.is_int(self.num_tokens) or self.num_tokens & (self.num_tokens - 1):
            raise ValueError(
                f"TunedLaunch.num_tokens is {self.num_tokens!r}; allowed: a power of two"
            )
        for name in ("num_sms", "num_senders"):
            value = getattr(self, name)
            if value is not None and not limits.is_int(value):
                raise ValueError(f"TunedLaunch.{name} is {value!r}; allowed: None or an int from 1")
        if self.tail not in (None, True, False):
            raise ValueError(f"TunedLaunch.tail is {self.tail!r}; allowed: None, True, False")
        only = {"num_senders": self.path == "high_throughput"}
        only["tail"] = only["num_senders"] and self.op == "dispatch"
        for name, allowed_here in only.items():
            if getattr(self, name) is not None and not allowed_here:
                raise ValueError(
                    f"TunedLaunch.{name} is {getattr(self, name)!r}; allowed: None, for a "
                    f"{self.op} of path {self.path!r}"
                )


def as_native(launch: TunedLaunch) -> tuple[str, bool, int, int, int, int]:
    """A launch as the compiled module takes it."""
    tail = -1 if launch.tail is None else int(launch.tail)
    is_low_latency = launch.path == "low_latency"
    numbers = (launch.num_tokens, launch.num_sms or 0, launch.num_senders or 0, tail)
    return (launch.op, is_low_latency, *numbers)


@set_module("jax_ep")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Tuning:
    """What a group uses instead of the model's choices. Frozen and hashable.

    `EpGroup.tuning` is one, and `EpGroup(tuning=...)` takes one, which is then used as it is.

    Attributes:
        launches: at most one for each operation, path and number of tokens. Calls that none is
            for are launched as the model says.
        low_latency_tokens: what stands for `EpConfig.low_latency_tokens` where that is None, the
            same on all ranks. None: 0.

    Raises:
        ValueError: a field has a value that is not allowed.
    """

    launches: tuple[TunedLaunch, ...] = ()
    low_latency_tokens: int | None = None

    def __post_init__(self) -> None:
        for launch in self.launches:
            if not isinstance(launch, TunedLaunch):
                raise ValueError(
                    f"Tuning.launches has a {type(launch).__name__}; allowed: TunedLaunch"
                )
        calls = [(launch.op, launch.path, launch.num_tokens) for launch in self.launches]
        for call in calls:
            if calls.count(call) > 1:
                raise ValueError(f"Tuning.launches has {calls.count(call)} for {call}; allowed: 1")
        most = limits.MAX_LOW_LATENCY_TOKENS
        tokens = self.low_latency_tokens
        if tokens is not None and not limits.is_int(tokens, 0, most):
            raise ValueError(
                f"Tuning.low_latency_tokens is {tokens!r}; allowed: None or an int from 0 to {most}"
            )

    def __str__(self) -> str:
        if not self.launches and self.low_latency_tokens is None:
            return "nothing is tuned"
        sources = sorted({launch.source for launch in self.launches})
        text = f"{len(self.launches)} launches are tuned"
        if sources:
            text += f" (from {', '.join(sources)})"
        if self.low_latency_tokens is not None:
            text += f", low_latency_tokens {self.low_latency_tokens}"
        return text
