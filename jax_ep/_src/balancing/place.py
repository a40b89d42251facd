# SPDX-License-Identifier: Apache-2.0
"""`place`: from the experts that a router knows to the slots that dispatch knows."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_ep._src.balancing.arrays import PlacementArrays, check_placement
from jax_ep._src.checks import check_array, check_call
from jax_ep._src.compat import as_array, varying_alike
from jax_ep._src.groups.group import EpGroup
from jax_ep._src.public import set_module

_TOKEN_IDS = (np.dtype(np.int32), np.dtype(np.uint32))


@set_module("jax_ep")
def place(
    topk_idx: jax.Array,
    arrays: PlacementArrays,
    *,
    group: EpGroup,
    token_ids: jax.Array | None = None,
) -> jax.Array:
    """Chooses a copy of each selected expert: what `dispatch` takes in place of `topk_idx`.

    A hash of the expert, the token and the rank decides which copy, so that copies get the shares
    of the placement. It is a function of these and of `arrays` alone: the same call gives the same
    slots on every run, backend and number of hosts, and nothing is exchanged. Slots of a token are
    distinct if its experts are. `reference.place` has the definition.

    A token's sum depends in its last bits on where its experts are. With `token_ids`, a token's
    slots do not depend on its row among this rank's tokens.

    Runs inside `jax.shard_map` over the group's axes. There is no gradient: indices have none.

    Args:
        topk_idx: `[T, K]` int32: logical experts, from 0 to E - 1, or -1 for no selection. That
            stays -1; other values, and experts without a copy, become -1.
        arrays: `ExpertPlacement.layer(i)` of a placement with as many slots as the group has
            experts, `P = num_experts`, for as many ranks; the same on all ranks.
        group: an open `EpGroup`.
        token_ids: `[T]` int32 or uint32, what stands for each token in the hash, such as sequence
            number * 65536 + position. None: the row number.

    Returns:
        `[T, K]` int32, slots from 0 to P - 1, or -1.

    Raises:
        ValueError: an argument has a value that is not allowed, or the call is not inside
            `shard_map` over the group's axes.
        EpGroupClosed: the group has been closed.
    """
    check_call("place", group)
    check_placement("arrays", arrays, group)
    shape = ("T", group.config.num_topk)
    check_array("topk_idx", topk_idx, shape, np.dtype(np.int32), of=", K as EpConfig.num_topk")
    num_experts = arrays.copies.shape[0]
    if token_ids is None:
        token_ids = jnp.arange(topk_idx.shape[0], dtype=jnp.uint32)
    else:
        token_ids = check_token_ids(token_ids, topk_idx.shape[:1])
    rank = jax.lax.axis_index(group.axis_names).astype(jnp.uint32)
    topk_idx, token_ids, rank, copies, upper = varying_alike(
        jnp.asarray(topk_idx),
        token_ids.astype(jnp.uint32),
        rank,
        jnp.asarray(arrays.copies),
        jnp.asarray(arrays.upper),
    )
    is_selected = (topk_idx >= 0) & (topk_idx < num_experts)
    expert = jnp.where(is_selected, topk_idx, 0)
    drawn = _hash(expert.astype(jnp.uint32), token_ids[:, None], rank) >> 16
    ends = upper[expert]  # [T, K, J]
    is_before = (ends >= 0) & (ends <= drawn.astype(jnp.int32)[..., None])
    copy = is_before.sum(axis=-1, dtype=jnp.int32)
    slot = jnp.take_along_axis(copies[expert], copy[..., None], axis=-1, mode="clip")[..., 0]
    return jnp.where(is_selected, slot, -1)


def _hash(expert: jax.Array, token: jax.Array, rank: jax.Array) -> jax.Array:
    """uint32 of three: wraps, as uint32 does."""
    h = expert * np.uint32(0x9E3779B1) + token * np.uint32(0x85EBCA77)
    h += rank * np.uint32(0xC2B2AE3D)
    h ^= h >> 15
    h *= np.uint32(0x2C1B3C6D)
    h ^= h >> 12
    h *= np.uint32(0x297A2D39)
    return h ^ (h >> 15)


def check_token_ids(token_ids: Any, lead: tuple[int, ...]) -> jax.Array:
    """`token_ids` as an array; raises unless there is one for each token of this shape."""
    token_ids = as_array(token_ids)
    dtype = getattr(token_ids, "dtype", None)
    wanted = dtype if dtype in _TOKEN_IDS else _TOKEN_IDS[0]
    check_array("token_ids", token_ids, lead, wanted, of=", or uint32")
    return jnp.asarray(token_ids)
