# SPDX-License-Identifier: Apache-2.0
"""What is measured on a GPU: sizes, routing, and the rows that a routing moves."""

import dataclasses
import functools
import itertools
import math
from typing import Any

import numpy as np

from ep_bench.cases import CAPACITY_FACTOR

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
    """

    num_tokens: int
    num_ranks: int
    wire_dtype: str | None = None
    layout: str = "expert"
    num_sms: int = 16
    routing: str = "uniform"
    zero_fill: bool = False

    @property
    def name(self) -> str:
        """For progress and errors."""
        return ", ".join(f"{key}={value}" for key, value in dataclasses.asdict(self).items())

    @property
    def operations(self) -> tuple[str, ...]:
        """What there is to measure: on the FP8 wire only the dispatch is another kernel."""
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
        }


def some_cases() -> list[GpuCase]:
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


def all_cases() -> list[GpuCase]:
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


SMOKE_CASES = [GpuCase(num_tokens=128, num_ranks=2), GpuCase(num_tokens=1, num_ranks=2)]
