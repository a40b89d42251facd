# SPDX-License-Identifier: Apache-2.0
"""Expert parallelism from `jax.lax` collectives, as users write it today.

Every function runs inside `jax.shard_map` over one mesh axis, takes one rank's tokens and returns
`sum_k weight_k * expert_k(x)` for them. The experts are the identity behind an optimization
barrier, so that only communication is measured, and XLA must still make the rows that real
experts would read, in the order in which they would read them. Gradients are left to JAX.
"""

import jax
import jax.numpy as jnp


def identity_experts(rows: jax.Array) -> jax.Array:
    """Returns the rows, and keeps XLA from fusing what makes them into what reads them."""
    return jax.lax.optimization_barrier(rows)


def gather_scatter(
    x: jax.Array,
    topk_idx: jax.Array,
    topk_weights: jax.Array,
    *,
    axis_name: str,
    num_experts: int,
    recv_capacity: int,
) -> jax.Array:
    """All-gather + reduce-scatter: every rank gets all tokens and keeps its experts' rows.

    Also known as a ring of experts. Nothing is worked out before rows travel, and every token
    travels to every rank, twice.

    Args:
        x: `[T, H]`.
        topk_idx: `[T, K]` int32.
        topk_weights: `[T, K]` float32.
        axis_name: mesh axis of the ranks.
        num_experts: `E`.
        recv_capacity: `C`; rows past it are dropped.
    """
    num_local = num_experts // jax.lax.axis_size(axis_name)
    all_x, all_idx, all_weights = (
        jax.lax.all_gather(a, axis_name, tiled=True) for a in (x, topk_idx, topk_weights)
    )
    local = all_idx.reshape(-1) - jax.lax.axis_index(axis_name) * num_local
    is_mine = (local >= 0) & (local < num_local)
    # A stable sort keeps (source rank, source token) order for each local expert.
    order = jnp.argsort(jnp.where(is_mine, local, num_local), stable=True)[:recv_capacity]
    token = order // topk_idx.shape[1]
    rows = all_x.at[token].get(mode="promise_in_bounds")  # [C, H]
    y = identity_experts(rows)
    weights = jnp.where(is_mine[order], all_weights.reshape(-1)[order], 0).astype(x.dtype)
    partial = jnp.zeros_like(all_x)
    partial = partial.at[token].add(weights[:, None] * y, mode="promise_in_bounds")
    return jax.lax.psum_scatter(partial, axis_name, tiled=True)


def bucket_all_to_all(
    x: jax.Array,
    topk_idx: jax.Array,
    topk_weights: jax.Array,
    *,
    axis_name: str,
    num_experts: int,
    bucket_capacity: int,
) -> jax.Array:
    """Capacity all_to_all: a bucket of fixed size for each (source rank, expert).

    Args:
        x: `[T, H]`.
        topk_idx: `[T, K]` int32.
        topk_weights: `[T, K]` float32.
        axis_name: mesh axis of the ranks.
        num_experts: `E`.
        bucket_capacity: rows of a bucket; selections past it are dropped.
    """
    num_tokens, num_topk = topk_idx.shape
    num_slots = num_experts * bucket_capacity
    expert = topk_idx.reshape(-1)
    order = jnp.argsort(expert, stable=True)
    ends = jnp.cumsum(jnp.bincount(expert, length=num_experts))
    sorted_expert = expert[order]
    start = jnp.where(sorted_expert > 0, ends[sorted_expert - 1], 0)
    position = jnp.arange(expert.size, dtype=jnp.int32) - start
    sorted_slot = jnp.where(
        position < bucket_capacity, sorted_expert * bucket_capacity + position, num_slots
    )
    # Places that nothing fills hold a copy of token 0, which is cheaper than zeros.
    source = jnp.zeros((num_slots,), jnp.int32)
    source = source.at[sorted_slot].set(order // num_topk, mode="drop")
    slot = jnp.zeros_like(expert).at[order].set(sorted_slot).reshape(num_tokens, num_topk)

    buckets = x.at[source].get(mode="promise_in_bounds")
    buckets = buckets.reshape(num_experts, bucket_capacity, -1)
    rows = jax.lax.all_to_all(buckets, axis_name, 0, 1, tiled=True)  # [L, R * capacity, H]
    y = identity_experts(rows)
    back = jax.lax.all_to_all(y, axis_name, 1, 0, tiled=True).reshape(num_slots, -1)
    weights = jnp.where(slot < num_slots, topk_weights, 0).astype(x.dtype)
    taken = back.at[jnp.minimum(slot, num_slots - 1)].get(mode="promise_in_bounds")  # [T, K, H]
    return jnp.einsum("tkh,tk->th", taken, weights)


def ragged_all_to_all(
    x: jax.Array,
    topk_idx: jax.Array,
    topk_weights: jax.Array,
    *,
    axis_name: str,
    num_experts: int,
    recv_capacity: int,
) -> jax.Array:
    """A row for each selection by `lax.ragged_all_to_all`, sorted by expert there, and back.

    Counts are exchanged first. XLA compiles it for GPUs and TPUs, not for CPUs.

    Args:
        x: `[T, H]`.
        topk_idx: `[T, K]` int32.
        topk_weights: `[T, K]` float32.
        axis_name: mesh axis of the ranks.
        num_experts: `E`.
        recv_capacity: `C`; no rank may get more rows.
    """
    num_ranks, me = jax.lax.axis_size(axis_name), jax.lax.axis_index(axis_name)
    num_tokens, num_topk = topk_idx.shape
    num_local = num_experts // num_ranks
    expert = topk_idx.reshape(-1)
    order = jnp.argsort(expert, stable=True)
    counts = jnp.bincount(expert, length=num_experts).astype(jnp.int32)
    counts = jax.lax.all_gather(counts, axis_name).reshape(num_ranks, num_ranks, num_local)
    rows_to = counts.sum(axis=2)  # [source, destination]
    first_sent = (jnp.cumsum(rows_to, axis=1) - rows_to).astype(jnp.int32)
    first_received = (jnp.cumsum(rows_to, axis=0) - rows_to).astype(jnp.int32)

    rows = x.at[order // num_topk].get(mode="promise_in_bounds")  # [T * K, H]
    received = jax.lax.ragged_all_to_all(
        rows,
        jnp.zeros((recv_capacity, x.shape[1]), x.dtype),
        first_sent[me],
        rows_to[me],
        first_received[me],
        rows_to[:, me],
        axis_name=axis_name,
    )
    # They come by (source, expert); the experts want them by (expert, source).
    of_mine = counts[:, me].reshape(-1)
    local = jnp.tile(jnp.arange(num_local, dtype=jnp.int32), num_ranks)
    local = jnp.repeat(local, of_mine, total_repeat_length=recv_capacity)
    is_row = jnp.arange(recv_capacity, dtype=jnp.int32) < of_mine.sum()
    by_expert = jnp.argsort(jnp.where(is_row, local, num_local), stable=True)
    y = identity_experts(received.at[by_expert].get(mode="promise_in_bounds"))
    y = y.at[jnp.argsort(by_expert)].get(mode="promise_in_bounds")
    back = jax.lax.ragged_all_to_all(
        y,
        jnp.zeros_like(rows),
        first_received[:, me],
        rows_to[:, me],
        first_sent[:, me],
        rows_to[me],
        axis_name=axis_name,
    )
    taken = back.at[jnp.argsort(order)].get(mode="promise_in_bounds")
    taken = taken.reshape(num_tokens, num_topk, -1)
    return jnp.einsum("tkh,tk->th", taken, topk_weights.astype(x.dtype))
