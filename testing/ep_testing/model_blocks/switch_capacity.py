# SPDX-License-Identifier: Apache-2.0
"""Switch Transformer with a capacity: an expert takes the first tokens of each sequence.

Section 2.2 of arXiv:2101.03961. What comes later is left to the residual connection around the
block: 0 here. The weights of what is left do not change.
"""

import jax
import jax.numpy as jnp

from ep_testing.model_blocks import switch
from ep_testing.model_blocks.formulas import EXPERTS, Params, mixed, spread

TOPK, CAPACITY = switch.TOPK, 2  # tokens of one sequence for one expert

init = switch.init


def has_room(topk_idx: jax.Array) -> jax.Array:
    """`[B, S, 1]` bool, of `topk_idx [B, S, 1]`."""
    hot = jax.nn.one_hot(topk_idx[..., 0], EXPERTS, dtype=jnp.int32)
    order = (jnp.cumsum(hot, axis=1) * hot).sum(axis=-1)  # from 1
    return (order <= CAPACITY)[..., None]


def dense(params: Params, x: jax.Array) -> jax.Array:
    topk_idx, weights = switch.choose(params, x)
    weights = jnp.where(has_room(topk_idx), weights, 0.0)
    return mixed(spread(topk_idx, weights), switch.outputs(params, x))
