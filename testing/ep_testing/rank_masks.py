# SPDX-License-Identifier: Apache-2.0
"""Exchanges whose mask of ranks changes from call to call, as the ranks run them."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

import jax_ep
from ep_testing.problems import EpProblem
from ep_testing.programs import make_group, over_ranks
from ep_testing.rank_programs import check_kernels, place


def masked_calls(mesh: Mesh, problem: EpProblem, masks: np.ndarray) -> Any:
    """Calls a program once for each mask, and once more in reverse: what was recorded is replayed.

    Args:
        mesh: of the ranks.
        problem: to solve.
        masks: `[N, R]` bool, of all ranks alike.

    Returns:
        For each call rows, counts, slots and unweighted sums.
    """
    with make_group(problem, "ffi", mesh=mesh, timeout=60.0) as group:
        check_kernels(group, problem)

        def on_rank(x, idx, w, mask):
            received = jax_ep.dispatch(x, idx, w, group=group, rank_mask=mask)
            out = jax_ep.combine(received.x, received.handle, group=group)
            return received.x, received.tokens_per_expert, received.handle.slot, out

        program = over_ranks(group, on_rank)
        args = place(mesh, problem.x, problem.topk_idx, problem.topk_weights)
        outs = []
        for mask in [*masks, *masks[::-1]]:
            each = np.broadcast_to(mask, (problem.num_ranks, problem.num_ranks))
            outs.append(program(*args, *place(mesh, np.ascontiguousarray(each))))
        return jax.block_until_ready(outs)
