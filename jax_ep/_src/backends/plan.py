# SPDX-License-Identifier: Apache-2.0
"""`Plan`: what a backend works out from the routing, before any row travels."""

import dataclasses

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Fields as in `DispatchHandle` and `Dispatched`."""

    slot: jax.Array
    row_source: jax.Array
    row_topk_idx: jax.Array | None
    group_sizes: jax.Array
    tokens_per_expert: jax.Array
    num_dropped: jax.Array
    source_slot: jax.Array | None = None
    arrival_slot: jax.Array | None = None
    arrival_topk: jax.Array | None = None
