# SPDX-License-Identifier: Apache-2.0
"""Groups that go on without ranks that do not come: `EpGroup(on_timeout="mask")`."""

import functools
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from jax_ep._src import compat
from jax_ep._src.checks import check_array, check_group
from jax_ep._src.compat import as_array
from jax_ep._src.groups.group import EpGroup
from jax_ep._src.public import set_module


def check_nobody_is_overlooked(operation: str, group: EpGroup, *, instead: str) -> None:
    """Raises where an operation that cannot say who was missing is called in such a group.

    Raises:
        ValueError: its `on_timeout` is "mask".
    """
    if group.on_timeout == "mask":
        raise ValueError(
            f"{operation} is called, and EpGroup.on_timeout is 'mask'; use {instead}, so that "
            "missing_ranks is not overlooked"
        )


def without_gradient(operation: str, group: EpGroup, values: Any) -> Any:
    """The same arrays; in such a group it is an error to differentiate in them."""
    return _cut(operation, values) if group.on_timeout == "mask" else values


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _cut(operation: str, values: Any) -> Any:
    del operation
    return values


@_cut.defjvp
def _refused(operation: str, primals: Any, tangents: Any) -> NoReturn:
    del primals, tangents
    raise ValueError(
        f"{operation} is differentiated, and EpGroup.on_timeout is 'mask': a rank may be there in "
        "one direction and missing in the other; allowed: a group with on_timeout 'error', or "
        "jax.lax.stop_gradient around what goes in"
    )


def nobody(group: EpGroup, like: jax.Array) -> jax.Array:
    """`[R]` bool, all False, varying over the same mesh axes as an array."""
    none = jnp.zeros((group.num_ranks,), bool)
    return next(iter(compat.as_varying(compat.varying_axes(like), none)))


def left_of(rank_mask: jax.Array | None, missing_ranks: jax.Array) -> jax.Array:
    """`[R]` bool: the ranks that take part in what follows a dispatch."""
    return ~missing_ranks if rank_mask is None else rank_mask & ~missing_ranks


@set_module("jax_ep")
def lost_selections(topk_idx: jax.Array, missing: jax.Array, *, group: EpGroup) -> jax.Array:
    """Which tokens are not all there, because ranks that hold some of their experts were missing.

    May be called anywhere, not only inside `shard_map`.

    Args:
        topk_idx: `[T, K]` int32: global experts of this rank's tokens, as `dispatch` got them.
        missing: `[R]` bool, such as `Dispatched.missing_ranks`, the second result of
            `combine_with_status`, or both (`|`).
        group: the group of the exchange.

    Returns:
        `[T]` bool: whether a selection of the token is of an expert of a missing rank.

    Raises:
        ValueError: an argument does not fit the group.
    """
    check_group(group)
    topk_idx, missing = as_array(topk_idx), as_array(missing)
    check_array("topk_idx", topk_idx, ("T", group.config.num_topk), np.dtype(np.int32))
    check_array("missing", missing, (group.num_ranks,), np.dtype(bool))
    num_local = group.num_local_experts
    is_expert = (topk_idx >= 0) & (topk_idx < num_local * group.num_ranks)
    owner = jnp.where(is_expert, topk_idx // num_local, 0)
    return jnp.any(is_expert & jnp.asarray(missing)[owner], axis=1)
