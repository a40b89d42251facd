# SPDX-License-Identifier: Apache-2.0
"""Ranks that take no part in a call: what `rank_mask` leaves of the routing and of the weights.

Left-out selections become -1 before a backend sees them. The backends themselves know the mask only
to wait for nobody that it leaves out.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_ep._src.checks import check_array
from jax_ep._src.compat import as_array
from jax_ep._src.groups.group import EpGroup, backend_group


def checked_rank_mask(rank_mask: Any, group: EpGroup, operation: str) -> jax.Array | None:
    """The mask that `dispatch` was given as an array; raises if it does not fit the group.

    Raises:
        ValueError: it is no bool[R], or the group cannot leave ranks out.
    """
    if rank_mask is None:
        return None
    rank_mask = as_array(rank_mask)
    check_array("rank_mask", rank_mask, (group.num_ranks,), np.dtype(bool), of=", or None")
    why_not = backend_group(group).why_no_rank_mask
    if why_not is not None:
        raise ValueError(f"{operation} is given a rank_mask; allowed: None, because {why_not}")
    return jnp.asarray(rank_mask)


def left_by(group: EpGroup, topk_idx: jax.Array, rank_mask: jax.Array) -> jax.Array:
    """`topk_idx`, with -1 for selections of ranks that are left out, and for this rank's if it is.

    Indices that are out of range stay: they are an error.
    """
    num_local = group.num_local_experts
    is_expert = (topk_idx >= 0) & (topk_idx < num_local * group.num_ranks)
    owner = jnp.where(is_expert, topk_idx // num_local, 0)
    takes_part = rank_mask[jax.lax.axis_index(group.axis_names)]
    return jnp.where(is_expert & ~(rank_mask[owner] & takes_part), -1, topk_idx)


def renormalized(topk_weights: jax.Array, topk_idx: jax.Array, left: jax.Array) -> jax.Array:
    """`[T, K]` float32: weights times the sum of a token's weights over the sum of those left.

    Sums are in float32, ascending in `k`. Where that of those left is 0, weights stay.

    Args:
        topk_weights: `[T, K]` float32.
        topk_idx: `[T, K]` int32, as the call was given it; -1 counts in neither sum.
        left: what `left_by` leaves of it.
    """

    def sum_of(selections: jax.Array) -> jax.Array:
        total = jnp.zeros_like(topk_weights[:, :1])
        for k in range(topk_weights.shape[1]):  # XLA may add in any order
            used = jnp.where(selections[:, k : k + 1] >= 0, topk_weights[:, k : k + 1], 0)
            total = total + used
        return total

    of_all, of_left = sum_of(topk_idx), sum_of(left)
    factor = jnp.where(of_left == 0, 1, of_all / jnp.where(of_left == 0, 1, of_left))
    return topk_weights * factor


def num_lost(topk_idx: jax.Array, left: jax.Array) -> jax.Array:
    """`[]` int32: selections of this rank's tokens that are not in what is left of them."""
    return jnp.sum((topk_idx >= 0) & (left < 0), dtype=jnp.int32)
