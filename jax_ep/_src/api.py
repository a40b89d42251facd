# SPDX-License-Identifier: Apache-2.0
"""`dispatch` and `combine`: checks of what the user passes, then the group's backend."""

from types import ModuleType

import jax
import numpy as np

from jax_ep._src.backends.ffi import ops as ffi
from jax_ep._src.backends.plan import Plan
from jax_ep._src.backends.xla import ops as xla
from jax_ep._src.checks import check_array, check_call
from jax_ep._src.compat import as_array
from jax_ep._src.groups.group import EpGroup
from jax_ep._src.spec import OpSpec
from jax_ep._src.types import Dispatched, DispatchHandle

_BACKENDS: dict[str, ModuleType] = {"ffi": ffi, "xla": xla}
_INT32 = np.dtype(np.int32)
_FLOAT32 = np.dtype(np.float32)


def dispatch(
    x: jax.Array,
    topk_idx: jax.Array,
    topk_weights: jax.Array | None = None,
    *,
    group: EpGroup,
) -> Dispatched:
    """Sends every token to the ranks that host its experts.

    Runs inside `jax.shard_map` over the group's axes; shapes are per rank, and the same on every
    rank. Differentiable in `x` and `topk_weights`: its backward is a `combine` over the same
    handle (with the FP8 wire, as if the rows had not been rounded).

    Args:
        x: tokens, `[T, H]` of `config.dtype`; `T` is at most `config.max_tokens_per_rank` and may
            be 0.
        topk_idx: `[T, K]` int32: global experts, distinct for each token; -1 for no selection.
            Other values are an error when the program runs (backend `ffi`; `xla` cannot raise
            and takes them for -1).
        topk_weights: `[T, K]` float32, sent along and returned as `Dispatched.weights`.
        group: an open `EpGroup`.

    Returns:
        What this rank received, with the handle that `combine` takes.

    Raises:
        ValueError: an argument does not fit the group's config, or the call is not inside
            `shard_map` over the group's axes.
        EpGroupClosed: the group has been closed.
    """
    check_call("dispatch", group)
    x, topk_idx, topk_weights = as_array(x), as_array(topk_idx), as_array(topk_weights)
    config = group.config
    check_array("x", x, ("T", config.hidden), config.dtype)
    num_tokens = x.shape[0]
    if num_tokens > config.max_tokens_per_rank:
        raise ValueError(
            f"x has {num_tokens} tokens; allowed: up to config.max_tokens_per_rank, which is "
            f"{config.max_tokens_per_rank}"
        )
    check_array("topk_idx", topk_idx, (num_tokens, config.num_topk), _INT32)
    if topk_weights is not None:
        check_array("topk_weights", topk_weights, (num_tokens, config.num_topk), _FLOAT32)

    spec = OpSpec.of(group)
    backend = _BACKENDS[group.backend]
    with jax.named_scope("jax_ep.dispatch"):
        plan, counts = backend.plan(spec, topk_idx)
        rows, weights = backend.dispatch(spec, x, topk_weights, plan)
    return Dispatched(
        x=rows,
        weights=weights,
        topk_idx=plan.row_topk_idx,
        handle=DispatchHandle(
            **plan._asdict(),
            config=config,
            num_ranks=group.num_ranks,
            axis_names=group.axis_names,
        ),
        **counts._asdict(),
    )


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
            group, or the call is not inside `shard_map` over the group's axes.
        EpGroupClosed: the group has been closed.
    """
    check_call("combine", group)
    y, weights = as_array(y), as_array(weights)
    config = group.config
    spec = OpSpec.of(group)
    if not isinstance(handle, DispatchHandle):
        raise ValueError(f"handle is a {type(handle).__name__}; allowed: Dispatched.handle")
    _check_handle(handle, group)
    check_array("y", y, (spec.recv_capacity, config.hidden), config.dtype)
    if weights is not None:
        check_array("weights", weights, spec.row_scalars_shape, _FLOAT32)
    with jax.named_scope("jax_ep.combine"):
        return _BACKENDS[group.backend].combine(spec, y, weights, Plan.of(handle))


def _check_handle(handle: DispatchHandle, group: EpGroup) -> None:
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
    if (of_xla, of_gpu) != (group.backend == "xla", OpSpec.of(group).gpu):
        raise ValueError(
            f"handle is of a dispatch by another backend; this group's is {group.backend!r} on "
            f"{group.platform}"
        )
