# SPDX-License-Identifier: Apache-2.0
"""What is measured: sizes, routing and data, the same for every variant."""

import dataclasses
import functools
import math

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
