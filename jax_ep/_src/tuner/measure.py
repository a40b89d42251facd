# SPDX-License-Identifier: Apache-2.0
"""Runs and times the operations of a group on this process's GPUs, launched as a candidate says.

An operation is timed in a chain: one program runs it many times, each time when the result of the
time before is there. Candidates share the program, and so it must not be in CUDA graphs, which keep
the launches that they were recorded with.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jax_ep._src import api
from jax_ep._src.groups.group import EpGroup, backend_group
from jax_ep._src.tuning.launches import TunedLaunch, Tuning
from jax_ep._src.tuning.table import Choice

NO_GRAPHS = "--xla_gpu_enable_command_buffer="
ROUTINGS = ("uniform", "zipf", "one_hot")


def routing(name: str, num_ranks: int, num_tokens: int, num_topk: int, num_experts: int) -> Any:
    """`topk_idx` `[R, T, K]` int32 of a kind in `ROUTINGS`.

    "uniform": all experts alike. "zipf": the expert of place i with probability 1 / i. "one_hot":
    all tokens choose the same experts, those of the first ranks.
    """
    rng = np.random.default_rng([7, num_tokens])
    shape = (num_ranks * num_tokens, num_experts)
    if name == "one_hot":
        chosen = np.broadcast_to(np.arange(num_topk), (shape[0], num_topk))
    else:
        weights = 1 / np.arange(1, num_experts + 1) if name == "zipf" else np.ones(num_experts)
        noise = rng.gumbel(size=shape).astype(np.float32)
        chosen = np.argpartition(-(noise + np.log(weights)), num_topk - 1, axis=1)[:, :num_topk]
    return np.ascontiguousarray(chosen, np.int32).reshape(num_ranks, num_tokens, num_topk)


class GroupPrograms:
    """The programs of a group, and arguments for them."""

    def __init__(self, group: EpGroup) -> None:
        """Compiles nothing yet.

        Args:
            group: of GPUs of this process; made with `tuning="off"`.
        """
        self.group = group
        self._prepare = self._mapped(_prepare)
        self._jitted: dict[Any, Callable[..., Any]] = {}
        self._prepared: tuple[int, dict[str, Any]] = (0, {})

    def _mapped(self, f: Callable[..., Any]) -> Callable[..., Any]:
        spec = PartitionSpec(self.group.axis_name)
        f = functools.partial(f, group=self.group)
        return jax.jit(jax.shard_map(f, mesh=self.group.mesh, in_specs=spec, out_specs=spec))

    def hashes(self, op: str) -> Callable[[Any], Any]:
        """Hashes of an operation's results, on each rank."""
        return self._kept(op, functools.partial(_hashes, step=_STEPS[op]))

    def chain(self, op: str, length: int) -> Callable[[Any], Any]:
        """`length` times an operation."""
        chained = functools.partial(_chained, step=_STEPS[op], length=length)
        return self._kept((op, length), chained)

    def _kept(self, key: Any, f: Callable[..., Any]) -> Callable[..., Any]:
        if key not in self._jitted:
            self._jitted[key] = self._mapped(f)
        return self._jitted[key]

    def arguments(self, num_tokens: int) -> dict[str, Any]:
        """Of the operations, by routing; of the last number of tokens they are kept."""
        if self._prepared[0] != num_tokens:
            self._prepared = (0, {})  # gives memory back
            self._prepared = (num_tokens, {name: self._make(name, num_tokens) for name in ROUTINGS})
        return self._prepared[1]

    def _make(self, name: str, num_tokens: int) -> Any:
        group, config = self.group, self.group.config
        idx = routing(name, group.num_ranks, num_tokens, config.num_topk, config.num_experts)
        sharding = NamedSharding(group.mesh, PartitionSpec(group.axis_name))
        return self._prepare(jax.device_put(idx.reshape(-1, config.num_topk), sharding))


class GroupMeasure:
    """A `search.Measure` of one operation of a group, at one number of tokens."""

    def __init__(self, programs: GroupPrograms, op: str, path: str, num_tokens: int) -> None:
        """Runs it once with each routing, launched as the model says.

        Args:
            programs: of the group.
            op: "dispatch" or "combine".
            path: of the kernels that serve the group's calls of so many tokens.
            num_tokens: of each rank.
        """
        self._group = programs.group
        self._call: dict[str, Any] = {"op": op, "path": path}
        self._num_tokens = num_tokens
        self._launch(Choice())
        self._arguments = programs.arguments(num_tokens)
        self._hashes = programs.hashes(op)
        # About 3 ms, by a guess from the size alone.
        self._length = int(np.clip(3000 / (15 + 0.1 * num_tokens), 4, 96))
        self._chain = programs.chain(op, self._length)
        self._expected = {name: self._bits(name) for name in ROUTINGS}

    def _bits(self, name: str) -> list[bytes]:
        found = self._hashes(self._arguments[name])
        return [np.asarray(hashed).tobytes() for hashed in jax.tree.leaves(found)]

    def _launch(self, choice: Choice) -> None:
        tokens = 1 << (self._num_tokens - 1).bit_length()
        launch = TunedLaunch(num_tokens=tokens, **self._call, **dataclasses.asdict(choice))
        backend: Any = backend_group(self._group)
        backend.set_launches(Tuning(launches=(launch,)))

    def check(self, choice: Choice) -> bool:
        """Whether results on three routings are, bit by bit, those of the model's choice."""
        self._launch(choice)
        return all(self._bits(name) == self._expected[name] for name in ROUTINGS)

    def seconds(
        self, choices: Sequence[Choice], num_samples: int, routing_name: str = "uniform"
    ) -> list[list[float]]:
        """Seconds of one operation, of the slowest rank; samples of all choices in turns."""
        samples: list[list[float]] = [[] for _ in choices]
        for i in range(num_samples + 1):
            for choice, found in zip(choices, samples, strict=True):
                self._launch(choice)
                start = time.perf_counter()
                jax.block_until_ready(self._chain(self._arguments[routing_name]))
                if i > 0:  # the first round warms up
                    found.append((time.perf_counter() - start) / self._length)
        return samples


def _prepare(idx: jax.Array, *, group: EpGroup) -> Any:
    config = group.config
    key = jax.random.fold_in(jax.random.key(0), jax.lax.axis_index(group.axis_names))
    x = jax.random.normal(key, (idx.shape[0], config.hidden), config.dtype)
    weights = jax.random.uniform(jax.random.fold_in(key, 1), idx.shape, jnp.float32, 0.1)
    received = api.dispatch(x, idx, weights, group=group)
    # Rows without a token may hold anything.
    has_token = received.handle.row_source[:, None] >= 0
    y = jax.random.normal(key, (has_token.shape[0], config.hidden), config.dtype)
    y = jnp.where(has_token, y, jnp.ones((), config.dtype))
    return {
        "x": x,
        "idx": idx,
        "w": weights,
        "y": y,
        "handle": received.handle,
        "row_weights": received.weights,
    }


def _dispatch(arguments: Any, *, group: EpGroup) -> Any:
    received = api.dispatch(arguments["x"], arguments["idx"], arguments["w"], group=group)
    # Rows without a token may hold anything, and are not compared.
    has_token = received.handle.row_source[:, None] >= 0
    rows = jax.tree.map(lambda a: jnp.where(has_token, a, jnp.zeros_like(a)), received.x)
    return {"first": received.weights, "rows": rows, "sizes": received.group_sizes}


def _combine(arguments: Any, *, group: EpGroup) -> Any:
    handle = arguments["handle"]
    out = api.combine(arguments["y"], handle, arguments["row_weights"], group=group)
    return {"first": out}


def _chained(arguments: Any, *, group: EpGroup, step: Callable[..., Any], length: int) -> Any:
    """`length` times an operation, each after the result of the one before; its last first number.

    Of what a step returns, only `first` is used, so that XLA drops what is for comparing alone.
    """

    def turn(last: Any, _: None) -> tuple[Any, None]:
        # 0, but XLA cannot know that: no result is so large.
        zero = (last.reshape(-1)[0].astype(jnp.float32) > 1e30).astype(jnp.int32)
        with_idx = arguments | {"idx": arguments["idx"] + zero}
        topk_idx = arguments["handle"].topk_idx + zero
        handle = dataclasses.replace(arguments["handle"], topk_idx=topk_idx)
        return _first(step(with_idx | {"handle": handle}, group=group)), None

    start = _first(step(arguments, group=group))
    return jax.lax.scan(turn, start, None, length=length - 1, unroll=8)[0]


def _first(results: Any) -> jax.Array:
    return jax.lax.slice_in_dim(results["first"].reshape(-1), 0, 1)


_STEPS: dict[str, Callable[..., Any]] = {"dispatch": _dispatch, "combine": _combine}


def _hashes(arguments: Any, *, group: EpGroup, step: Callable[..., Any]) -> Any:
    """Of each result two sums over its bits, times odd factors: a changed element changes them."""

    def of(a: jax.Array) -> jax.Array:
        word = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[a.dtype.itemsize]
        bits = jax.lax.bitcast_convert_type(a, word).astype(jnp.uint32).reshape(-1)
        factors = 2 * jnp.arange(bits.size, dtype=jnp.uint32) + 1
        return jnp.stack([jnp.sum(bits * factors), jnp.sum(bits * factors * factors)])

    return jax.tree.map(of, step(arguments, group=group))
