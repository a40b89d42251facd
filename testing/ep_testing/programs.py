# SPDX-License-Identifier: Apache-2.0
"""The programs that tests run: a problem's exchange through a backend, on all ranks."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

import jax_ep
from ep_testing.problems import EpProblem
from jax_ep._src.compat import as_varying, varying_axes


def make_mesh(shape: Sequence[int], names: Sequence[str], *, order: Any = None) -> Mesh:
    """A mesh of the first devices, or of those whose numbers `order` gives."""
    numbers = np.arange(math.prod(shape)) if order is None else np.asarray(order)
    devices = np.array(jax.devices())[numbers].reshape(tuple(shape))
    return Mesh(devices, tuple(names), axis_types=(AxisType.Auto,) * len(names))


def make_group(
    problem: EpProblem,
    backend: str,
    *,
    mesh: Mesh | None = None,
    axis_name: Any = "expert",
    **kwargs: Any,
) -> jax_ep.EpGroup:
    """A group for a problem, on a mesh of its own unless one is given."""
    mesh = mesh or make_mesh((problem.num_ranks,), ("expert",))
    config = jax_ep.EpConfig(**problem.config_kwargs())
    return jax_ep.EpGroup(mesh, axis_name, config, backend=backend, **kwargs)


def over_ranks(
    group: jax_ep.EpGroup, f: Callable, *, jit: bool = True, check_vma: bool = True
) -> Callable:
    """`f` on every rank, for arrays whose leading axis is the rank: `[R, ...]` in and out."""
    spec = P(group.axis_name)

    # XLA refuses a `shard_map` of empty arrays alone (jax 0.10 and 0.12), as they are where no rank
    # has a token, and its compiler crashes if they come beside others (0.11): `one` is beside them,
    # and a rank makes its empty ones, so that those that came are used by nothing.
    def on_rank(args: Any) -> Any:
        *args, one = args
        axes = varying_axes(one)

        def own(a: jax.Array) -> jax.Array:
            return a[0] if a.size else as_varying(axes, jnp.zeros(a.shape[1:], a.dtype))[0]

        outs = f(*jax.tree.map(own, args))
        return jax.tree.map(lambda a: a[None], outs), one

    mapped = jax.shard_map(
        on_rank, mesh=group.mesh, in_specs=(spec,), out_specs=spec, check_vma=check_vma
    )
    if jit:
        mapped = jax.jit(mapped)
    return lambda *args: mapped((*args, np.ones(group.num_ranks, np.int8)))[0]


@dataclasses.dataclass(frozen=True)
class Exchanged:
    """All ranks' results of one dispatch and combine, as NumPy arrays `[R, ...]`."""

    received: jax_ep.Dispatched
    weighted: np.ndarray
    unweighted: np.ndarray


def exchange_program(group: jax_ep.EpGroup) -> Callable:
    """Dispatches `x, topk_idx, topk_weights` and combines `y`, with and without weights."""

    def on_rank(x: Any, topk_idx: Any, topk_weights: Any, y: Any) -> Any:
        received = jax_ep.dispatch(x, topk_idx, topk_weights, group=group)
        weighted = jax_ep.combine(y, received.handle, received.weights, group=group)
        unweighted = jax_ep.combine(y, received.handle, group=group)
        return received, weighted, unweighted

    return over_ranks(group, on_rank)


def run_exchange(program: Callable, problem: EpProblem) -> Exchanged:
    """Runs an `exchange_program` on a problem's tokens and expert outputs."""
    outs = program(problem.x, problem.topk_idx, problem.topk_weights, problem.expert_outputs())
    received, weighted, unweighted = jax.tree.map(np.asarray, outs)
    return Exchanged(received=received, weighted=weighted, unweighted=unweighted)


def exchange(problem: EpProblem, backend: str, **kwargs: Any) -> Exchanged:
    """A problem's exchange by a group of its own."""
    with make_group(problem, backend, **kwargs) as group:
        return run_exchange(exchange_program(group), problem)
