# SPDX-License-Identifier: Apache-2.0
"""How rows and scalars travel: what the primitives of `primitives.py` compute."""

import jax
import jax.numpy as jnp
import numpy as np

from jax_ep._src.backends.plan import Plan
from jax_ep._src.backends.xla.indexing import or_past_end, take_rows
from jax_ep._src.quantized import dequantize_rows, quantize_rows
from jax_ep._src.spec import OpSpec


def gather(spec: OpSpec, array: jax.Array) -> jax.Array:
    """`[R * T, ...]` from all ranks' `[T, ...]`. XLA does not gather nothing."""
    return jax.lax.all_gather(array, spec.axis_names, tiled=True) if array.shape[0] else array


def dispatch_rows(
    spec: OpSpec, x: jax.Array, x_scales: jax.Array | None, plan: Plan
) -> tuple[jax.Array, jax.Array | None]:
    """The received rows, and their scales where they are received quantized."""
    if not spec.fp8_wire:
        return take_rows(gather(spec, x), plan.row_source, 0), None
    quantized = quantize_rows(x) if x_scales is None else (x, x_scales)
    values, scales = (take_rows(gather(spec, part), plan.row_source, 0.0) for part in quantized)
    if spec.fp8_rows:
        return values, scales
    return dequantize_rows(values, scales, spec.dtype), None


def _arrived(plan: Plan) -> tuple[jax.Array, jax.Array]:
    """`arrival_slot` and `arrival_topk`, which the plan of this backend always makes."""
    assert plan.arrival_slot is not None
    assert plan.arrival_topk is not None
    return plan.arrival_slot, plan.arrival_topk


def _row_topk(plan: Plan) -> jax.Array:
    """`row_topk_idx`, which layout "rank" always has."""
    assert plan.row_topk_idx is not None
    return plan.row_topk_idx


def dispatch_scalars(spec: OpSpec, gathered: jax.Array, plan: Plan) -> jax.Array:
    """Scalars of the received rows, from all ranks' `[R * T, K]`."""
    if spec.layout == "rank":
        gathered_rows = take_rows(gathered, plan.row_source, 0.0)
        return jnp.where(_row_topk(plan) >= 0, gathered_rows, 0.0)
    slot, topk = _arrived(plan)
    by_source = gathered.reshape(spec.num_ranks, -1, spec.num_topk)
    arrived = jnp.take_along_axis(by_source, topk, axis=2)
    empty = jnp.zeros((spec.recv_capacity,), jnp.float32)
    return empty.at[or_past_end(spec, slot)].set(arrived, mode="drop")


def combine_scalars(spec: OpSpec, row_scalars: jax.Array, plan: Plan) -> jax.Array:
    """Scalars of received rows back at their selections, `[T, K]`."""
    slot, topk = _arrived(plan)
    flat = row_scalars.reshape(-1)
    index = slot if spec.layout == "expert" else slot * spec.num_topk + topk
    value = jnp.where(slot >= 0, flat[jnp.maximum(index, 0)], 0.0)
    source, token = jnp.indices(slot.shape, sparse=True)[:2]
    back = jnp.zeros((*slot.shape[:2], spec.num_topk), jnp.float32)
    back = back.at[source, token, topk].set(value)
    return jnp.sum(_return_to_sources(spec, back), axis=0)  # at most one rank's is not 0


def _return_to_sources(spec: OpSpec, partial: jax.Array) -> jax.Array:
    """`[R, T, ...]` by source rank -> on each of those `[R, T, ...]` by the rank that sends it."""
    return jax.lax.all_to_all(partial, spec.axis_names, 0, 0, tiled=True)


def combine_rows(spec: OpSpec, y: jax.Array, weights: jax.Array | None, plan: Plan) -> jax.Array:
    slot, topk = _arrived(plan)
    # In layout "rank" all of a token's selections share one row; without weights it counts once.
    num_terms = 1 if spec.layout == "rank" and weights is None else slot.shape[2]
    acc = jnp.zeros((*slot.shape[:2], y.shape[1]), jnp.float32)
    for j in range(num_terms):
        row = jnp.maximum(slot[..., j], 0)
        term = y[row].astype(jnp.float32)
        if weights is not None:
            weight = weights[row] if spec.layout == "expert" else weights[row, topk[..., j]]
            term = weight[..., None] * term
        acc = jnp.where((slot[..., j] >= 0)[..., None], acc + term, acc)
    partial = _return_to_sources(spec, acc.astype(y.dtype)).astype(jnp.float32)
    total = jnp.zeros_like(partial[0])
    # Domains of one rank, whose sums are rounded already, are as one domain of all.
    domain_size = spec.num_ranks if spec.domain_size == 1 else spec.domain_size
    for first in range(0, spec.num_ranks, domain_size):
        of_domain = jnp.zeros_like(total)
        for source in range(first, first + domain_size):
            of_domain = of_domain + partial[source]
        total = of_domain if domain_size == spec.num_ranks else total + _rounded(of_domain, y.dtype)
    return total.astype(y.dtype)


def _rounded(values: jax.Array, dtype: np.dtype) -> jax.Array:
    """float32 values rounded to `dtype`.

    XLA may drop a conversion and back, and integers between them too. What it keeps for float16,
    `reduce_precision`, would flush subnormal numbers there.
    """
    if dtype == jnp.float32:
        return values
    if dtype == jnp.bfloat16:
        return jax.lax.reduce_precision(values, exponent_bits=8, mantissa_bits=7)
    return jax.lax.optimization_barrier(values.astype(dtype)).astype(jnp.float32)
