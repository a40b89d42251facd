# SPDX-License-Identifier: Apache-2.0
"""What each rank's process runs and times; alike in all of them.

An operation is timed in a chain: one program that runs it many times, each time on the same
arguments, but not before the result of the time before is there. The operations themselves keep the
ranks in step.
"""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Collection, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jax_ep
from ep_bench.bytes_moved import chain_length
from ep_bench.cases import HIDDEN, GpuCase
from ep_testing.programs import over_ranks

NUM_SAMPLES = 50
NUM_BASELINE_SAMPLES = 20
NUM_COPY_SAMPLES = 10
COPY_BYTES = 2**30
# Other ranks may be compiling.
_TIMEOUT_S = 100.0

# The first array of its result has an element.
Step = Callable[..., Any]


def _not_before(last: Any, args: Any, shape: tuple[int, ...]) -> Any:
    """`args` with one of their routing arrays `[T, K]` made to depend on `last`.

    0 is added to it, but XLA cannot know that: `last` holds no number so large.
    """
    first = jax.tree.leaves(last)[0].reshape(-1)[0]
    zero = (first.astype(jnp.float32) > 1e30).astype(jnp.int32)
    leaves, tree = jax.tree.flatten(args)
    chosen = next(i for i, a in enumerate(leaves) if (a.shape, a.dtype) == (shape, jnp.int32))
    leaves[chosen] = leaves[chosen] + zero
    return jax.tree.unflatten(tree, leaves)


# Turns in a loop's body: XLA makes CUDA graphs of a body's operations, and turns cost the host.
_UNROLL = 10


def chained(step: Step, shape: tuple[int, ...], length: int, args: Any) -> Any:
    """Runs `step(*args)` `length` times, one after another; its last result."""

    def turn(last: Any, _: None) -> tuple[Any, None]:
        return step(*_not_before(last, args, shape)), None

    return jax.lax.scan(turn, step(*args), None, length=length - 1, unroll=_UNROLL)[0]


@dataclasses.dataclass(frozen=True)
class Operation:
    """Something that is timed in a chain.

    Attributes:
        step: of one rank; it returns some of the results. What XLA works out itself, and could
            leave out, takes part in the first.
        arguments: of `step`, by their names in what `prepare` returns.
    """

    step: Step
    arguments: tuple[str, ...]


def operations(group: jax_ep.EpGroup) -> dict[str, Operation]:
    """All of them, by name."""

    def plan(*args: Any) -> jax.Array:
        return jax_ep.dispatch(*args, group=group).num_dropped

    def dispatch(*args: Any) -> jax.Array:
        return jax_ep.dispatch(*args, group=group).weights

    def combine(*args: Any) -> jax.Array:
        return jax_ep.combine(*args, group=group)[:1, :1]

    def there_and_back(*args: Any) -> jax.Array:
        received = jax_ep.dispatch(*args, group=group)
        return combine(received.x, received.handle, received.weights)

    def dispatch_vjp(vjp: Callable[..., Any], *rows_bar: jax.Array) -> jax.Array:
        _, weights_bar = vjp(rows_bar)
        return weights_bar

    def combine_vjp(vjp: Callable[..., Any], out_bar: jax.Array) -> jax.Array:
        y_bar, weights_bar = jax.lax.optimization_barrier(vjp(out_bar))
        return weights_bar.reshape(-1)[:1] + y_bar[0, :1].astype(weights_bar.dtype)

    def chain(idx: jax.Array) -> jax.Array:
        # Or XLA would make one kernel of several turns.
        return jax.lax.optimization_barrier(idx)

    return {
        "plan": Operation(plan, ("x", "idx", "w")),
        "dispatch": Operation(dispatch, ("x", "idx", "w")),
        "combine": Operation(combine, ("y", "handle", "row_weights")),
        "there_and_back": Operation(there_and_back, ("x", "idx", "w")),
        "dispatch_vjp": Operation(dispatch_vjp, ("dispatch_vjp", "y", "row_weights")),
        "combine_vjp": Operation(combine_vjp, ("combine_vjp", "x")),
        "chain": Operation(chain, ("idx",)),
    }


def prepare(idx: jax.Array, w: jax.Array, *, group: jax_ep.EpGroup) -> dict[str, Any]:
    """One rank's arguments of all operations, and their backward functions."""
    key = jax.random.fold_in(jax.random.key(0), jax.lax.axis_index(group.axis_names))
    x = jax.random.normal(key, (idx.shape[0], HIDDEN), group.config.dtype)

    def send(x: jax.Array, w: jax.Array) -> Any:
        received = jax_ep.dispatch(x, idx, w, group=group)
        return (received.x, received.weights), received.handle

    (rows, row_weights), dispatch_vjp, handle = jax.vjp(send, x, w, has_aux=True)
    # Rows without token may hold anything.
    y = jnp.where(handle.row_source[:, None] >= 0, rows, jnp.ones((), rows.dtype))
    bring = functools.partial(jax_ep.combine, group=group)
    _, combine_vjp = jax.vjp(lambda y, w: bring(y, handle, w), y, row_weights)
    return {
        "x": x,
        "idx": idx,
        "w": w,
        "y": y,
        "row_weights": row_weights,
        "handle": handle,
        "dispatch_vjp": dispatch_vjp,
        "combine_vjp": combine_vjp,
    }


def samples_of(
    run: Callable[[], Any], meet: Callable[[], Any], num_samples: int, length: int
) -> np.ndarray:
    """Seconds of one operation, `num_samples` times; ranks begin each sample together."""
    for _ in range(2):
        jax.block_until_ready(run())
    samples = np.empty(num_samples)
    for i in range(num_samples):
        jax.block_until_ready(meet())
        start = time.perf_counter()
        jax.block_until_ready(run())
        samples[i] = (time.perf_counter() - start) / length
    return samples


class _Exchange:
    """A group, one rank's arguments, and programs of them."""

    def __init__(self, mesh: Mesh, case: GpuCase, group: jax_ep.EpGroup) -> None:
        self.group = group
        self.routing_shape = case.topk_idx.shape[1:]
        weights = np.random.default_rng(1).uniform(0.05, 1.0, case.topk_idx.shape)
        sharding = NamedSharding(mesh, PartitionSpec("expert"))
        args = (
            jax.make_array_from_callback(a.shape, sharding, a.__getitem__)
            for a in (case.topk_idx, weights.astype(np.float32))
        )
        self.prepared = over_ranks(group, functools.partial(prepare, group=group))(*args)
        # Returns when all ranks have come.
        self.meet = self.chain("plan", 2)

    def chain(self, name: str, length: int) -> Callable[[], Any]:
        """A program of `length` times an operation, on its arguments."""
        op = operations(self.group)[name]
        run = over_ranks(self.group, self.chained(op, length))
        return functools.partial(run, *(self.prepared[key] for key in op.arguments))

    def chained(self, op: Operation, length: int) -> Step:
        """`length` times an operation, on one rank."""
        return lambda *args: chained(op.step, self.routing_shape, length, args)


@contextlib.contextmanager
def _opened(mesh: Mesh, case: GpuCase) -> Iterator[_Exchange]:
    config = jax_ep.EpConfig(**case.config_kwargs())
    with jax_ep.EpGroup(mesh, "expert", config, backend="ffi", timeout=_TIMEOUT_S) as group:
        yield _Exchange(mesh, case, group)


def measure(
    mesh: Mesh,
    case: GpuCase,
    *,
    only: Collection[str] | None = None,
    num_samples: int = NUM_SAMPLES,
) -> dict[str, np.ndarray]:
    """Seconds of one operation, `[num_samples]`, by name, as this rank sees them.

    Args:
        mesh: of the ranks.
        case: what to measure.
        only: names of operations; None: all of the case.
        num_samples: of each operation.
    """
    found = {}
    with _opened(mesh, case) as exchange:
        for name in case.operations:
            if only is not None and name not in only:
                continue
            length = chain_length(name, case)
            run = exchange.chain(name, length)
            found[name] = samples_of(run, exchange.meet, num_samples, length)
    return found


def last_of(count: int, run: Callable[[], Any]) -> Any:
    """Starts a program `count` times, each time without waiting; its last result."""
    for _ in range(count - 1):
        run()
    return run()


def measure_baselines(mesh: Mesh, case: GpuCase) -> dict[str, np.ndarray]:
    """The same rows moved within each rank by XLA alone, all ranks at once: seconds by name.

    "gather": `x[token]`, a row for each selection, in the order of experts. "segment_sum": back,
    by adding each row, times its weight, to its token. "gather_back": the same by gathering each
    token's K rows, which needs a list of them. Not chained, but started one after another.
    """

    def gather(x: jax.Array, token: jax.Array) -> jax.Array:
        return x.at[token].get(mode="promise_in_bounds")

    def segment_sum(rows: jax.Array, w: jax.Array, token: jax.Array) -> jax.Array:
        weighted = rows.astype(jnp.float32) * w[:, None]
        sums = jax.ops.segment_sum(weighted, token, case.num_tokens, mode="promise_in_bounds")
        return sums.astype(rows.dtype)

    def gather_back(rows: jax.Array, w: jax.Array, place_of: jax.Array) -> jax.Array:
        taken = rows.at[place_of].get(mode="promise_in_bounds").astype(jnp.float32)
        return jnp.sum(taken * w[:, :, None], axis=1).astype(rows.dtype)

    def arguments(x: jax.Array, idx: jax.Array, w: jax.Array) -> dict[str, tuple[jax.Array, ...]]:
        order = jnp.argsort(idx.reshape(-1), stable=True)
        token = (order // idx.shape[1]).astype(jnp.int32)
        place_of = jnp.argsort(order).reshape(idx.shape).astype(jnp.int32)
        rows = x[token]
        return {
            "gather": (x, token),
            "segment_sum": (rows, w.reshape(-1)[order], token),
            "gather_back": (rows, w, place_of),
        }

    found = {}
    with _opened(mesh, case) as exchange:
        own = (exchange.prepared[key] for key in ("x", "idx", "w"))
        args = over_ranks(exchange.group, arguments)(*own)
        length = chain_length("combine", case)
        for step in (gather, segment_sum, gather_back):
            once = functools.partial(over_ranks(exchange.group, step), *args[step.__name__])
            run = functools.partial(last_of, length, once)
            found[step.__name__] = samples_of(run, exchange.meet, NUM_BASELINE_SAMPLES, length)
    return found


def _copy_bandwidth(source: jax.Array) -> float:
    length = 10
    start = time.perf_counter()
    jax.block_until_ready(last_of(length, functools.partial(jnp.copy, source)))
    return 2 * source.nbytes * length / (time.perf_counter() - start)


def measure_copies(mesh: Mesh, case: GpuCase) -> dict[str, np.ndarray]:
    """Bytes per second, read and written, of large copies on this rank.

    "all" ranks copy at once; then "one" copies, and the others have nothing to do.
    """
    source = jnp.zeros(COPY_BYTES // 4, jnp.int32)
    _copy_bandwidth(source)
    at_once = np.empty(NUM_COPY_SAMPLES)
    with _opened(mesh, case) as exchange:
        for i in range(NUM_COPY_SAMPLES):
            jax.block_until_ready(exchange.meet())
            at_once[i] = _copy_bandwidth(source)
        jax.block_until_ready(exchange.meet())
    if jax.process_index() != 0:
        return {"all": at_once}
    return {"all": at_once, "one": np.array([_copy_bandwidth(source) for _ in at_once])}
