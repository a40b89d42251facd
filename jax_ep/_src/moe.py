# SPDX-License-Identifier: Apache-2.0
"""`moe` and `moe_with_experts`: dispatch, the experts' networks, combine."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, get_args, overload

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jax_ep._src.api import checked_tokens, combine, dispatch
from jax_ep._src.backends.tangents import named
from jax_ep._src.checks import check_array, check_group
from jax_ep._src.compat import as_array
from jax_ep._src.experts.bound import ExpertWeights, gated
from jax_ep._src.experts.kinds import Activation
from jax_ep._src.groups.group import EpGroup
from jax_ep._src.halves import begin_dispatch, dispatch_done
from jax_ep._src.missing import check_nobody_is_overlooked
from jax_ep._src.public import set_module
from jax_ep._src.quantized import QuantizedRows
from jax_ep._src.rank_mask import checked_rank_mask, left_by, num_lost, renormalized
from jax_ep._src.straight_through import Sent, dispatch_in_fp8, restore
from jax_ep._src.types import Dispatched

Overlap = Callable[[Any], jax.Array]
ExpertFunction = Callable[[Dispatched], jax.Array]
Weigh = Literal["output", "input"]


@set_module("jax_ep")
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class MoeStats:
    """What one rank's experts were asked for in one call of `moe` with `with_stats=True`.

    Attributes:
        tokens_per_expert: `[L]` int32, selections of each local expert by the tokens of all ranks
            of the group, before any drop.
        num_dropped: `[]` int32, of those the ones that found no room in this rank's receive
            buffer. The drop rate of a group is the sum of this over the sum of the other.
        num_lost: `[]` int32, selections by this rank's own tokens that `rank_mask` has left out;
            they are in neither of the others. None where there is no `rank_mask`.
    """

    tokens_per_expert: jax.Array
    num_dropped: jax.Array
    num_lost: jax.Array | None = None


@overload
def moe(
    x: jax.Array | QuantizedRows,
    topk_idx: jax.Array,
    topk_weights: jax.Array,
    w_gate: Any,
    w_up: Any,
    w_down: Any,
    *,
    group: EpGroup,
    activation: Activation = ...,
    overlap: Overlap | None = ...,
    rank_mask: jax.Array | None = ...,
    renormalize: bool = ...,
    with_stats: Literal[False] = ...,
) -> jax.Array: ...


@overload
def moe(
    x: jax.Array | QuantizedRows,
    topk_idx: jax.Array,
    topk_weights: jax.Array,
    w_gate: Any,
    w_up: Any,
    w_down: Any,
    *,
    group: EpGroup,
    activation: Activation = ...,
    overlap: Overlap | None = ...,
    rank_mask: jax.Array | None = ...,
    renormalize: bool = ...,
    with_stats: Literal[True],
) -> tuple[jax.Array, MoeStats]: ...


@set_module("jax_ep")
def moe(
    x: jax.Array | QuantizedRows,
    topk_idx: jax.Array,
    topk_weights: jax.Array,
    w_gate: Any,
    w_up: Any,
    w_down: Any,
    *,
    group: EpGroup,
    activation: Activation = jax.nn.silu,
    overlap: Overlap | None = None,
    rank_mask: jax.Array | None = None,
    renormalize: bool = False,
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
        rank_mask: `[R]` bool, the ranks that take part, as `dispatch` takes it; or None. Tokens of
            the others get 0 from experts.
        renormalize: with a `rank_mask`, whether to multiply the weights of the selections that it
            leaves of a token by the sum of all of the token's weights over the sum of theirs.
        with_stats: whether to return what this rank's experts were asked for, too.

    Returns:
        `[T, H]` of `config.dtype`; 0 for a token with no selection. A row that was dropped for
        lack of room counts as 0. With `overlap`: plus `overlap(x)`, in `config.dtype`. With
        `with_stats`: a tuple of this and a `MoeStats`.

    Raises:
        ValueError: an argument, or what `overlap` returns, does not fit the group's config, the
            layout is "rank", the call is not inside `shard_map` over the group's axes, it is traced
            to be differentiated in an `x` that is quantized, or the group has `on_timeout` "mask".
        EpGroupClosed: the group has been closed.
    """
    check_group(group, expert_layout_for="moe")
    experts = gated(w_gate, w_up, w_down, activation=activation)
    exchange = _Exchange(x, overlap, rank_mask, renormalize=renormalize)
    return _moe(exchange, topk_idx, topk_weights, experts, group, "output", with_stats)


@overload
def moe_with_experts(
    x: jax.Array | QuantizedRows,
    topk_idx: jax.Array,
    topk_weights: jax.Array,
    experts: ExpertFunction,
    *,
    group: EpGroup,
    weigh: Weigh = ...,
    overlap: Overlap | None = ...,
    rank_mask: jax.Array | None = ...,
    renormalize: bool = ...,
    with_stats: Literal[False] = ...,
) -> jax.Array: ...


@overload
def moe_with_experts(
    x: jax.Array | QuantizedRows,
    topk_idx: jax.Array,
    topk_weights: jax.Array,
    experts: ExpertFunction,
    *,
    group: EpGroup,
    weigh: Weigh = ...,
    overlap: Overlap | None = ...,
    rank_mask: jax.Array | None = ...,
    renormalize: bool = ...,
    with_stats: Literal[True],
) -> tuple[jax.Array, MoeStats]: ...


@set_module("jax_ep")
def moe_with_experts(
    x: jax.Array | QuantizedRows,
    topk_idx: jax.Array,
    topk_weights: jax.Array,
    experts: ExpertFunction,
    *,
    group: EpGroup,
    weigh: Weigh = "output",
    overlap: Overlap | None = None,
    rank_mask: jax.Array | None = None,
    renormalize: bool = False,
    with_stats: bool = False,
) -> jax.Array | tuple[jax.Array, MoeStats]:
    """`moe` with experts of any kind.

    `jax_ep.experts` has ready-made ones, with biases, without gates, with quantized matrices or
    low-rank updates: `moe_with_experts(x, topk_idx, topk_weights, jax_ep.experts.gated(w_gate,
    w_up, w_down, bias_up=...), group=group)`. Any other function of what was received will do.

    Values on the way have names for `jax.checkpoint_policies`: "jax_ep.recv" (what was received),
    "jax_ep.gate" and "jax_ep.up" (products of ready-made experts), "jax_ep.experts" (the experts'
    rows), "jax_ep.out" (the sum).

    Args:
        x: as `moe` takes it.
        topk_idx: as `moe` takes it.
        topk_weights: `[T, K]` float32.
        experts: `experts(recv) -> y`: a function of a `Dispatched` to `[C, H]` of `config.dtype`.
            In `recv`, `x` is `[C, H]` of `config.dtype` in any case, and zeros where a row holds
            no token. `recv.group_sizes` and `recv.local_expert` say whose rows are whose. What `y`
            has in rows that hold no token is not read.
        group: an open `EpGroup` whose config has layout "expert".
        weigh: what a selection's weight multiplies: the expert's "output", or its "input", rounded
            to `config.dtype`, as in Llama 4; then outputs are added as they are.
        overlap: as `moe` takes it.
        rank_mask: as `moe` takes it.
        renormalize: as `moe` takes it.
        with_stats: as `moe` takes it.

    Returns:
        What `moe` returns.

    Raises:
        ValueError: as `moe` does, and where `experts` is no function, or gives something else.
        EpGroupClosed: the group has been closed.
    """
    check_group(group, expert_layout_for="moe_with_experts")
    if not callable(experts):
        raise ValueError(
            f"experts is a {type(experts).__name__}; allowed: a function of a Dispatched, such as "
            "jax_ep.experts.gated(...)"
        )
    if weigh not in get_args(Weigh):
        raise ValueError(f"weigh is {weigh!r}; allowed: 'output', 'input'")
    exchange = _Exchange(x, overlap, rank_mask, renormalize=renormalize)
    return _moe(exchange, topk_idx, topk_weights, experts, group, weigh, with_stats)


def _moe(
    exchange: "_Exchange",
    topk_idx: Any,
    topk_weights: Any,
    experts: ExpertFunction,
    group: EpGroup,
    weigh: Weigh,
    with_stats: bool,
) -> Any:
    if topk_weights is None:
        raise ValueError("topk_weights is None; allowed: float32[T, K]")
    if isinstance(experts, ExpertWeights):
        experts.check(group)
    exchange.check(group)
    x, topk_weights = exchange.x, exchange.weights_of(topk_idx, topk_weights, group)
    if group.config.recv_dtype is None:
        # All of it: with the rows alone saved, the exchange would be made again.
        recv = named(exchange(x, topk_idx, topk_weights, group=group))
        assert not isinstance(recv.x, QuantizedRows)
        with jax.named_scope("jax_ep.experts"):
            y = experts(_expert_input(group, recv, recv.x, recv.weights, weigh))
        weights = recv.weights
    else:
        recv, sent = dispatch_in_fp8(exchange, x, topk_idx, topk_weights, group)
        recv = named(recv)
        with jax.named_scope("jax_ep.experts"):
            y, weights = _experts_of_fp8(group, recv, sent, experts, weigh)
    y = as_array(y)
    shape = (recv.handle.row_source.shape[0], group.config.hidden)
    check_array("experts(recv)", y, shape, group.config.dtype, of=", the rows that were received")
    y = checkpoint_name(y, "jax_ep.experts")
    out = combine(y, recv.handle, weights if weigh == "output" else None, group=group)
    if exchange.overlapped is not None:
        out = out + exchange.overlapped
    out = checkpoint_name(out, "jax_ep.out")
    if not with_stats:
        return out
    stats = MoeStats(
        tokens_per_expert=recv.tokens_per_expert,
        num_dropped=recv.num_dropped,
        num_lost=exchange.num_lost,
    )
    return out, stats


class _Exchange:
    """A dispatch, with or without ranks that are left out, and something between its halves."""

    def __init__(
        self,
        x: jax.Array | QuantizedRows,
        overlap: Overlap | None,
        rank_mask: jax.Array | None,
        *,
        renormalize: bool,
    ) -> None:
        self.x, self._overlap = x, overlap
        self._rank_mask, self._renormalize = rank_mask, renormalize
        self.overlapped: jax.Array | None = None  # what `overlap` has given
        self.num_lost: jax.Array | None = None

    def check(self, group: EpGroup) -> None:
        """Raises where something that was given is not allowed."""
        check_nobody_is_overlooked("moe", group, instead="dispatch and combine_with_status")
        if self._overlap is not None and not callable(self._overlap):
            raise ValueError(
                f"overlap is a {type(self._overlap).__name__}; allowed: None, or a function of x"
            )
        self._rank_mask = checked_rank_mask(self._rank_mask, group, "moe")

    def weights_of(self, topk_idx: Any, topk_weights: Any, group: EpGroup) -> Any:
        """The weights with which selections travel; counts those that are lost."""
        if self._rank_mask is None:
            return topk_weights
        _, topk_idx, topk_weights = checked_tokens(
            self.x, topk_idx, topk_weights, group=group, operation="moe"
        )
        assert topk_weights is not None
        left = left_by(group, topk_idx, self._rank_mask)
        self.num_lost = num_lost(topk_idx, left)
        return renormalized(topk_weights, topk_idx, left) if self._renormalize else topk_weights

    def __call__(
        self, x: Any, topk_idx: jax.Array, topk_weights: jax.Array, *, group: EpGroup
    ) -> Dispatched:
        """Dispatches `x`, which may be cut off from gradients; `overlap` gets what came."""
        tokens, mask = (x, topk_idx, topk_weights), self._rank_mask
        if self._overlap is None:
            return dispatch(*tokens, group=group, rank_mask=mask)
        # Layers that do not depend on each other may be between the halves at once, as XLA likes.
        flight = begin_dispatch(*tokens, group=group, rank_mask=mask, counts=False)
        overlapped = as_array(self._overlap(self.x))
        shape = (topk_idx.shape[0], group.config.hidden)
        check_array("overlap(x)", overlapped, shape, group.config.dtype, of=", the tokens' rows")
        self.overlapped = overlapped
        return dispatch_done(flight, after=overlapped, group=group)


def _expert_input(
    group: EpGroup, recv: Dispatched, rows: jax.Array, weights: jax.Array | None, weigh: Weigh
) -> Dispatched:
    """What experts get: rows of `config.dtype`, clean and weighed."""
    if not group.config.zero_fill:
        rows = _zero_empty_rows(recv, rows)
    if weigh == "input":
        assert weights is not None
        rows = (rows.astype(jnp.float32) * weights[:, None]).astype(rows.dtype)
    return dataclasses.replace(recv, x=rows, weights=weights)


def _experts_of_fp8(
    group: EpGroup, recv: Dispatched, sent: Sent, experts: ExpertFunction, weigh: Weigh
) -> tuple[jax.Array, jax.Array]:
    """The experts' rows where they came in FP8, and the rows' weights, which travel with them."""
    if not isinstance(experts, ExpertWeights):
        rows, weights = restore(recv, sent, group)
        return experts(_expert_input(group, recv, rows, weights, weigh)), weights
    kind = experts.kind

    # Rematerialized, so that the backward pass keeps the rows in FP8 and restores them again.
    @jax.checkpoint
    def inner(recv: Dispatched, sent: Sent, expert_weights: Any) -> tuple:
        rows, weights = restore(recv, sent, group)
        clean = _expert_input(group, recv, rows, weights, weigh)
        return kind.inner(clean, expert_weights), weights

    products, weights = inner(recv, sent, experts.weights)
    return kind.outer(recv, products, experts.weights), weights


def _zero_empty_rows(recv: Dispatched, rows: jax.Array) -> jax.Array:
    """Received rows, zeros where they hold no token.

    Rows past the last group need no care: no product over groups reads them, and `combine` and
    its gradient skip them. Alignment padding is inside the groups, though, and the gradient of
    the weights multiplies those rows by zeros, which would not remove a NaN.
    """
    holds_token = (recv.handle.row_source >= 0)[:, None]
    return jnp.where(holds_token, rows, jnp.zeros((), rows.dtype))
