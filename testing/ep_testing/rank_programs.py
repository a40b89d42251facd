# SPDX-License-Identifier: Apache-2.0
"""What the ranks run: each function in all processes alike, on the ranks of a mesh.

They run on a mesh of CPU devices as well, where the tests get the bits that they compare with. No
collective of XLA crosses ranks, because NCCL does not serve several ranks on one GPU; but for those
of `beside_collectives`.
"""

import functools
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_ep
from ep_testing.moe_layers import by_rank, inputs, weights_of
from ep_testing.problems import EpProblem
from ep_testing.programs import exchange_program, make_group, over_ranks
from jax_ep._src.groups import domains
from jax_ep._src.groups.group import backend_group

# Longer than other ranks may take to compile.
_TIMEOUT_S = 60.0

_open_group = functools.partial(make_group, backend="ffi", timeout=_TIMEOUT_S)


def place(mesh: Mesh, *arrays: np.ndarray) -> list[jax.Array]:
    """Arrays `[R, ...]`, of which each process takes its ranks' parts."""
    sharding = NamedSharding(mesh, P(mesh.axis_names))
    return [jax.make_array_from_callback(a.shape, sharding, a.__getitem__) for a in arrays]


def check_kernels(group: jax_ep.EpGroup, problem: EpProblem) -> None:
    """On GPUs: that the kernels which a problem names serve its calls.

    Their halves tell them apart, which exchanges between hosts do not have.

    Raises:
        RuntimeError: others do.
    """
    if group.platform != "cuda":
        return
    between_hosts = domains.SIZE_VARIABLE in os.environ
    expected = problem.num_tokens <= (problem.low_latency_tokens or 0) and not between_hosts
    backend = backend_group(group)
    said = (
        backend.dispatches_in_halves(problem.num_tokens, quantized=False),
        backend.combines_in_halves(problem.num_tokens),
    )
    if said != (expected, expected):
        raise RuntimeError(f"{problem.name}: in halves {said}; expected: {expected}")


def _tokens(problem: EpProblem) -> tuple[np.ndarray, ...]:
    return inputs(problem), problem.topk_idx, problem.topk_weights


def exchange(mesh: Mesh, problem: EpProblem) -> Any:
    """Dispatch, and combine with and without weights: see `programs.exchange_program`."""
    with _open_group(problem, mesh=mesh) as group:
        args = problem.x, problem.topk_idx, problem.topk_weights, problem.expert_outputs()
        return exchange_program(group)(*place(mesh, *args))


# --- a layer under transformations -------------------------------------------------------------


def _as_it_is(f: Callable) -> Callable:
    return f


def layer(
    x: jax.Array,
    idx: jax.Array,
    w: jax.Array,
    *,
    group: jax_ep.EpGroup,
    around: Callable[[Callable], Callable] = _as_it_is,
) -> jax.Array:
    """Dispatches, multiplies each row by a number of its group's, combines; all defined to bits.

    `around` wraps dispatch and combine.
    """
    dispatch = around(functools.partial(jax_ep.dispatch, group=group))
    combine = around(functools.partial(jax_ep.combine, group=group))
    received = dispatch(x, idx, w)
    ends = jnp.cumsum(received.group_sizes)
    row = jnp.arange(received.x.shape[0])
    of_group = jnp.sum(row[:, None] >= ends[None, :], axis=1) % 7
    factor = (1.0 + of_group.astype(jnp.float32) / 8.0).astype(received.x.dtype)
    y = received.x * factor[:, None]
    return combine(y, received.handle, received.weights)


def _turned(idx: jax.Array, turn: Any, num_experts: int) -> jax.Array:
    """Another routing in each turn."""
    return jnp.where(idx >= 0, (idx + turn) % num_experts, idx)


def jitted(mesh: Mesh, problem: EpProblem) -> Any:
    """A layer under jit."""
    with _open_group(problem, mesh=mesh) as group:
        return over_ranks(group, functools.partial(layer, group=group))(
            *place(mesh, *_tokens(problem))
        )


def scanned(mesh: Mesh, problem: EpProblem, remat: bool = False) -> Any:
    """Gradients of x through a scan of four layers, each with another routing."""
    with _open_group(problem, mesh=mesh) as group:

        def step(carry, turn, idx, w):
            idx = _turned(idx, turn, problem.num_experts)
            return layer(carry, idx, w, group=group) * 0.25

        body = jax.checkpoint(step) if remat else step

        def on_rank(x, idx, w):
            def run(x):
                return jax.lax.scan(lambda c, turn: (body(c, turn, idx, w), None), x, turns)[0]

            out, vjp = jax.vjp(run, x)
            return out, vjp(out)[0]

        turns = jnp.arange(4, dtype=jnp.int32)
        return over_ranks(group, on_rank)(*place(mesh, *_tokens(problem)))


def _choose(how: str, turn: Any, branches: list[Callable], x: jax.Array) -> jax.Array:
    """One of three branches by the turn; "python": of a turn that is a number already."""
    number = turn % 3
    if how == "python":
        return branches[number](x)
    if how == "switch":
        return jax.lax.switch(number, branches, x)

    def others(x):
        return jax.lax.cond(number == 1, branches[1], branches[2], x)

    return jax.lax.cond(number == 0, branches[0], others, x)


def chosen(mesh: Mesh, problem: EpProblem, how: str) -> Any:
    """Value and gradient of x through branches with and without an exchange, for six turns.

    All ranks choose alike, as they must, by a number that only the running program knows: once, and
    in a loop. With "cond" and "switch" all turns are launches of one program.
    """
    with _open_group(problem, mesh=mesh) as group:

        def on_rank(turn, x, idx, w):
            def exchange(shift, x):
                return layer(x, _turned(idx, shift, problem.num_experts), w, group=group) * 0.25

            branches = [functools.partial(exchange, shift) for shift in (0, 1)]
            branches.append(lambda x: x * 0.5)

            def in_loop(x):
                if how == "python":
                    for offset in range(3):
                        x = _choose(how, turn + offset, branches, x)
                    return x

                def step(x, offset):
                    return _choose(how, turn + offset, branches, x), None

                return jax.lax.scan(step, x, jnp.arange(3, dtype=jnp.int32))[0]

            out, vjp = jax.vjp(lambda x: in_loop(_choose(how, turn, branches, x)), x)
            return out, vjp(out)[0]

        tokens = place(mesh, *_tokens(problem))
        if how == "python":
            programs = [over_ranks(group, functools.partial(on_rank, turn)) for turn in range(6)]
            return [program(*tokens) for program in programs]
        run = over_ranks(group, on_rank)
        numbers = place(mesh, *(np.full(problem.num_ranks, turn, np.int32) for turn in range(6)))
        return [run(number, *tokens) for number in numbers]


def gradients(mesh: Mesh, problem: EpProblem) -> Any:
    """The layer's value and gradient of x, defined to the bit; and of the weights, which is not."""
    with _open_group(problem, mesh=mesh) as group:

        def on_rank(x, idx, w):
            out, vjp = jax.vjp(lambda x, w: layer(x, idx, w, group=group), x, w)
            return (out, *vjp(out))

        out, x_bar, w_bar = over_ranks(group, on_rank)(*place(mesh, *_tokens(problem)))
        return {"exact": (out, x_bar), "close": w_bar}


def moe(mesh: Mesh, problem: EpProblem) -> Any:
    """The MoE block and all of its gradients: matrix products, whose bits are not defined."""
    with _open_group(problem, mesh=mesh) as group:

        def on_rank(x, idx, w, *experts):
            def run(x, w, experts):
                return jax_ep.moe(x, idx, w, *experts, group=group)

            out, vjp = jax.vjp(run, x, w, experts)
            return out, vjp(out)

        args = *_tokens(problem), *by_rank(problem, weights_of(problem))
        with jax.default_matmul_precision("highest"):
            return {"exact": (), "close": over_ranks(group, on_rank)(*place(mesh, *args))}


def two_groups(mesh: Mesh, problem: EpProblem) -> Any:
    """Two groups of different layouts, whose operations take turns in one program."""
    other = problem.replace(layout="rank", hidden=problem.hidden * 2)
    with _open_group(problem, mesh=mesh) as one, _open_group(other, mesh=mesh) as two:

        def on_rank(x, idx, w):
            wide = jnp.concatenate([x, -x], axis=1)
            first = jax_ep.dispatch(x, idx, w, group=one)
            second = jax_ep.dispatch(wide, idx, w, group=two)
            back = jax_ep.combine(second.x, second.handle, second.weights, group=two)
            return jax_ep.combine(first.x, first.handle, first.weights, group=one), back

        return over_ranks(one, on_rank)(*place(mesh, *_tokens(problem)))


def on_collective_stream(mesh: Mesh, problem: EpProblem) -> Any:
    """The layer and its gradient with all calls on XLA's collective stream, beside a product."""
    # The library leaves the choice of a stream to its users, so only tests know how to make it.
    from jax.experimental.compute_on import compute_on  # noqa: TID251

    aside = functools.partial(
        compute_on, compute_type="gpu_stream:collective", out_memory_spaces=jax.memory.Space.Device
    )
    with _open_group(problem, mesh=mesh) as group:

        def on_rank(x, idx, w):
            out, vjp = jax.vjp(lambda x: layer(x, idx, w, group=group, around=aside), x)
            return out, vjp(out)[0], jnp.sign(x) * 2

        return over_ranks(group, on_rank)(*place(mesh, *_tokens(problem)))


def beside_collectives(mesh: Mesh, problem: EpProblem, backend: str = "ffi") -> Any:
    """Two layers, with XLA's collectives before, between and after them, and their gradients.

    Ranks share a scale, as data parallelism shares parameters: its gradient is a psum. Besides, a
    psum and an all-gather that no exchange waits for, and that wait for none.
    """
    with make_group(problem, backend, mesh=mesh, timeout=_TIMEOUT_S) as group:
        axis = group.axis_names

        def on_rank(x, idx, w, scale):
            def run(x, scale):
                first = layer(x * jax.lax.pmean(scale, axis), idx, w, group=group)
                second = _turned(idx, 1, problem.num_experts)
                return layer(first - jax.lax.pmean(first, axis), second, w, group=group)

            out, vjp = jax.vjp(run, x, scale)
            x_bar, scale_bar = vjp(out)
            aside = jax.lax.psum(x * 3, axis), jax.lax.all_gather(idx, axis)
            return out, x_bar, jax.lax.psum(scale_bar, axis), aside

        scale = np.linspace(0.5, 1.5, problem.num_ranks * problem.hidden, dtype=np.float32)
        scale = scale.reshape(problem.num_ranks, 1, problem.hidden)
        args = place(mesh, *_tokens(problem), scale)
        *close, (summed, gathered) = over_ranks(group, on_rank)(*args)
        return {"exact": gathered, "close": (*close, summed)}


# --- many turns, each checked where it ran -----------------------------------------------------


def turn_routing(problem: EpProblem, rank: Any, turn: Any, xp: Any) -> Any:
    """`topk_idx` `[T, K]` of a rank in a turn, by NumPy or JAX; a part of it masked."""
    token = xp.arange(problem.num_tokens, dtype=xp.uint32)[:, None]
    k = xp.arange(problem.num_topk, dtype=xp.uint32)[None, :]
    rank = xp.asarray(rank, xp.uint32).reshape(1, 1)
    turn = xp.asarray(turn, xp.uint32).reshape(1, 1)
    seed = token * xp.uint32(0x9E3779B1) + rank * xp.uint32(0x85EBCA77)
    seed = seed + turn * xp.uint32(0xC2B2AE3D)
    seed = (seed ^ (seed >> 15)) * xp.uint32(0x27D4EB2F)
    seed = seed ^ (seed >> 13)
    # In every third turn few experts are popular. Odd strides: all of a token's experts differ.
    is_skewed = turn % 3 == 0
    first = xp.where(is_skewed, seed & 3, seed)
    stride = xp.where(is_skewed, xp.ones_like(seed), (seed >> 16) * 2 + 1)
    experts = (first + k * stride) % xp.uint32(problem.num_experts)
    masked = ((seed >> 8) + k) % 7 == 0
    return xp.where(masked, -1, experts.astype(xp.int32))


def turn_payload(problem: EpProblem, number: Any, turn: Any, xp: Any) -> Any:
    """Rows `[N, H]` of tokens in a turn: whole numbers up to 250, so that sums are exact."""
    column = xp.arange(problem.hidden, dtype=xp.int32)[None, :]
    return ((number[:, None] * 31 + column * 7 + turn * 5) % 251).astype(problem.np_dtype)


def _checked_turn(problem: EpProblem, group: jax_ep.EpGroup, turn: jax.Array) -> Any:
    """An exchange of one rank; how much of it is wrong, and what it was."""
    rank = jax.lax.axis_index(group.axis_names)
    own = rank * problem.num_tokens + jnp.arange(problem.num_tokens, dtype=jnp.int32)
    x = turn_payload(problem, own, turn, jnp)
    idx = turn_routing(problem, rank, turn, jnp)
    received = jax_ep.dispatch(x, idx, group=group)
    source = received.handle.row_source
    sent = turn_payload(problem, jnp.maximum(source, 0), turn, jnp)
    sent = jnp.where(source[:, None] >= 0, sent, jnp.zeros((), x.dtype))
    row = jnp.arange(source.shape[0])
    ends = jnp.cumsum(received.group_sizes)
    local = jnp.sum(row[:, None] >= ends[None, :], axis=1).astype(jnp.int32)
    factor = (1 + local + rank * group.num_local_experts).astype(x.dtype)
    out = jax_ep.combine(received.x * factor[:, None], received.handle, group=group)
    want = x * jnp.sum(jnp.where(idx >= 0, idx + 1, 0), axis=1, keepdims=True).astype(x.dtype)
    wrong = jnp.sum(received.x != sent, dtype=jnp.int32) + jnp.sum(out != want, dtype=jnp.int32)
    return wrong, (idx, received.handle.slot, source, received.x, out)


def turns_program(group: jax_ep.EpGroup, problem: EpProblem, turns_each: int) -> Callable:
    """A program of `turns_each` turns, for the first turn's number of each rank, `[R]`.

    It returns how many elements were wrong in all turns, and the last turn's routing, slots,
    sources of rows, rows and sums. With `low_latency_tokens`, a turn has a second exchange, of so
    few tokens.
    """
    small = problem.replace(num_tokens=problem.low_latency_tokens or 0)
    if small.num_tokens > 0:
        check_kernels(group, problem)
        check_kernels(group, small)

    def one(turn):
        wrong, last = _checked_turn(problem, group, turn)
        if small.num_tokens > 0:  # by the other kernels, by turns
            wrong = wrong + _checked_turn(small, group, turn)[0]
        return wrong, last

    def on_rank(first):
        def step(carry, turn):
            wrong, last = one(turn)
            return (carry[0] + wrong, last), None

        start = one(first)
        later = first + 1 + jnp.arange(turns_each - 1, dtype=jnp.int32)
        return jax.lax.scan(step, start, later)[0]

    return over_ranks(group, on_rank)


def turns(mesh: Mesh, problem: EpProblem, rounds: int, turns_each: int) -> Any:
    """Runs a program of `turns_each` turns `rounds` times; each time's results."""
    with _open_group(problem, mesh=mesh) as group:
        run = turns_program(group, problem, turns_each)
        results = []
        for index in range(rounds):
            first = np.full(problem.num_ranks, index * turns_each, np.int32)
            results.append(jax.block_until_ready(run(*place(mesh, first))))
        return results


def launches(mesh: Mesh, problem: EpProblem, count: int) -> Any:
    """`count` launches of one program of one turn, all checked: `[]`, the wrong elements."""
    with _open_group(problem, mesh=mesh) as group:

        def on_rank(turn, total):
            wrong, _ = _checked_turn(problem, group, turn)
            return turn + 1, total + wrong

        run = over_ranks(group, on_rank)
        state = place(mesh, *2 * [np.zeros(problem.num_ranks, np.int32)])
        for _ in range(count):
            state = run(*state)
        return jax.block_until_ready(state)
