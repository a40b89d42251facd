# SPDX-License-Identifier: Apache-2.0
"""`dispatch` and `combine` in halves, between which other work is done."""

from typing import Any, TypeVar

import jax
import numpy as np

from jax_ep._src.api import (
    backend_of,
    checked_rows,
    checked_tokens,
    combine,
    dispatch,
    dispatched_of,
)
from jax_ep._src.backends.plan import Plan
from jax_ep._src.checks import check_call, is_array
from jax_ep._src.compat import as_array
from jax_ep._src.drops import routing_of
from jax_ep._src.groups.group import EpGroup, backend_group
from jax_ep._src.missing import check_nobody_is_overlooked
from jax_ep._src.public import set_module
from jax_ep._src.quantized import QuantizedRows
from jax_ep._src.rank_mask import checked_rank_mask, left_by
from jax_ep._src.spec import OpSpec, scope_name
from jax_ep._src.types import CombineFlight, Dispatched, DispatchFlight, DispatchHandle

_Results = TypeVar("_Results")


@set_module("jax_ep")
def dispatch_start(
    x: jax.Array | QuantizedRows,
    topk_idx: jax.Array,
    topk_weights: jax.Array | None = None,
    *,
    group: EpGroup,
    rank_mask: jax.Array | None = None,
) -> DispatchFlight:
    """The first half of `dispatch`: sends, and waits for no other rank.

    `dispatch_done` is the second half, and both together are `dispatch`: the same arguments,
    numbers, bits and gradients. What is computed between them need not wait for other ranks. Only
    with `EpConfig.drop` "even", where rows can be dropped, this half does wait for them: before
    anything is sent, each has to know how often all of them select each expert.

    A flight is used once. Two may be open at a time: with backend `ffi` on CPU a third one waits
    until a flight ends, up to the group's `timeout`. XLA runs what does not depend on each other in
    an order of its own, so let what is started third depend on what the first one has brought.
    Finish a flight inside of the same `jax.checkpoint` in which it was started, and of the same
    `vmap`, under which the second half is the whole exchange.

    On GPUs it is the exchanges of the low-latency kernels that are in halves (see
    `EpConfig.low_latency_tokens`): between them no SM is held. There at most three other ones of
    them may begin while a flight is open; of the fourth on its second half is an error. And a first
    half waits for a rank that is four of them behind. All other exchanges on GPUs, those of backend
    `xla`, and those where `shard_map` leaves axes of the mesh to the compiler, are in the first
    half: nothing overlaps. There a flight holds results, of which nothing goes stale, and any
    number may be open.

    Args:
        x: tokens, as `dispatch` takes them: `[T, H]` of `config.dtype`, or a `QuantizedRows`.
        topk_idx: `[T, K]` int32, as `dispatch` takes it: global experts, or -1.
        topk_weights: `[T, K]` float32, or None.
        group: an open `EpGroup`.
        rank_mask: `[R]` bool, as `dispatch` takes it, of both halves; or None.

    Returns:
        For `dispatch_done`. A pytree of arrays: a `scan` may carry it, so that a turn receives
        what the turn before has sent.

    Raises:
        ValueError: an argument does not fit the group's config, the call is not inside `shard_map`
            over the group's axes, it is traced to be differentiated in quantized rows, the group
            cannot leave ranks out, or it has `on_timeout` "mask".
        EpGroupClosed: the group has been closed.
    """
    return begin_dispatch(x, topk_idx, topk_weights, group=group, rank_mask=rank_mask, counts=True)


def begin_dispatch(
    x: Any, topk_idx: Any, topk_weights: Any, *, group: EpGroup, rank_mask: Any, counts: bool
) -> DispatchFlight:
    """`dispatch_start`; the flight is among those of which two may be open, if it `counts`."""
    x, topk_idx, topk_weights = checked_tokens(
        x, topk_idx, topk_weights, group=group, operation="dispatch_start"
    )
    check_nobody_is_overlooked(
        "dispatch_start", group, instead="dispatch, and then combine_with_status"
    )
    rank_mask = checked_rank_mask(rank_mask, group, "dispatch_start")
    of_group = _of_group(group)
    with jax.named_scope(scope_name("dispatch_start", group)):
        quantized = isinstance(x, QuantizedRows)
        possible = backend_group(group).dispatches_in_halves(topk_idx.shape[0], quantized=quantized)
        if not _in_two(group, possible):
            whole = dispatch(x, topk_idx, topk_weights, group=group, rank_mask=rank_mask)
            return DispatchFlight(dispatched=whole, **of_group)
        if rank_mask is not None:
            topk_idx = left_by(group, topk_idx, rank_mask)
        spec = OpSpec.of(group, num_tokens=topk_idx.shape[0])
        routing = routing_of(group, spec, topk_idx)
        sent = topk_idx if routing is None else routing.topk_idx
        start = backend_of(group.backend).plan_dispatch_start
        ticket = start(spec, x, sent, topk_weights, rank_mask, counts)
    return DispatchFlight(
        ticket=ticket,
        x=x,
        topk_idx=topk_idx,
        routing=routing,
        topk_weights=topk_weights,
        rank_mask=rank_mask,
        **of_group,
    )


@set_module("jax_ep")
def dispatch_done(flight: DispatchFlight, after: Any = None, *, group: EpGroup) -> Dispatched:
    """The second half of `dispatch`: receives.

    Args:
        flight: from `dispatch_start` of the same group. Used before, it is an error when the
            program runs, which names it (backend `ffi`; on GPUs the log does, and the process is
            lost). So it is, on CPU, if the ranks do not use the same one; on GPUs that is not
            noticed.
        after: any pytree of arrays, such as the outputs of shared experts. They are computed
            first; it has no gradient. None: this half may run as soon as the first one has.
        group: an open `EpGroup`.

    Returns:
        What `dispatch` returns.

    Raises:
        ValueError: `flight` is none of this group, `after` holds something that is no array, or the
            call is not inside `shard_map` over the group's axes.
        EpGroupClosed: the group has been closed.
    """
    check_call("dispatch_done", group)
    _check_flight(flight, DispatchFlight, group)
    first = _arrays(after)
    with jax.named_scope(scope_name("dispatch_done", group)):
        if flight.ticket is None:
            assert flight.dispatched is not None
            return _after(first, flight.dispatched)
        topk_idx, routing = flight.topk_idx, flight.routing
        assert topk_idx is not None
        spec = OpSpec.of(group, num_tokens=topk_idx.shape[0])
        sent = topk_idx if routing is None else routing.topk_idx
        results = backend_of(group.backend).plan_dispatch_done(
            spec, flight.ticket, first, flight.x, sent, flight.topk_weights, flight.rank_mask
        )
    return dispatched_of(*results, topk_idx=topk_idx, routing=routing, group=group)


@set_module("jax_ep")
def combine_start(
    y: jax.Array,
    handle: DispatchHandle,
    weights: jax.Array | None = None,
    *,
    group: EpGroup,
) -> CombineFlight:
    """The first half of `combine`: sends, and waits for no other rank.

    `combine_done` is the second half, and both together are `combine`: the same arguments, numbers,
    bits and gradients. What `dispatch_start` says of flights goes for this one, too.

    Args:
        y: `[C, H]` of `config.dtype`, as `combine` takes it.
        handle: from a dispatch of the same group.
        weights: float32, `[C]` in layout "expert", `[C, K]` in layout "rank", or None.
        group: an open `EpGroup`.

    Returns:
        For `combine_done`. A pytree of arrays.

    Raises:
        ValueError: an argument does not fit the group's config, the handle is of another kind of
            group, the call is not inside `shard_map` over the group's axes, or the group has
            `on_timeout` "mask".
        EpGroupClosed: the group has been closed.
    """
    y, weights, spec = checked_rows(y, handle, weights, group=group, operation="combine_start")
    check_nobody_is_overlooked("combine_start", group, instead="combine_with_status")
    of_group = _of_group(group)
    with jax.named_scope(scope_name("combine_start", group)):
        possible = backend_group(group).combines_in_halves(handle.topk_idx.shape[0])
        if not _in_two(group, possible):
            return CombineFlight(out=combine(y, handle, weights, group=group), **of_group)
        ticket = backend_of(group.backend).combine_start(spec, y, weights, Plan.of(handle))
    return CombineFlight(ticket=ticket, y=y, weights=weights, handle=handle, **of_group)


@set_module("jax_ep")
def combine_done(flight: CombineFlight, after: Any = None, *, group: EpGroup) -> jax.Array:
    """The second half of `combine`: receives, and sums.

    Args:
        flight: from `combine_start` of the same group, as `dispatch_done` takes its own.
        after: any pytree of arrays, which are computed first; it has no gradient. None: this half
            may run as soon as the first one has.
        group: an open `EpGroup`.

    Returns:
        What `combine` returns: `[T, H]` of `config.dtype`.

    Raises:
        ValueError: `flight` is none of this group, `after` holds something that is no array, or the
            call is not inside `shard_map` over the group's axes.
        EpGroupClosed: the group has been closed.
    """
    check_call("combine_done", group)
    _check_flight(flight, CombineFlight, group)
    first = _arrays(after)
    with jax.named_scope(scope_name("combine_done", group)):
        if flight.ticket is None:
            assert flight.out is not None
            return _after(first, flight.out)
        assert flight.handle is not None
        spec = OpSpec.of(group, num_tokens=flight.handle.topk_idx.shape[0])
        return backend_of(group.backend).combine_done(
            spec, flight.ticket, first, flight.y, flight.weights, Plan.of(flight.handle)
        )


def _in_two(group: EpGroup, possible: bool) -> bool:
    """Whether an exchange that may be in two pieces is; else the first half does it all.

    XLA compiles no first half where it has to partition along axes that are not manual: it has a
    side effect.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return possible and set(mesh.axis_names) == set(mesh.manual_axes)


def _of_group(group: EpGroup) -> dict[str, Any]:
    return {
        "config": group.config,
        "num_ranks": group.num_ranks,
        "axis_names": group.axis_names,
    }


def _check_flight(flight: Any, kind: type, group: EpGroup) -> None:
    start = "dispatch_start" if kind is DispatchFlight else "combine_start"
    if not isinstance(flight, kind):
        raise ValueError(
            f"flight is a {type(flight).__name__}; allowed: the {kind.__name__} that {start} gives"
        )
    if flight.axis_names != group.axis_names:
        raise ValueError(
            f"flight is of a {start} over the axes {flight.axis_names}; allowed: one over this "
            f"group's, {group.axis_names}"
        )
    if flight.config != group.config or flight.num_ranks != group.num_ranks:
        raise ValueError(
            f"flight is of a {start} with {flight.num_ranks} ranks and {flight.config}; allowed: "
            f"one of this group, with {group.num_ranks} ranks and {group.config}"
        )
    if flight.ticket is not None and group.backend != "ffi":
        raise ValueError(
            f"flight is of a {start} by another backend; this group's is {group.backend!r} on "
            f"{group.platform}"
        )


def _arrays(after: Any) -> tuple[jax.Array, ...]:
    """The arrays that a second half comes after, as operands that have no gradient."""
    arrays = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(after):
        array = as_array(leaf)
        if isinstance(array, (bool, int, float, complex, np.generic)):
            continue  # there already
        if not is_array(array):
            raise ValueError(
                f"after{jax.tree_util.keystr(path)} is a {type(leaf).__name__}; allowed: a pytree "
                "of arrays"
            )
        if jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
            array = jax.random.key_data(array)
        arrays.append(jax.lax.stop_gradient(array))
    return tuple(arrays)


def _after(first: tuple[jax.Array, ...], results: _Results) -> _Results:
    """The results of an exchange that has been made, not used before `first` is there."""
    return jax.lax.optimization_barrier((results, first))[0] if first else results
