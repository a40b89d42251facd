# SPDX-License-Identifier: Apache-2.0
"""What is measured: sizes, routing and data, on CPU devices and on GPUs."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np

NUM_RANKS = 8
# Rows of a rank's receive buffer, per row of perfectly even routing.
CAPACITY_FACTOR = 1.25
DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
    """Arrays of all ranks, rank after rank.

    Attributes:
        x: `[R * T, H]` tokens.
        topk_idx: `[R * T, K]` int32, distinct experts of each token.
        topk_weights: `[R * T, K]` float32, positive, 1 in sum for each token.
        out_bar: `[R * T, H]`; the loss whose gradient is measured is `sum(out * out_bar)`.
    """

    x: np.ndarray
    topk_idx: np.ndarray
    topk_weights: np.ndarray
    out_bar: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One line of the table, but for the dtype and the direction.

    Attributes:
        num_tokens: `T`, of each rank.
        hidden: `H`.
        num_experts: `E`.
        num_topk: `K`.
    """

    num_tokens: int
    hidden: int
    num_experts: int
    num_topk: int

    @property
    def name(self) -> str:
        """`T x H x E x K`, as the option `--cases` takes it."""
        sizes = (self.num_tokens, self.hidden, self.num_experts, self.num_topk)
        return "x".join(map(str, sizes))

    @classmethod
    def parse(cls, name: str) -> "Case":
        """The case of a name.

        Raises:
            ValueError: it is not four positive numbers that make sense together.
        """
        try:
            tokens, hidden, experts, topk = (int(size) for size in name.split("x"))
        except ValueError:
            raise ValueError(f"case {name!r} is not TxHxExK, such as 256x512x32x4") from None
        if min(tokens, hidden, experts, topk) < 1 or experts % NUM_RANKS or topk > experts:
            raise ValueError(
                f"case {name!r}: sizes must be positive, E a multiple of {NUM_RANKS}, K at most E"
            )
        return cls(num_tokens=tokens, hidden=hidden, num_experts=experts, num_topk=topk)

    @property
    def num_ranks(self) -> int:
        """`R`."""
        return NUM_RANKS

    @property
    def recv_capacity(self) -> int:
        """`C`, rows of each rank's receive buffer, for all variants that have one."""
        return math.ceil(CAPACITY_FACTOR * self.num_tokens * self.num_topk)

    @functools.cached_property
    def topk_idx(self) -> np.ndarray:
        """`[R * T, K]` int32: every set of K experts is equally likely."""
        rng = np.random.default_rng(0)
        keys = rng.random((NUM_RANKS * self.num_tokens, self.num_experts))
        return np.argsort(keys, axis=1)[:, : self.num_topk].astype(np.int32)

    @functools.cached_property
    def counts(self) -> np.ndarray:
        """`[R, E]`: selections that each rank's tokens make of each expert."""
        by_source = self.topk_idx.reshape(NUM_RANKS, -1)
        return np.stack([np.bincount(idx, minlength=self.num_experts) for idx in by_source])

    @property
    def max_received(self) -> int:
        """Rows that the busiest rank receives."""
        return int(self.counts.sum(axis=0).reshape(NUM_RANKS, -1).sum(axis=1).max())

    @property
    def bucket_capacity(self) -> int:
        """Rows of a (source rank, expert) bucket: the fewest with which this routing drops none."""
        return int(self.counts.max())

    def logical_bytes(self, dtype: str) -> int:
        """What one dispatch moves: a row, and 12 bytes of index and weight, for each selection."""
        num_rows = NUM_RANKS * self.num_tokens * self.num_topk
        return num_rows * (self.hidden * DTYPES[dtype].itemsize + 12)

    def inputs(self, dtype: str) -> Inputs:
        """The arrays; the same values, but for rounding, in each dtype."""
        rng = np.random.default_rng(1)
        shape = (NUM_RANKS * self.num_tokens, self.hidden)
        weights = rng.uniform(0.1, 1.0, (shape[0], self.num_topk))
        return Inputs(
            x=rng.standard_normal(shape, np.float32).astype(DTYPES[dtype]),
            topk_idx=self.topk_idx,
            topk_weights=(weights / weights.sum(axis=1, keepdims=True)).astype(np.float32),
            out_bar=rng.standard_normal(shape, np.float32).astype(DTYPES[dtype]),
        )


DEFAULT_CASES = tuple(map(Case.parse, ("256x512x32x4", "1024x1024x64x8", "64x2048x16x2")))
SMOKE_CASES = (Case.parse("32x64x16x2"),)


# --- on GPUs --------------------------------------------------------------------------------------

HIDDEN, NUM_TOPK, NUM_EXPERTS = 7168, 8, 256
FP8 = "float8_e4m3fn"
SIZES = ((4096, 8), (8192, 4), (1024, 8), (128, 8), (1, 8))  # (T, R)
SMS = (8, 12, 16)

# Names of operations -> how tables call them.
OPERATIONS = {
    "plan": "plan",
    "dispatch": "plan + dispatch",
    "combine": "combine",
    "dispatch_vjp": "backward of dispatch",
    "combine_vjp": "backward of combine",
}
# Likewise, of the low-latency kernels; the last is the first two, one after the other.
LOW_LATENCY_OPERATIONS = {
    **{name: OPERATIONS[name] for name in ("dispatch", "combine")},
    "there_and_back": "there and back",
}


@functools.cache
def routing(num_ranks: int, num_tokens: int, kind: str) -> np.ndarray:
    """`topk_idx`, `[R, T, K]` int32, of distinct experts.

    "uniform": all sets of experts are equally likely. "zipf": the n-th most popular expert has a
    weight of 1 / n; popular experts are spread over the ranks at random.
    """
    rng = np.random.default_rng(0)
    weight = np.ones(NUM_EXPERTS)
    if kind == "zipf":
        weight = 1.0 / (1 + rng.permutation(NUM_EXPERTS))
    # The K largest of these are a draw of K experts without replacement, by weight.
    keys = rng.gumbel(size=(num_ranks, num_tokens, NUM_EXPERTS)) + np.log(weight)
    return np.argpartition(-keys, NUM_TOPK, axis=-1)[..., :NUM_TOPK].astype(np.int32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows of all ranks together.

    Attributes:
        tokens: of all ranks.
        held: of the receive buffers, with a token in them.
        busiest: held by the rank that holds most.
        away: that go to another rank; one for each token and rank.
        home: that stay.
    """

    tokens: int
    held: int
    busiest: int
    away: int
    home: int

    @classmethod
    def of(cls, topk_idx: np.ndarray, layout: str) -> "Rows":
        """Counts the rows of a routing `[R, T, K]` of which nothing is dropped."""
        num_ranks, num_tokens, _ = topk_idx.shape
        destination = topk_idx // (NUM_EXPERTS // num_ranks)
        goes = np.stack([(destination == rank).any(axis=-1) for rank in range(num_ranks)])
        home = int(sum(goes[rank, rank].sum() for rank in range(num_ranks)))
        by_rank = (
            goes.sum(axis=(1, 2))
            if layout == "rank"
            else np.bincount(destination.reshape(-1), minlength=num_ranks)
        )
        return cls(
            tokens=num_ranks * num_tokens,
            held=int(by_rank.sum()),
            busiest=int(by_rank.max()),
            away=int(goes.sum()) - home,
            home=home,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class GpuCase:
    """One line of the tables.

    Attributes:
        num_tokens: `T`, of each rank.
        num_ranks: `R`.
        wire_dtype: None (bfloat16) or FP8.
        layout: "expert" or "rank".
        num_sms: SMs of each rank, for each kernel.
        routing: "uniform" or "zipf".
        zero_fill: of the config.
        tail: whether dispatch may end on idle SMs, beyond `num_sms`.
        low_latency: whether the low-latency kernels serve it; the others do otherwise.
    """

    num_tokens: int
    num_ranks: int
    wire_dtype: str | None = None
    layout: str = "expert"
    num_sms: int = 16
    routing: str = "uniform"
    zero_fill: bool = False
    tail: bool = True
    low_latency: bool = False

    @property
    def name(self) -> str:
        """For progress and errors."""
        return ", ".join(f"{key}={value}" for key, value in dataclasses.asdict(self).items())

    @property
    def operations(self) -> tuple[str, ...]:
        """What there is to measure: on the FP8 wire only the dispatch is another kernel."""
        if self.low_latency:
            return tuple(LOW_LATENCY_OPERATIONS)
        if self.wire_dtype:
            return ("dispatch",)
        # With one token, what a chain takes by itself counts.
        return (*OPERATIONS, "chain") if self.num_tokens == 1 else tuple(OPERATIONS)

    @property
    def has_baseline(self) -> bool:
        """Whether XLA's own operations are measured beside it; with few tokens launches count."""
        default = GpuCase(num_tokens=self.num_tokens, num_ranks=self.num_ranks)
        return self == default and self.num_tokens >= 1000

    @functools.cached_property
    def topk_idx(self) -> np.ndarray:
        """`[R, T, K]` int32."""
        return routing(self.num_ranks, self.num_tokens, self.routing)

    @functools.cached_property
    def rows(self) -> Rows:
        """What the routing moves."""
        return Rows.of(self.topk_idx, self.layout)

    @property
    def recv_capacity(self) -> int:
        """`C`: a quarter more than even routing needs, or all that the busiest rank gets."""
        even = self.rows.held / self.num_ranks
        return max(math.ceil(CAPACITY_FACTOR * even), self.rows.busiest)

    @property
    def num_experts(self) -> int:
        """`E`."""
        return NUM_EXPERTS

    @functools.cached_property
    def bucket_capacity(self) -> int:
        """Rows of a (source rank, expert) bucket: the fewest with which this routing drops none."""
        return max(int(np.bincount(of_rank.reshape(-1)).max()) for of_rank in self.topk_idx)

    def config_kwargs(self) -> dict[str, Any]:
        """Of its `EpConfig`."""
        return {
            "num_experts": NUM_EXPERTS,
            "num_topk": NUM_TOPK,
            "hidden": HIDDEN,
            "max_tokens_per_rank": self.num_tokens,
            "wire_dtype": self.wire_dtype,
            "layout": self.layout,
            "recv_capacity": self.recv_capacity,
            "zero_fill": self.zero_fill,
            "max_num_sms": self.num_sms,
            "tail_num_sms": None if self.tail else 0,
            "low_latency_tokens": self.num_tokens if self.low_latency else 0,
        }


# --- all ranks on one ----------------------------------------------------------------------------


def some_shared_cases() -> list[GpuCase]:
    """Both wires at all sizes; all else at the first size, changed by one from the default."""
    first = {"num_tokens": SIZES[0][0], "num_ranks": SIZES[0][1]}
    return [
        *(
            GpuCase(num_tokens=tokens, num_ranks=ranks, wire_dtype=wire)
            for tokens, ranks in SIZES
            for wire in (None, FP8)
        ),
        GpuCase(layout="rank", **first),
        GpuCase(routing="zipf", **first),
        GpuCase(zero_fill=True, **first),
        *(GpuCase(num_sms=sms, **first) for sms in SMS if sms != 16),
    ]


def all_shared_cases() -> list[GpuCase]:
    """The whole product, and the first size with zeros for rows without token."""
    product = itertools.product(
        SIZES, (None, FP8), ("expert", "rank"), SMS[::-1], ("uniform", "zipf")
    )
    return [
        *(
            GpuCase(
                num_tokens=tokens,
                num_ranks=ranks,
                wire_dtype=wire,
                layout=layout,
                num_sms=sms,
                routing=kind,
            )
            for (tokens, ranks), wire, layout, sms, kind in product
        ),
        GpuCase(num_tokens=SIZES[0][0], num_ranks=SIZES[0][1], zero_fill=True),
    ]


SHARED_SMOKE_CASES = [GpuCase(num_tokens=128, num_ranks=2), GpuCase(num_tokens=1, num_ranks=2)]


# --- a GPU for each rank --------------------------------------------------------------------------

TOKENS = (1, 16, 128, 1024, 4096, 8192)
OWN_SMS = (24, 64, 132)  # the first: of comparisons, and of goals.py; the last: all there are
ROUTINGS = ("uniform", "zipf")
MEASURED = tuple(OPERATIONS)  # of our operations, but by the low-latency kernels
LOW_LATENCY_SMS, MAX_LOW_LATENCY_TOKENS = 64, 128


def own_gpu_cases(num_ranks: int, num_tokens: int, *, full: bool) -> list[GpuCase]:
    """Of one number of tokens: both wires, routings and layouts; zipf only in layout "expert".

    Other SMs at T 4096 with uniform routing, or with `full` everywhere; without a tail at T 4096,
    last. The first two, uniform and zipf on the BF16 wire, are those of the comparisons too. Few
    tokens are exchanged by the low-latency kernels as well, with uniform routing.
    """
    wires = (None, FP8)
    layouts = [("expert", routing) for routing in ROUTINGS] + [("rank", ROUTINGS[0])]
    first = [(wire, *layout) for layout in layouts for wire in wires]
    more = [kind for kind in first if full or (num_tokens == 4096 and kind[2] == ROUTINGS[0])]
    kinds = [(OWN_SMS[0], *kind) for kind in first]
    kinds += [(sms, *kind) for sms in OWN_SMS[1:] for kind in more]
    found = [
        GpuCase(
            num_tokens=num_tokens,
            num_ranks=num_ranks,
            num_sms=sms,
            wire_dtype=wire,
            layout=layout,
            routing=routing,
        )
        for sms, wire, layout, routing in kinds
    ]
    if num_tokens == 4096:  # on so many SMs throughout
        found += [dataclasses.replace(found[i], tail=False) for i in range(len(wires))]
    if num_tokens <= MAX_LOW_LATENCY_TOKENS:
        found += [
            dataclasses.replace(case, low_latency=True, num_sms=LOW_LATENCY_SMS)
            for case in found
            if case.routing == ROUTINGS[0] and case.num_sms == OWN_SMS[0]
        ]
    return found


def routings_of(found: Sequence[GpuCase]) -> list[GpuCase]:
    """One case for each routing: layout "expert", BF16 wire, the first number of SMs."""
    kind = (None, "expert", OWN_SMS[0])
    return [
        c
        for c in found
        if c.tail and not c.low_latency and (c.wire_dtype, c.layout, c.num_sms) == kind
    ]
