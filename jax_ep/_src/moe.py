# SPDX-License-Identifier: Apache-2.0
"""`moe`: dispatch, the experts' gated feed-forward networks, combine."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp

from jax_ep._src.api import combine, dispatch
from jax_ep._src.checks import check_array, check_group, is_array
from jax_ep._src.compat import as_array
from jax_ep._src.grouped_dot import grouped_dot
from jax_ep._src.groups.group import EpGroup
from jax_ep._src.halves import begin_dispatch, dispatch_done
from jax_ep._src.quantized import QuantizedRows
from jax_ep._src.straight_through import Sent, dispatch_in_fp8, restore
from jax_ep._src.types import Dispatched

Activation = Callable[[jax.Array], jax.Array]
Overlap = Callable[[Any], jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class MoeStats:
    """What one rank's experts were asked for in one call of `moe` with `with_stats=True`.

    Attributes:
        tokens_per_expert: `[L]` int32, selections of each local expert by the tokens of all ranks
            of the group, before any drop.
        num_dropped: `[]` int32, of those the ones that found no room in this rank's receive
            buffer. The drop rate of a group is the sum of this over the sum of the other.
    """

    tokens_per_expert: jax.Array
    num_dropped: jax.Array


@overload
def moe(
    x: jax.Array | QuantizedRows,
    topk_idx: jax.Array,
    topk_weights: jax.Array,
    w_gate: jax.Array,
    w_up: jax.Array,
    w_down: jax.Array,
    *,
    group: EpGroup,
    activation: Activation = ...,
    overlap: Overlap | None = ...,
    with_stats: Literal[False] = ...,
) -> jax.Array: ...


@overload
def moe(
    x: jax.Array | QuantizedRows,
    topk_idx: jax.Array,
    topk_weights: jax.Array,
    w_gate: jax.Array,
    w_up: jax.Array,
    w_down: jax.Array,
    *,
    group: EpGroup,
    activation: Activation = ...,
    overlap: Overlap | None = ...,
    with_stats: Literal[True],
) -> tuple[jax.Array, MoeStats]: ...


def moe(
    x: jax.Array | QuantizedRows,
    topk_idx: jax.Array,
    topk_weights: jax.Array,
    w_gate: jax.Array,
    w_up: jax.Array,
    w_down: jax.Array,
    *,
    group: EpGroup,
    activation: Activation = jax.nn.silu,
    overlap: Overlap | None = None,
    with_stats: bool = False,
) -> jax.Array | tuple[jax.Array, MoeStats]:
    """Sends every token through its experts and returns the weighted sum of their outputs.

    Expert `e` computes `(activation(x @ w_gate[e]) * (x @ w_up[e])) @ w_down[e]`, by
    `jax.lax.ragged_dot` over the received rows. Runs inside `jax.shard_map` over the group's axes;
    shapes are per rank, `L` is `group.num_local_experts` and `F` any size. Differentiable in
    everything but `topk_idx`. Under `vmap` it is a loop over the elements of the batch.

    With `config.recv_dtype` float8_e4m3fn rows arrive in FP8 and are restored to `config.dtype` for
    the products, of which the result is the same. The backward pass keeps them in FP8; the gradient
    of `x` is taken straight through their rounding, and travels in `config.dtype`.

    Args:
        x: tokens, as `dispatch` takes them: `[T, H]` of `config.dtype`, or a `QuantizedRows`, in
            which it is not differentiable.
        topk_idx: `[T, K]` int32, as `dispatch` takes it: global experts, or -1.
        topk_weights: `[T, K]` float32, the factors in the sum.
        w_gate: `[L, H, F]` of `config.dtype`, this rank's experts.
        w_up: like `w_gate`.
        w_down: `[L, F, H]` of `config.dtype`.
        group: an open `EpGroup` whose config has layout "expert".
        activation: of the gate, elementwise.
        overlap: what to do between dispatch's halves, such as shared experts: a function of `x`,
            as it was given, to `[T, H]` of `config.dtype`. Its result is added to the experts'.
        with_stats: whether to return what this rank's experts were asked for, too.

    Returns:
        `[T, H]` of `config.dtype`; 0 for a token with no selection. A row that was dropped for
        lack of room counts as 0. With `overlap`: plus `overlap(x)`, in `config.dtype`. With
        `with_stats`: a tuple of this and a `MoeStats`.

    Raises:
        ValueError: an argument, or what `overlap` returns, does not fit the group's config, the
            layout is "rank", the call is not inside `shard_map` over the group's axes, or it is
            traced to be differentiated in an `x` that is quantized.
        EpGroupClosed: the group has been closed.
    """
    check_group(group, expert_layout_for="moe")
    w_gate, w_up, w_down = as_array(w_gate), as_array(w_up), as_array(w_down)
    _check_weights(group, w_gate, w_up, w_down)
    if overlap is not None and not callable(overlap):
        raise ValueError(
            f"overlap is a {type(overlap).__name__}; allowed: None, or a function of x"
        )
    if topk_weights is None:
        raise ValueError("topk_weights is None; allowed: float32[T, K]")
    exchange = _Exchange(x, overlap)
    if group.config.recv_dtype is None:
        recv = exchange(x, topk_idx, topk_weights, group=group)
        with jax.named_scope("jax_ep.experts"):
            gate, up = _gate_and_up(group, recv, recv.x, w_gate, w_up)
        weights = recv.weights
    else:
        recv, sent = dispatch_in_fp8(exchange, x, topk_idx, topk_weights, group)
        with jax.named_scope("jax_ep.experts"):
            gate, up, weights = _gate_and_up_of_fp8(group, recv, sent, w_gate, w_up)
    with jax.named_scope("jax_ep.experts"):
        y = grouped_dot(activation(gate) * up, w_down, recv.group_sizes)
    out = combine(y, recv.handle, weights, group=group)
    if exchange.overlapped is not None:
        out = out + exchange.overlapped
    if not with_stats:
        return out
    stats = MoeStats(tokens_per_expert=recv.tokens_per_expert, num_dropped=recv.num_dropped)
    return out, stats


class _Exchange:
    """A dispatch, with or without something between its halves."""

    def __init__(self, x: jax.Array | QuantizedRows, overlap: Overlap | None) -> None:
        self._x, self._overlap = x, overlap
        self.overlapped: jax.Array | None = None  # what `overlap` has given

    def __call__(
        self, x: Any, topk_idx: jax.Array, topk_weights: jax.Array, *, group: EpGroup
    ) -> Dispatched:
        """Dispatches `x`, which may be cut off from gradients; `overlap` gets what came."""
        if self._overlap is None:
            return dispatch(x, topk_idx, topk_weights, group=group)
        # Layers that do not depend on each other may be between the halves at once, as XLA likes.
        flight = begin_dispatch(x, topk_idx, topk_weights, group=group, counts=False)
        overlapped = as_array(self._overlap(self._x))
        shape = (topk_idx.shape[0], group.config.hidden)
        check_array("overlap(x)", overlapped, shape, group.config.dtype, of=", the tokens' rows")
        self.overlapped = overlapped
        return dispatch_done(flight, after=overlapped, group=group)


def _gate_and_up(
    group: EpGroup, recv: Dispatched, rows: Any, w_gate: jax.Array, w_up: jax.Array
) -> tuple[jax.Array, jax.Array]:
    if not group.config.zero_fill:
        rows = _zero_empty_rows(recv, rows)
    gate = grouped_dot(rows, w_gate, recv.group_sizes)
    return gate, grouped_dot(rows, w_up, recv.group_sizes)


def _gate_and_up_of_fp8(
    group: EpGroup, recv: Dispatched, sent: Sent, w_gate: jax.Array, w_up: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The same of rows in FP8, and the rows' weights, which travel with them."""

    # Rematerialized, so that the backward pass keeps the rows in FP8 and restores them again.
    @jax.checkpoint
    def products(recv: Dispatched, sent: Sent, w_gate: jax.Array, w_up: jax.Array) -> tuple:
        rows, weights = restore(recv, sent, group)
        return (*_gate_and_up(group, recv, rows, w_gate, w_up), weights)

    return products(recv, sent, w_gate, w_up)


def _zero_empty_rows(recv: Dispatched, rows: jax.Array) -> jax.Array:
    """Received rows, zeros where they hold no token.

    Rows past the last group need no care: no product over groups reads them, and `combine` and
    its gradient skip them. Alignment padding is inside the groups, though, and the gradient of
    the weights multiplies those rows by zeros, which would not remove a NaN.
    """
    holds_token = (recv.handle.row_source >= 0)[:, None]
    return jnp.where(holds_token, rows, jnp.zeros((), rows.dtype))


def _check_weights(group: EpGroup, w_gate: Any, w_up: Any, w_down: Any) -> None:
    num_local, hidden, dtype = group.num_local_experts, group.config.hidden, group.config.dtype
    inner = w_gate.shape[2] if is_array(w_gate) and w_gate.ndim == 3 else "F"
    of = f", of the {num_local} experts on each of the group's {group.num_ranks} ranks"
    check_array("w_gate", w_gate, (num_local, hidden, inner), dtype, of=of)
    check_array("w_up", w_up, (num_local, hidden, inner), dtype, of=of)
    check_array("w_down", w_down, (num_local, inner, hidden), dtype, of=of)
