# SPDX-License-Identifier: Apache-2.0
"""What ranks run of whole models: blocks of published ones, and layers whose experts have copies.

Like `rank_programs`: each function in all processes alike, on the ranks of a mesh.
"""

import functools
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

import jax_ep
from ep_testing.model_blocks import layers, ports, running
from ep_testing.moe_layers import by_rank, inputs, weights_of
from ep_testing.problems import EpProblem
from ep_testing.programs import make_group, over_ranks
from ep_testing.rank_programs import place

# Of each rank, beside those for its share of the experts.
SPARE_SLOTS = 1

COPIED = EpProblem(
    name="copies", num_ranks=2, num_tokens=24, hidden=16, num_topk=3, num_experts=16, routing="zipf"
)


def block(
    mesh: Mesh, name: str, shape: tuple[int, ...], token_spec: P, **axes: tuple[str, ...]
) -> None:
    """A block by `nnx.MoE` against the dense one, on the mesh's devices: one process has all.

    Args:
        mesh: for its devices.
        name: of the block.
        shape: of a mesh ("fsdp", "tensor", "expert") of them.
        token_spec: of `[B, S, H]` tokens.
        axes: the layer's `tensor_axes` and `fsdp_axes`.

    Raises:
        AssertionError: output or a gradient differs.
    """
    names = ("fsdp", "tensor", "expert")
    devices = mesh.devices.reshape(shape)
    own = Mesh(devices, names, axis_types=(AxisType.Auto,) * len(names))
    with (
        jax.default_matmul_precision("highest"),
        running.make_group(name, own) as group,
    ):
        function = layers.nnx_function(name, group, token_spec=token_spec, **axes)
        running.assert_is_dense(name, function)


BLOCKS = tuple(ports.PORTS)


def copies(mesh: Mesh, problem: EpProblem, *, backend: str = "ffi") -> Any:
    """A layer whose hot experts have copies, all of its gradients, and weights that move.

    Exact: chosen slots, copies of weights, their gradients' sums, weights after a move. Close: what
    comes of matrix products.
    """
    ranks, experts = problem.num_ranks, problem.num_experts
    load = np.bincount(problem.topk_idx[problem.topk_idx >= 0], minlength=experts)
    plan_of = functools.partial(
        jax_ep.plan_placement,
        num_ranks=ranks,
        slots_per_rank=experts // ranks + SPARE_SLOTS,
        max_copies=ranks,
    )
    plan, later = plan_of(load), plan_of(load[::-1])
    slots = ranks * (experts // ranks + SPARE_SLOTS)
    rows = slots // ranks * max(weight[0].size for weight in weights_of(problem)) // problem.hidden
    of_weights = problem.replace(
        num_experts=slots, num_topk=ranks, max_tokens_per_rank=rows, recv_capacity=rows,
        capacity_factor=None, wire_dtype=None,
    )  # fmt: skip
    weights = by_rank(problem, weights_of(problem))
    tables = [np.stack([table] * ranks) for table in jax.tree.leaves(plan.layer(0))]
    open_group = functools.partial(make_group, backend=backend, mesh=mesh, timeout=60.0)
    with (
        open_group(problem.replace(num_experts=slots)) as group,
        open_group(of_weights) as weight_group,
        jax.default_matmul_precision("highest"),
    ):

        def on_rank(x, idx, w, weights, tables):
            arrays = jax_ep.PlacementArrays(*tables)
            chosen = jax_ep.place(idx, arrays, group=group)

            def expand(weights):
                return jax_ep.expand_experts(weights, arrays, group=weight_group)

            def run(x, w, weights):
                return jax_ep.moe(x, chosen, w, *expand(weights), group=group)

            own, sums = jax.vjp(expand, weights)
            out, vjp = jax.vjp(run, x, w, weights)
            return (chosen, own, sums(own)), (out, vjp(out))

        x, idx, w = inputs(problem), problem.topk_idx, problem.topk_weights
        exact, close = over_ranks(group, on_rank)(
            *place(mesh, x, idx, w), place(mesh, *weights), place(mesh, *tables)
        )
        moved = _moved(exact[1], plan.layer(0), later.layer(0), weight_group)
        return {"exact": (exact, moved), "close": close}


def _moved(weights: Any, old: Any, new: Any, group: jax_ep.EpGroup) -> Any:
    """Weights of slots `[R, S, ...]` as another placement has them."""
    # [R, S, ...] -> [P, ...], sharded alike; moving gives away what it is given.
    merged = jax.jit(lambda tree: jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), tree))
    split = jax.jit(
        lambda tree: jax.tree.map(lambda a: a.reshape(group.num_ranks, -1, *a.shape[1:]), tree)
    )
    return split(jax_ep.move_experts(merged(weights), old=old, new=new, group=group))
