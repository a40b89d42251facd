# SPDX-License-Identifier: Apache-2.0
"""`dispatch` and `combine`: checks of what the user passes, then the group's backend."""

from types import ModuleType
from typing import Any

import jax
import numpy as np

from jax_ep._src.backends.ffi import ops as ffi
from jax_ep._src.backends.operands import DispatchResults
from jax_ep._src.backends.plan import Counts, Plan
from jax_ep._src.backends.xla import ops as xla
from jax_ep._src.checks import check_array, check_call
from jax_ep._src.compat import as_array
from jax_ep._src.config import EpConfig
from jax_ep._src.drops import routing_of
from jax_ep._src.groups.group import EpGroup
from jax_ep._src.missing import check_nobody_is_overlooked, left_of, nobody, without_gradient
from jax_ep._src.public import set_module
from jax_ep._src.quantized import QuantizedRows, num_scales
from jax_ep._src.rank_mask import checked_rank_mask, left_by
from jax_ep._src.spec import OpSpec, scope_name
from jax_ep._src.types import Dispatched, DispatchHandle, Routing

_BACKENDS: dict[str, ModuleType] = {"ffi": ffi, "xla": xla}
_INT32 = np.dtype(np.int32)
_FLOAT32 = np.dtype(np.float32)


def backend_of(name: str) -> ModuleType:
    """The implementation of what a group calls `EpGroup.backend`."""
    return _BACKENDS[name]


@set_module("jax_ep")
def dispatch(
    x: jax.Array | QuantizedRows,
    topk_idx: jax.Array,
    topk_weights: jax.Array | None = None,
    *,
    group: EpGroup,
    rank_mask: jax.Array | None = None,
) -> Dispatched:
    """Sends every token to the ranks that host its experts.

    Runs inside `jax.shard_map` over the group's axes; shapes are per rank, and the same on every
    rank. With `config.drop` "even", and where rows can be dropped at all, the ranks first gather
    how often each selects each expert: an all-gather of an int32 for each expert.
    Differentiable in `x` and `topk_weights`: its backward is a `combine` over the same
    handle (with the FP8 wire, as if the rows had not been rounded). Rows that go in or come out as
    `QuantizedRows` have no gradient: then it is differentiable in `topk_weights` only.
    `jax_ep.moe` also is in an `x` that is an array.

    Args:
        x: tokens, `[T, H]` of `config.dtype`; `T` is at most `config.max_tokens_per_rank` and may
            be 0. With `config.wire_dtype` float8_e4m3fn also a `QuantizedRows` of them, such as
            `quantize` makes, which travels as it is.
        topk_idx: `[T, K]` int32: global experts, distinct for each token; -1 for no selection.
            Other values are an error when the program runs (backend `ffi`; `xla` cannot raise
            and takes them for -1). With `config.pad_experts` the message adds 1,000,000 to an
            expert that is there only to pad, and its range has those experts in it.
        topk_weights: `[T, K]` float32, sent along and returned as `Dispatched.weights`.
        group: an open `EpGroup`.
        rank_mask: `[R]` bool, the ranks that take part, the same on all of those; None: all do.
            Each of them gets what it would get if all ranks had called without a mask, and
            selections of the others, and of the others' experts, had been -1. So rows, their order
            and `C` stay, and weights are not changed. Nobody waits for a rank that is left out, and
            that rank, where it makes the call, gets empty results at once; but with backend `xla`,
            and to drop evenly, all ranks meet in collectives all the same. It has no gradient. What
            is made of the handle, gradients too, has the same mask.

    In a group with `on_timeout` "mask" it goes on without ranks that do not come: what arrives is
    as if their selections, and those of their experts, had been -1, and
    `Dispatched.missing_ranks` says which they are. What is made of the handle leaves them out. Then
    it has no gradient.

    Returns:
        What this rank received, with the handle that `combine` takes. `Dispatched.x` is a
        `QuantizedRows` with `config.recv_dtype` float8_e4m3fn: the bits that traveled.

    Raises:
        ValueError: an argument does not fit the group's config, the call is not inside `shard_map`
            over the group's axes, it is traced to be differentiated in quantized rows or in a
            group with `on_timeout` "mask", or the group cannot leave ranks out.
        EpGroupClosed: the group has been closed.
    """
    x, topk_idx, topk_weights = checked_tokens(x, topk_idx, topk_weights, group=group)
    rank_mask = checked_rank_mask(rank_mask, group, "dispatch")
    x, topk_weights = without_gradient("dispatch", group, (x, topk_weights))
    spec = OpSpec.of(group, num_tokens=topk_idx.shape[0])
    backend = _BACKENDS[group.backend]
    with jax.named_scope(scope_name("dispatch", group)):
        if rank_mask is not None:
            topk_idx = left_by(group, topk_idx, rank_mask)
        routing = routing_of(group, spec, topk_idx)
        sent = topk_idx if routing is None else routing.topk_idx
        results = backend.plan_dispatch(spec, x, sent, topk_weights, rank_mask)
    return dispatched_of(*results, topk_idx=topk_idx, routing=routing, group=group)


def dispatched_of(
    plan: Plan,
    counts: Counts,
    received: DispatchResults,
    *,
    topk_idx: jax.Array,
    routing: Routing | None,
    group: EpGroup,
) -> Dispatched:
    """What a backend gives for a `topk_idx`, or a `Routing`, as what `dispatch` returns."""
    if routing is not None:
        plan = plan._replace(topk_idx=topk_idx)
    if routing is not None and routing.tokens_per_expert is not None:
        counts = counts._replace(
            tokens_per_expert=routing.tokens_per_expert, num_dropped=routing.num_dropped
        )
    rows, scales = received.rows, received.rows_scales
    assert rows is not None
    missing_ranks = received.missing_ranks
    if missing_ranks is not None:
        plan = plan._replace(rank_mask=left_of(plan.rank_mask, missing_ranks))
    elif group.on_timeout == "mask":
        missing_ranks = nobody(group, plan.slot)
    return Dispatched(
        x=rows if scales is None else QuantizedRows(rows, scales),
        weights=received.row_scalars,
        topk_idx=plan.row_topk_idx,
        handle=DispatchHandle(
            **plan._asdict(),
            config=group.config,
            num_ranks=group.num_ranks,
            axis_names=group.axis_names,
        ),
        **counts._asdict(),
        missing_ranks=missing_ranks,
    )


def checked_tokens(
    x: Any, topk_idx: Any, topk_weights: Any, *, group: EpGroup, operation: str = "dispatch"
) -> tuple[jax.Array | QuantizedRows, jax.Array, jax.Array | None]:
    """What `dispatch` was given, arrays as arrays; raises if it does not fit the group."""
    check_call(operation, group)
    topk_idx, topk_weights = as_array(topk_idx), as_array(topk_weights)
    config = group.config
    x, num_tokens = _checked_rows(x, config)
    if num_tokens > config.max_tokens_per_rank:
        raise ValueError(
            f"x has {num_tokens} tokens; allowed: up to config.max_tokens_per_rank, which is "
            f"{config.max_tokens_per_rank}"
        )
    check_array("topk_idx", topk_idx, (num_tokens, config.num_topk), _INT32)
    if topk_weights is not None:
        check_array("topk_weights", topk_weights, (num_tokens, config.num_topk), _FLOAT32)
    return x, topk_idx, topk_weights


def _checked_rows(x: Any, config: EpConfig) -> tuple[jax.Array | QuantizedRows, int]:
    """The tokens that came, arrays as arrays, and how many there are; raises if they do not fit."""
    if not isinstance(x, QuantizedRows):
        x = as_array(x)
        also = ", or a QuantizedRows of such rows" if config.wire_dtype is not None else ""
        check_array("x", x, ("T", config.hidden), config.dtype, of=also)
        return x, x.shape[0]
    if config.wire_dtype is None:
        raise ValueError(
            "x is a QuantizedRows, and EpConfig.wire_dtype is None; allowed: "
            f"{config.dtype.name}[T, {config.hidden}], or EpConfig.wire_dtype float8_e4m3fn, on "
            "which quantized rows travel"
        )
    values, scales = as_array(x.values), as_array(x.scales)
    check_array("x.values", values, ("T", config.hidden), config.wire_dtype)
    num_tokens = values.shape[0]
    check_array("x.scales", scales, (num_tokens, num_scales(config.hidden)), _FLOAT32)
    return QuantizedRows(values, scales), num_tokens


@set_module("jax_ep")
def combine(
    y: jax.Array,
    handle: DispatchHandle,
    weights: jax.Array | None = None,
    *,
    group: EpGroup,
) -> jax.Array:
    """Brings rows back to the tokens they came from, and sums them.

    Runs inside `jax.shard_map` over the group's axes; shapes are per rank. Differentiable in `y`
    and `weights`: its backward is a `dispatch` over the same handle.

    Inside a rank a token's rows are summed by `acc = fma(weight, y, acc)` in float32 in ascending
    order of experts and rounded once to `config.dtype`; ranks are summed in float32 in ascending
    order and rounded once. The same inputs give the same bits.

    Args:
        y: `[C, H]` of `config.dtype`, in the order of `Dispatched.x`. Rows that hold no token are
            not read.
        handle: from `dispatch` of the same group (or of one with the same config and mesh axes).
        weights: float32, like `Dispatched.weights`: `[C]` in layout "expert", `[C, K]` in layout
            "rank". None: rows are summed as they are, which in layout "rank" means once per
            (token, rank).
        group: an open `EpGroup`.

    Returns:
        `[T, H]` of `config.dtype`; 0 for a token with no selection.

    Raises:
        ValueError: an argument does not fit the group's config, the handle is of another kind of
            group, the call is not inside `shard_map` over the group's axes, or the group goes on
            without ranks that do not come (`on_timeout` "mask"): `combine_with_status` says which.
        EpGroupClosed: the group has been closed.
    """
    y, weights, spec = checked_rows(y, handle, weights, group=group)
    check_nobody_is_overlooked("combine", group, instead="combine_with_status")
    with jax.named_scope(scope_name("combine", group)):
        return _BACKENDS[group.backend].combine(spec, y, weights, Plan.of(handle))[0]


@set_module("jax_ep")
def combine_with_status(
    y: jax.Array,
    handle: DispatchHandle,
    weights: jax.Array | None = None,
    *,
    group: EpGroup,
) -> tuple[jax.Array, jax.Array]:
    """`combine`, and which ranks did not take part in it though they should have.

    For groups with `on_timeout` "mask", in which it has no gradient. In others, and with backend
    `xla`, nobody is ever missing, and the first result is that of `combine` in all respects.

    Args:
        y: as `combine` takes it.
        handle: likewise. Ranks that were missing in its dispatch are left out: nobody waits for
            them again.
        weights: likewise.
        group: an open `EpGroup`.

    Returns:
        `[T, H]` of `config.dtype`, without the rows of ranks that were missing in the dispatch or
        here. And `[R]` bool: the ranks whose rows this rank did not all get in this exchange, those
        that `Dispatched.missing_ranks` has not among them. On GPUs, nobody in calls of more than
        `low_latency_tokens` tokens.

    Raises:
        ValueError: as `combine`; or it is traced to be differentiated in a group with `on_timeout`
            "mask".
        EpGroupClosed: the group has been closed.
    """
    operation = "combine_with_status"
    y, weights, spec = checked_rows(y, handle, weights, group=group, operation=operation)
    y, weights = without_gradient(operation, group, (y, weights))
    with jax.named_scope(scope_name("combine", group)):
        out, missing = _BACKENDS[group.backend].combine(spec, y, weights, Plan.of(handle))
    return out, nobody(group, out) if missing is None else missing


def checked_rows(
    y: Any, handle: Any, weights: Any, *, group: EpGroup, operation: str = "combine"
) -> tuple[jax.Array, jax.Array | None, OpSpec]:
    """What `combine` was given, arrays as arrays; raises if it does not fit the group."""
    check_call(operation, group)
    y, weights = as_array(y), as_array(weights)
    config = group.config
    if not isinstance(handle, DispatchHandle):
        raise ValueError(f"handle is a {type(handle).__name__}; allowed: Dispatched.handle")
    spec = OpSpec.of(group, num_tokens=handle.topk_idx.shape[0])
    _check_handle(handle, group, spec)
    rows = (spec.recv_capacity, config.hidden)
    check_array("y", y, rows, config.dtype, of=", the rows of the handle's dispatch")
    if weights is not None:
        check_array("weights", weights, spec.row_scalars_shape, _FLOAT32)
    return y, weights, spec


def _check_handle(handle: DispatchHandle, group: EpGroup, spec: OpSpec) -> None:
    if handle.axis_names != group.axis_names:
        raise ValueError(
            f"handle is of a dispatch over the axes {handle.axis_names}; allowed: one over this "
            f"group's, {group.axis_names}"
        )
    if handle.config != group.config or handle.num_ranks != group.num_ranks:
        raise ValueError(
            f"handle is of a dispatch with {handle.num_ranks} ranks and {handle.config}; allowed: "
            f"one of this group, with {group.num_ranks} ranks and {group.config}"
        )
    of_xla = handle.arrival_slot is not None
    of_gpu = handle.source_slot is not None
    if (of_xla, of_gpu) != (group.backend == "xla", spec.gpu):
        raise ValueError(
            f"handle is of a dispatch by another backend; this group's is {group.backend!r} on "
            f"{group.platform}"
        )
