# SPDX-License-Identifier: Apache-2.0
"""Copies of experts' weights: a dispatch of rows, and its transpose, a combine of gradients.

A row of a weight is a token, and its experts are the slots that want a copy of it. So copies have
the bits of what is copied, gradients of copies are added up in float32 in the order of the slots,
and neither needs a collective of XLA.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jax_ep._src.api import dispatch
from jax_ep._src.balancing.arrays import PlacementArrays, check_ranks
from jax_ep._src.checks import check_array, check_call, check_group, is_array
from jax_ep._src.compat import as_array
from jax_ep._src.groups.group import EpGroup, kept
from jax_ep._src.missing import check_nobody_is_overlooked
from jax_ep._src.public import set_module

_NO_BYTES = ("bool", "int2", "int4", "uint2", "uint4", "float4_e2m1fn")


@set_module("jax_ep")
def expand_experts(weights: Any, arrays: PlacementArrays, *, group: EpGroup) -> Any:
    """The weights of this rank's slots, from those of the logical experts.

    For training: parameters and the optimizer's state stay those of the logical experts, which are
    copied in each step, and the gradient of an expert is the sum of those of its copies in the
    order of combine, by rank, rounded once. Runs inside `jax.shard_map` over the group's axes.

    Args:
        weights: a pytree of arrays `[E / R, ...]` of `config.dtype`, this rank's logical experts.
            All but the first dimension have a multiple of `config.hidden` elements, which travel
            as rows of so many.
        arrays: of the layer, from `ExpertPlacement.layer`.
        group: an open `EpGroup` for the weights: `num_experts` is `P`, the slots of all ranks,
            `num_topk` is `J`, the most copies of an expert, and a rank has room for the rows of
            all of its slots. Without an FP8 wire and alignment.

    Returns:
        A pytree of arrays `[P / R, ...]`; zeros for a slot without an expert.

    Raises:
        ValueError: an argument does not fit the group, or the call is not inside `shard_map` over
            its axes.
        EpGroupClosed: the group has been closed.
    """
    _check_group(group, "expand_experts")
    check_call("expand_experts", group)
    num_experts, max_copies = _check_arrays("arrays", arrays, group)
    if num_experts % group.num_ranks or max_copies != group.config.num_topk:
        raise ValueError(
            f"arrays have {num_experts} experts with up to {max_copies} copies; allowed: a "
            f"multiple of the group's {group.num_ranks} ranks, with up to EpConfig.num_topk "
            f"copies, which is {group.config.num_topk}"
        )
    num_own = num_experts // group.num_ranks
    first = jax.lax.axis_index(group.axis_names) * num_own
    wanted = jax.lax.dynamic_slice_in_dim(arrays.copies, first, num_own)

    def expand(leaf: Any) -> jax.Array:
        leaf = as_array(leaf)
        rows = _rows_of(leaf, num_own, group)
        if leaf.dtype != group.config.dtype:
            raise ValueError(
                f"weights have an array of {leaf.dtype}; allowed: EpConfig.dtype, "
                f"{group.config.dtype.name}, in which they have gradients"
            )
        _check_room(group, num_own * rows, group.num_local_experts * rows)
        received, filled = _send_rows(group, leaf, wanted, rows)
        copies = _rows_of_slots(received, filled, rows)
        return copies.reshape(group.num_local_experts, *leaf.shape[1:])

    return jax.tree.map(expand, weights)


@set_module("jax_ep")
def move_experts(
    params: Any,
    *,
    old: PlacementArrays,
    new: PlacementArrays,
    group: EpGroup,
    keep_lost: bool = False,
) -> Any:
    """Weights of slots as another placement has them; outside of `shard_map`, between steps.

    Slots that keep their expert keep its weights. Others get a copy from a slot that has had the
    expert: of the same rank if there is one, else of the lowest. The bits are those of the source.
    Arrays that are split over the group's axes are donated: beside them there is room for the rows
    that move, and, of an array of another dtype than `config.dtype`, for one more of its shards.

    Args:
        params: a pytree of different global arrays `[P, ...]`, split over the group's axes along
            the slots, of `config.dtype` or of numbers of fewer bytes, which travel as its bits. All
            but the first dimension have a multiple of the bytes of a row of the group.
        old: the placement that they have.
        new: the one that they get.
        group: an open `EpGroup` for the weights: `num_experts` is `P`; a slot may be copied to up
            to `num_topk` others; a rank has room (`recv_capacity`) for the rows of the slots that
            change on it. Without an FP8 wire and alignment.
        keep_lost: whether a slot may keep what it has where `old` has its expert nowhere, as after
            a rank was lost: `restore_experts` fills it then. False: that is an error.

    Returns:
        The pytree of arrays.

    Raises:
        ValueError: an argument does not fit the group, more changes than it has room for, or an
            expert of `new` is in no slot of `old`. No array has been donated then.
        EpGroupClosed: the group has been closed.
    """
    _check_group(group, "move_experts")
    group.check_open()
    for name, arrays in (("old", old), ("new", new)):
        _check_arrays(name, arrays, group)
    before, after = np.asarray(old.slot_expert), np.asarray(new.slot_expert)
    if keep_lost:
        after = np.where(np.isin(after, before), after, -1)
    wanted = _wanted_slots(before, after, group)
    changed = ((before != after) & (after >= 0)).reshape(group.num_ranks, -1).sum(axis=1).max()
    leaves, tree = jax.tree.flatten(params)
    leaves = [as_array(leaf) for leaf in leaves]
    # All of them before the first is given away.
    all_rows = [_rows_of(leaf, group.config.num_experts, group) for leaf in leaves]
    for rows in all_rows:
        _check_room(group, group.num_local_experts * rows, int(changed) * rows)
    if len(set(map(id, leaves))) < len(leaves):
        raise ValueError("params has an array twice; allowed: different ones, as each is donated")
    if any(isinstance(leaf, jax.Array) and leaf.is_deleted() for leaf in leaves):
        raise ValueError("params has an array that was donated before; allowed: what was returned")
    sharding = NamedSharding(group.mesh, PartitionSpec(group.axis_names))
    # Not `device_put`, which compares the values of all processes by a collective of XLA.
    wanted = jax.make_array_from_callback(wanted.shape, sharding, wanted.__getitem__)

    def move(leaf: Any, rows: int) -> jax.Array:
        key = (move_experts, leaf.shape, leaf.dtype)
        run = functools.partial(_move_leaf, group, rows)
        return kept(group, key, lambda: jax.jit(run, donate_argnums=0))(leaf, wanted)

    return jax.tree.unflatten(tree, list(map(move, leaves, all_rows)))


def _move_leaf(group: EpGroup, rows: int, leaf: jax.Array, wanted: jax.Array) -> jax.Array:
    def on_rank(leaf: jax.Array, wanted: jax.Array) -> jax.Array:
        own = _as_rows_dtype(leaf, group)
        received, filled = _send_rows(group, own, wanted, rows)
        flat = own.reshape(own.shape[0], rows, group.config.hidden)
        copies = _rows_of_slots(received, filled, rows)
        moved = jnp.where((filled > 0)[:, None, None], copies, flat)
        return _with_dtype(moved.reshape(own.shape), leaf)

    spec = PartitionSpec(group.axis_names)
    mapped = jax.shard_map(on_rank, mesh=group.mesh, in_specs=(spec, spec), out_specs=spec)
    return mapped(leaf, wanted)


def _send_rows(
    group: EpGroup, weights: jax.Array, wanted: jax.Array, rows: int
) -> tuple[jax.Array, jax.Array]:
    """Rows that this rank gets, and how many of each of its slots: all of them, or none."""
    sent = weights.reshape(-1, group.config.hidden)
    recv = dispatch(sent, jnp.repeat(wanted, rows, axis=0), group=group)
    assert isinstance(recv.x, jax.Array)
    return recv.x, recv.group_sizes


def _rows_of_slots(received: jax.Array, filled: jax.Array, rows: int) -> jax.Array:
    """`[S, rows, hidden]`: the received rows of each slot; zeros where it got none."""
    within = jnp.arange(rows, dtype=filled.dtype)[None, :]
    starts = jnp.cumsum(filled) - filled
    # Different ones in any case, so that gradients are no sums.
    nowhere = received.shape[0] + jnp.arange(len(filled), dtype=filled.dtype)[:, None] * rows
    index = jnp.where((filled > 0)[:, None], starts[:, None], nowhere) + within
    return received.at[index].get(mode="fill", fill_value=0, unique_indices=True)


def _wanted_slots(before: np.ndarray, after: np.ndarray, group: EpGroup) -> np.ndarray:
    """`[P, K]` int32: which slots want a copy of each slot, -1 behind."""
    per_rank = group.num_local_experts
    wanting: dict[int, list[int]] = {}
    for slot in np.flatnonzero((before != after) & (after >= 0)):
        sources = np.flatnonzero(before == after[slot])
        if not len(sources):
            raise ValueError(
                f"new has expert {after[slot]} in slot {slot}, and old has it nowhere; allowed: "
                "experts that are in a slot of old, or keep_lost"
            )
        same_rank = sources[sources // per_rank == slot // per_rank]
        wanting.setdefault(int([*same_rank, *sources][0]), []).append(int(slot))
    most = max(map(len, wanting.values()), default=0)
    if most > group.config.num_topk:
        raise ValueError(
            f"new has {most} copies of one slot of old; allowed: up to EpConfig.num_topk of the "
            f"group, which is {group.config.num_topk}"
        )
    wanted = np.full((len(before), group.config.num_topk), -1, np.int32)
    for source, slots in wanting.items():
        wanted[source, : len(slots)] = slots
    return wanted


def _check_arrays(name: str, arrays: Any, group: EpGroup) -> tuple[int, int]:
    """Experts of a placement, and the most copies of one; raises unless it is for the group."""
    if not isinstance(arrays, PlacementArrays):
        raise ValueError(
            f"{name} is a {type(arrays).__name__}; allowed: what ExpertPlacement.layer gives"
        )
    check_ranks(name, arrays, group.num_ranks)
    slots = group.config.num_experts
    check_array(
        f"{name}.slot_expert", arrays.slot_expert, (slots,), np.dtype(np.int32),
        of=", the group's EpConfig.num_experts",
    )  # fmt: skip
    return arrays.copies.shape[0], arrays.copies.shape[1]


def _check_group(group: Any, operation: str) -> None:
    """Raises unless all rows arrive, as they were, and next to each other."""
    check_group(group, expert_layout_for=operation)
    check_nobody_is_overlooked(operation, group, instead="a group with on_timeout 'error'")
    config = group.config
    if config.wire_dtype is not None or config.expert_alignment != 1:
        raise ValueError(
            f"group has EpConfig.wire_dtype {config.wire_dtype} and expert_alignment "
            f"{config.expert_alignment}; allowed for {operation}: None and 1, so that weights "
            "arrive as they are, in the room that they take"
        )


def _rows_of(leaf: Any, num: int, group: EpGroup) -> int:
    """Rows of each expert or slot; raises unless an array has `num` of them, in whole rows."""
    config = group.config
    if not is_array(leaf):
        raise ValueError(f"weights have a {type(leaf).__name__}; allowed: arrays")
    # Bits of what has no whole bytes are not where JAX says.
    is_whole = leaf.dtype.itemsize <= config.dtype.itemsize and leaf.dtype.name not in _NO_BYTES
    if not is_whole or config.dtype.itemsize % leaf.dtype.itemsize:
        raise ValueError(
            f"weights have an array of {leaf.dtype}; allowed: EpConfig.dtype, {config.dtype.name}, "
            "or numbers of fewer whole bytes that fill it"
        )
    num_bytes = math.prod(leaf.shape[1:]) * leaf.dtype.itemsize
    row_bytes = config.hidden * config.dtype.itemsize
    if not leaf.ndim or leaf.shape[0] != num or num_bytes % row_bytes or not num_bytes:
        raise ValueError(
            f"weights have an array {leaf.dtype}{list(leaf.shape)}; allowed: [{num}, ...] with a "
            f"multiple of {row_bytes} bytes for each, which is a row of the group"
        )
    return num_bytes // row_bytes


def _check_room(group: EpGroup, sent: int, received: int) -> None:
    config = group.config
    if sent > config.max_tokens_per_rank:
        raise ValueError(
            f"a rank's weights are {sent} rows; allowed: up to EpConfig.max_tokens_per_rank, "
            f"which is {config.max_tokens_per_rank}"
        )
    room = config.capacity(num_ranks=group.num_ranks, num_tokens=sent)
    if received > room:
        raise ValueError(
            f"a rank gets {received} rows of weights; allowed: up to EpConfig.recv_capacity, for "
            f"which the group has {room}"
        )


def _as_rows_dtype(leaf: jax.Array, group: EpGroup) -> jax.Array:
    """The same bits as numbers of the group's dtype, `[n, elements]` where that is another."""
    dtype = group.config.dtype
    if leaf.dtype == dtype:
        return leaf
    flat = leaf.reshape(leaf.shape[0], -1)
    factor = dtype.itemsize // leaf.dtype.itemsize
    if factor == 1:
        return jax.lax.bitcast_convert_type(flat, dtype)
    return jax.lax.bitcast_convert_type(flat.reshape(*flat.shape[:1], -1, factor), dtype)


def _with_dtype(moved: jax.Array, leaf: jax.Array) -> jax.Array:
    """The bits of `_as_rows_dtype`, as what `leaf` is."""
    if moved.dtype == leaf.dtype:
        return moved
    return jax.lax.bitcast_convert_type(moved, leaf.dtype).reshape(leaf.shape)
