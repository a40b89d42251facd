# SPDX-License-Identifier: Apache-2.0
"""Exchanges in halves and in one piece, to be compared with each other."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

import jax_ep
from ep_testing.problems import EpProblem
from jax_ep._src.groups import native

PROBLEM = EpProblem(name="halves", num_ranks=4, num_tokens=3, num_topk=2, num_experts=8)


def arguments(problem: EpProblem) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, routing and weights of all ranks."""
    return problem.x, problem.topk_idx, problem.topk_weights


def rows_of(received: jax_ep.Dispatched, problem: EpProblem) -> jax.Array:
    """The received rows in the problem's dtype."""
    x = received.x
    return x.dequantize(problem.np_dtype) if isinstance(x, jax_ep.QuantizedRows) else x


def one_piece(group: jax_ep.EpGroup, problem: EpProblem, x: Any, idx: Any, w: Any) -> Any:
    """What a dispatch gives, and the combine of its rows."""
    received = jax_ep.dispatch(x, idx, w, group=group)
    rows = rows_of(received, problem)
    return received, jax_ep.combine(rows, received.handle, received.weights, group=group)


def in_halves(group: jax_ep.EpGroup, problem: EpProblem, x: Any, idx: Any, w: Any) -> Any:
    """The same, with something between the halves."""
    shared = jnp.sin(jnp.asarray(idx, jnp.float32))
    flight = jax_ep.dispatch_start(x, idx, w, group=group)
    received = jax_ep.dispatch_done(flight, after=shared, group=group)
    rows = rows_of(received, problem)
    flight = jax_ep.combine_start(rows, received.handle, received.weights, group=group)
    return received, jax_ep.combine_done(flight, after=[shared, None, 2.0], group=group)


def block(group: jax_ep.EpGroup, x: Any, idx: Any, w: Any, *, halves: bool) -> jax.Array:
    """Something to be differentiated, with other work between the halves."""
    if not halves:
        received = jax_ep.dispatch(x, idx, w, group=group)
        y = jnp.sin(received.x)
        return jax_ep.combine(y, received.handle, received.weights, group=group) + jnp.cos(x)
    flight = jax_ep.dispatch_start(x, idx, w, group=group)
    shared = jnp.cos(x)
    received = jax_ep.dispatch_done(flight, after=shared, group=group)
    y = jnp.sin(received.x)
    flight = jax_ep.combine_start(y, received.handle, received.weights, group=group)
    return jax_ep.combine_done(flight, group=group) + shared


def pipeline(
    group: jax_ep.EpGroup, x: Any, idx: Any, w: Any, *, halves: bool, remat: bool = False
) -> jax.Array:
    """Each turn sends the next batch before it receives the one that the turn before has sent."""

    def start(x: Any) -> Any:
        return jax_ep.dispatch_start(x, idx, w, group=group) if halves else x

    def finish(flight: Any, after: Any) -> jax.Array:
        if halves:
            received = jax_ep.dispatch_done(flight, after=after, group=group)
        else:
            received = jax_ep.dispatch(flight, idx, w, group=group)
        y = jnp.sin(received.x)
        return jax_ep.combine(y, received.handle, received.weights, group=group)

    def turn(carry: Any, scale: Any) -> Any:
        flight, total = carry
        following = start(jnp.cos(total) * scale)
        return (following, total + finish(flight, following)), None

    body = jax.checkpoint(turn) if remat else turn
    (flight, total), _ = jax.lax.scan(body, (start(x), x), jnp.arange(1.0, 5.0, dtype=x.dtype))
    return total + finish(flight, None)


def value_and_grads(f: Callable) -> Callable:
    """Of a loss of `f(x, idx, w)`, its value and gradients."""

    def loss(x: Any, w: Any, idx: Any) -> jax.Array:
        return jnp.sum(jnp.sin(f(x, idx, w).astype(jnp.float32)))

    return lambda x, idx, w: jax.value_and_grad(loss, argnums=(0, 1))(x, w, idx)


def assert_same_bits(got: Any, want: Any) -> None:
    """Of all arrays of two trees."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def num_open(group: jax_ep.EpGroup) -> int:
    """Flights of the group that are open now."""
    return native.load().num_open_flights(group.group_id)


def compiled_text(group: jax_ep.EpGroup, f: Callable, *args: Any) -> str:
    """The program that XLA makes of `f` on all ranks, for the arguments of a problem."""
    spec = P(group.axis_name)
    mapped = jax.shard_map(f, mesh=group.mesh, in_specs=spec, out_specs=spec)
    return jax.jit(mapped).lower(*[a.reshape(-1, a.shape[-1]) for a in args]).compile().as_text()
