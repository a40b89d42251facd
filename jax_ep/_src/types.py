# SPDX-License-Identifier: Apache-2.0
"""What operations return: pytrees that cross `jit`, `shard_map`, `scan` and `checkpoint`."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jax_ep._src.config import EpConfig
from jax_ep._src.public import set_module
from jax_ep._src.quantized import QuantizedRows


@set_module("jax_ep")
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class DispatchHandle:
    """Where every selection's row is. Made by `dispatch`, read by `combine` and by gradients.

    All arrays are int32 and belong to one rank. Treat them as opaque except for debugging: other
    backends may keep more.

    Attributes:
        topk_idx: `[T, K]`, as `dispatch` got it: what is dropped is in it, too. What `rank_mask`
            leaves out is -1.
        slot: `[T, K]`, row of each selection in its destination's receive buffer; -1 where there
            is no selection or the row was dropped.
        row_source: `[C]`, `source rank * T + source token` of each received row; -1 where a row
            holds no token.
        row_topk_idx: `[C, K]` in layout "rank": local expert of each of the token's selections,
            or -1. None in layout "expert".
        source_slot: `[R * T, J]`, only of the `ffi` backend on GPUs: this rank's rows of each
            token of each rank, ascending; -1 past the last one. `J` is `min(K, L)`, or 1 in
            layout "rank".
        arrival_slot: `[R, T, min(K, L)]`, only of the `xla` backend: this rank's row of each
            token's selections in ascending order of experts; -1 past the last one.
        arrival_topk: like `arrival_slot`: the selection's position in the token's top-k.
        rank_mask: `[R]` bool, as `dispatch` got it: the ranks that take part, in what is made of
            the handle too. None: all do. In a group with `on_timeout` "mask", without those that
            were missing.
        config: of the group that dispatched.
        num_ranks: of the group that dispatched.
        axis_names: of the group that dispatched.
    """

    topk_idx: jax.Array
    slot: jax.Array
    row_source: jax.Array
    row_topk_idx: jax.Array | None
    source_slot: jax.Array | None = None
    arrival_slot: jax.Array | None = None
    arrival_topk: jax.Array | None = None
    rank_mask: jax.Array | None = None
    config: EpConfig = dataclasses.field(metadata={"static": True})
    num_ranks: int = dataclasses.field(metadata={"static": True})
    axis_names: tuple[str, ...] = dataclasses.field(metadata={"static": True})


@set_module("jax_ep")
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Dispatched:
    """What one rank received.

    Attributes:
        x: `[C, H]`, `config.dtype`; with `config.recv_dtype` float8_e4m3fn a `QuantizedRows`, of
            whose zeros the scales are 0 too. Layout "expert": one row per selection, sorted by
            (local expert, source rank, source token). Layout "rank": one row per token, sorted by
            (source rank, source token).
        weights: float32, `[C]` in layout "expert", `[C, K]` in layout "rank"; 0 where there is no
            selection. None if `dispatch` got none.
        topk_idx: `[C, K]` int32 in layout "rank": local expert, or -1. None in layout "expert".
        group_sizes: int32. Layout "expert": `[L]`, rows of each local expert, alignment padding
            included. Layout "rank": `[R]`, rows from each source rank.
        tokens_per_expert: `[L]` int32, selections that each local expert was asked for, before
            any drop.
        num_dropped: `[]` int32, rows of this rank that found no room in `C` rows.
        handle: for `combine`.
        missing_ranks: `[R]` bool, in a group with `on_timeout` "mask": the ranks whose tokens this
            rank did not all get, so that all else is as if their selections, and those of their
            experts, had been -1. Neither this rank itself nor ranks that `rank_mask` leaves out are
            among them. Two ranks may miss different ones. On GPUs, calls of more than
            `low_latency_tokens` tokens miss nobody. None in other groups.
    """

    # Any: QuantizedRows. Which one it is, only the config knows, and no checker: with both of them
    # named, `ragged_dot(recv.x, ...)` would be an error.
    x: jax.Array | Any
    weights: jax.Array | None
    topk_idx: jax.Array | None
    group_sizes: jax.Array
    tokens_per_expert: jax.Array
    num_dropped: jax.Array
    handle: DispatchHandle
    missing_ranks: jax.Array | None = None

    @property
    def local_expert(self) -> jax.Array:
        """`[C]` int32, the local expert of each row; -1 where a row holds no token.

        Raises:
            ValueError: in layout "rank", where a row is for several experts.
        """
        if self.topk_idx is not None:
            raise ValueError(
                "local_expert is asked for in layout 'rank', where a row is for several experts; "
                "allowed: Dispatched.topk_idx, or EpConfig.layout 'expert'"
            )
        rows = jnp.arange(self.handle.row_source.shape[0], dtype=jnp.int32)
        ends = jnp.cumsum(self.group_sizes, dtype=jnp.int32)
        expert = (rows[:, None] >= ends[None, :]).sum(axis=1, dtype=jnp.int32)
        return jnp.where(self.handle.row_source >= 0, expert, -1)


class Routing(NamedTuple):
    """What a backend is given in place of `topk_idx`, see `drops.py`.

    Attributes:
        topk_idx: `[T, K]` int32.
        tokens_per_expert: as in `Dispatched`, where the backend cannot count it; else None.
        num_dropped: likewise.
    """

    topk_idx: jax.Array
    tokens_per_expert: jax.Array | None = None
    num_dropped: jax.Array | None = None


@set_module("jax_ep")
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class DispatchFlight:
    """A dispatch between its halves. Made by `dispatch_start`, for one `dispatch_done`.

    Treat it as opaque: of what is here, a backend keeps what it needs.

    Attributes:
        ticket: `[2]` uint32, the flight's number; only where the exchange is in two operations.
        x: `[T, H]`, what is sent; likewise.
        topk_idx: `[T, K]` int32; likewise.
        routing: what the backend is given in its place, if anything; likewise.
        topk_weights: `[T, K]` float32, or None; likewise.
        rank_mask: `[R]` bool, or None; likewise.
        dispatched: the result; of all others, where the first half does it all.
        config: of the group that dispatches.
        num_ranks: of the group that dispatches.
        axis_names: of the group that dispatches.
    """

    ticket: jax.Array | None = None
    x: jax.Array | QuantizedRows | None = None
    topk_idx: jax.Array | None = None
    routing: Routing | None = None
    topk_weights: jax.Array | None = None
    rank_mask: jax.Array | None = None
    dispatched: Dispatched | None = None
    config: EpConfig = dataclasses.field(metadata={"static": True})
    num_ranks: int = dataclasses.field(metadata={"static": True})
    axis_names: tuple[str, ...] = dataclasses.field(metadata={"static": True})


@set_module("jax_ep")
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class CombineFlight:
    """A combine between its halves. Made by `combine_start`, for one `combine_done`.

    Treat it as opaque: of what is here, a backend keeps what it needs.

    Attributes:
        ticket: `[2]` uint32, the flight's number; only where the exchange is in two operations.
        y: `[C, H]`, what is sent; likewise.
        weights: float32, `[C]` or `[C, K]`, or None; likewise.
        handle: of the dispatch; likewise.
        out: `[T, H]`, the result; of all others, where the first half does it all.
        config: of the group that combines.
        num_ranks: of the group that combines.
        axis_names: of the group that combines.
    """

    ticket: jax.Array | None = None
    y: jax.Array | None = None
    weights: jax.Array | None = None
    handle: DispatchHandle | None = None
    out: jax.Array | None = None
    config: EpConfig = dataclasses.field(metadata={"static": True})
    num_ranks: int = dataclasses.field(metadata={"static": True})
    axis_names: tuple[str, ...] = dataclasses.field(metadata={"static": True})
