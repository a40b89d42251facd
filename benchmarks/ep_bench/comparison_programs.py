# SPDX-License-Identifier: Apache-2.0
"""What ranks on GPUs of their own run and time beside our operations: all with XLA's collectives.

Every process runs every program equally often, or a collective would wait for ever: how often is
decided by sizes alone, never by a clock.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jax_ep
from ep_bench.bytes_moved import chain_length
from ep_bench.cases import FP8, HIDDEN, NUM_TOPK, GpuCase
from ep_bench.checks import Expected
from ep_bench.operation_programs import last_of, samples_of
from ep_bench.variants import AXIS, open_variant

COPIES = 10  # of one sample


def _place(mesh: Mesh, shape: tuple[int, ...], of_rank: Callable[[int], np.ndarray]) -> jax.Array:
    """An array over all ranks, whose equal parts are `of_rank(rank)`."""
    size = shape[0] // mesh.size
    return jax.make_array_from_callback(
        shape,
        NamedSharding(mesh, PartitionSpec(AXIS)),
        lambda index: of_rank((index[0].start or 0) // size),
    )


def _parts(array: jax.Array, num_ranks: int) -> Iterator[tuple[int, np.ndarray]]:
    """This process's ranks, each with its part of an array."""
    size = array.shape[0] // num_ranks
    for shard in array.addressable_shards:
        yield (shard.index[0].start or 0) // size, np.asarray(shard.data)


def _mapped(mesh: Mesh, f: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    spec = PartitionSpec(AXIS)
    return jax.jit(jax.shard_map(f, mesh=mesh, in_specs=spec, out_specs=spec))


def _meeting(mesh: Mesh) -> Callable[[], jax.Array]:
    """Its result is there when all ranks have come."""
    ones = _place(mesh, (mesh.size,), lambda _: np.ones(1, np.int32))
    return functools.partial(_mapped(mesh, lambda a: a + jax.lax.psum(a, AXIS)), ones)


# --- links -------------------------------------------------------------------------------------


def _message(size: int, rank: int) -> np.ndarray:
    return np.arange(size, dtype=np.int32) * 3 + rank


def measure_links(mesh: Mesh, num_bytes: int, num_samples: int) -> dict[str, np.ndarray]:
    """Bytes per second from one rank to another, as this process sees them; what came is checked.

    "ring": by ppermute, every rank to the next, all at once. "pair": by ppermute, rank 0 to rank 1
    alone. "device_put": the same by `jax.device_put`, where one process has both devices.

    Raises:
        AssertionError: not what was sent.
    """
    num_ranks, size = mesh.size, num_bytes // 4
    source = _place(mesh, (num_ranks * size,), functools.partial(_message, size))
    meet = _meeting(mesh)
    copies: dict[str, Callable[[], jax.Array]] = {}
    for name, pairs in {
        "ring": [(rank, (rank + 1) % num_ranks) for rank in range(num_ranks)],
        "pair": [(0, 1)],
    }.items():
        move = _mapped(mesh, functools.partial(jax.lax.ppermute, axis_name=AXIS, perm=pairs))
        copies[name] = functools.partial(move, source)
        from_rank = {there: here for here, there in pairs}
        for rank, part in _parts(copies[name](), num_ranks):
            if rank in from_rank:
                np.testing.assert_array_equal(part, _message(size, from_rank[rank]), name)
    if jax.process_count() == 1:
        first, second = mesh.devices.flat[:2]
        local = jax.device_put(_message(size, 0), first)
        copies["device_put"] = functools.partial(jax.device_put, local, second)
        np.testing.assert_array_equal(copies["device_put"](), _message(size, 0))
    return {
        name: num_bytes
        / samples_of(functools.partial(last_of, COPIES, copy), meet, num_samples, COPIES)
        for name, copy in copies.items()
    }


# --- there and back ----------------------------------------------------------------------------


@functools.lru_cache(maxsize=16)
def _tokens(rank: int, num_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """A rank's `x` `[T, H]` and `topk_weights` `[T, K]`."""
    rng = np.random.default_rng([2, rank])
    weights = rng.uniform(0.1, 1.0, (num_tokens, NUM_TOPK)).astype(np.float32)
    x = rng.standard_normal((num_tokens, HIDDEN), np.float32)
    return x.astype(jnp.bfloat16), weights / weights.sum(axis=1, keepdims=True)


def _arguments(mesh: Mesh, case: GpuCase) -> tuple[jax.Array, ...]:
    """Of `Variant.compile`'s function; the last is used by gradients alone, which none takes."""
    total = case.num_ranks * case.num_tokens

    def of(index: int) -> Callable[[int], np.ndarray]:
        return lambda rank: _tokens(rank, case.num_tokens)[index]

    x, weights = (
        _place(mesh, (total, columns), of(i)) for i, columns in enumerate((HIDDEN, NUM_TOPK))
    )
    idx = _place(mesh, (total, NUM_TOPK), lambda rank: case.topk_idx[rank])
    return x, idx, weights, weights


def _worst(key: str, case: GpuCase, out: jax.Array) -> float:
    """Checks this process's ranks' tokens in every element; see `Expected.check`."""
    worst = 0.0
    for rank, part in _parts(out, case.num_ranks):
        expected = Expected.of_outputs(
            *_tokens(rank, case.num_tokens),
            "bfloat16",
            case.num_ranks,
            fp8_wire=case.wire_dtype == FP8,
        )
        found = expected.check(f"{key}, rank {rank}", ["out"], [part.astype(np.float64)])
        worst = max(worst, found)
    return worst


def compare(
    mesh: Mesh, case: GpuCase, keys: Sequence[str], num_samples: int, num_calls: int | None
) -> dict[str, Any]:
    """Dispatch, identity experts and combine, each way to do that: checked, then timed.

    Args:
        mesh: of the ranks.
        case: sizes and routing.
        keys: of `variants.COMPARED`.
        num_samples: of each.
        num_calls: of a sample, started without waiting; None: about 10 ms of them. CPU devices come
            to a standstill with hundreds.

    Returns:
        "seconds": key -> `[num_samples]`, as this process sees them. "error_of_allowed": key ->
        the largest difference from what is expected, as a fraction of what is allowed.

    Raises:
        WrongResultError: a result is wrong.
    """
    args, meet = _arguments(mesh, case), _meeting(mesh)
    found: dict[str, Any] = {"seconds": {}, "error_of_allowed": {}}
    for key in keys:
        of_key = dataclasses.replace(case, wire_dtype=FP8 if key == "ours_fp8" else None)
        config = jax_ep.EpConfig(**of_key.config_kwargs())
        variant_key = "ours" if key == "ours_fp8" else key
        with open_variant(variant_key, of_key, config, mesh, "ffi") as variant:
            run = functools.partial(variant.compile(with_gradient=False), *args)
            found["error_of_allowed"][key] = _worst(key, of_key, run())
            length = num_calls or chain_length("combine", case)
            repeated = functools.partial(last_of, length, run)
            found["seconds"][key] = samples_of(repeated, meet, num_samples, length)
    return found
