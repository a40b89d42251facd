# SPDX-License-Identifier: Apache-2.0
"""Exchanges in halves, as the ranks run them: see `rank_programs`."""

import functools
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

import jax_ep
from ep_testing import halves
from ep_testing.problems import EpProblem
from ep_testing.programs import make_group, over_ranks
from ep_testing.rank_programs import check_kernels, place

_open_group = functools.partial(make_group, backend="ffi", timeout=60.0)


def _bits_differ(a: Any, b: Any) -> jax.Array:
    """How many elements differ."""

    def bits(x: Any) -> jax.Array:
        x = jnp.asarray(x)
        return jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))

    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    differ = [jnp.sum(bits(x) != bits(y), dtype=jnp.int32) for x, y in pairs]
    return sum(differ, start=jnp.zeros((), jnp.int32))


def in_halves(mesh: Mesh, problem: EpProblem) -> Any:
    """An exchange in halves; and how many elements of it, of a scan that carries a flight, and of
    gradients differ from those in one piece. A program each: independent ones may not mix flights.
    """
    with _open_group(problem, mesh=mesh) as group:
        check_kernels(group, problem)

        def exchanged(x, idx, w):
            received, out = halves.in_halves(group, problem, x, idx, w)
            return received.x, received.handle.slot, received.handle.row_source, out

        def gradient(x, idx, w, *, halves_: bool):
            def run(x, w):
                return halves.block(group, x, idx, w, halves=halves_)

            out, vjp = jax.vjp(run, x, w)
            return out, vjp(out)

        args = place(mesh, problem.x, problem.topk_idx, problem.topk_weights)

        def on_ranks(f, *args, **kwargs):
            return jax.block_until_ready(over_ranks(group, functools.partial(f, **kwargs))(*args))

        differ = []
        pipeline = functools.partial(halves.pipeline, group)
        for f in (lambda *args, halves_: pipeline(*args, halves=halves_), gradient):
            results = [on_ranks(f, *args, halves_=halves_) for halves_ in (True, False)]
            differ.append(on_ranks(_bits_differ, *results))
        return on_ranks(exchanged, *args), differ


def product_between_halves(
    mesh: Mesh, problem: EpProblem, size: int, count: int, late_s: float, trace: str | None = None
) -> dict[str, Any]:
    """Matrix products on rank 0: alone, and while its flight waits for ranks that have not begun.

    Args:
        mesh: of ranks that have a process each.
        problem: of the exchange.
        size: of the matrices, in elements.
        count: products of either kind.
        late_s: how much later than rank 0 the others begin.
        trace: a folder for a profile of rank 0, or None.

    Returns:
        Seconds of each product `alone` and `between` halves; how many elements `differ` from an
        exchange of its own; and `early`, the seconds that rank 0 was ahead at the end of them.
    """
    is_first = jax.local_devices()[0] == mesh.devices.flat[0]
    with _open_group(problem, mesh=mesh) as group:
        start = over_ranks(group, functools.partial(jax_ep.dispatch_start, group=group))
        finish = over_ranks(group, lambda flight: jax_ep.dispatch_done(flight, group=group).x)
        args = place(mesh, problem.x, problem.topk_idx)
        product = _Product(size)
        product.seconds(1)  # compiles it
        want = finish(start(*args))
        jax.block_until_ready(want)
        begin, alone, between, early = time.monotonic(), [], [], 0.0
        if is_first:
            alone = product.seconds(count)
            flight = jax.block_until_ready(start(*args))
            between = product.seconds(count)
            early = begin + late_s - time.monotonic()
        else:
            time.sleep(late_s)
            flight = start(*args)
        differ = _bits_differ(*(a.addressable_shards[0].data for a in (finish(flight), want)))
        if trace is not None:
            _profile(pathlib.Path(trace) if is_first else None, start, finish, args)
        return {"alone": alone, "between": between, "differ": int(differ), "early": early}


class _Product:
    """A matrix product on this process's device."""

    def __init__(self, size: int) -> None:
        self._matrix = jax.device_put(np.ones((size, size), jnp.bfloat16), jax.local_devices()[0])
        self.run = functools.partial(jax.jit(lambda a: a @ a), self._matrix)

    def seconds(self, count: int) -> list[float]:
        """Of each of so many products."""
        seconds = []
        for _ in range(count):
            begin = time.perf_counter()
            jax.block_until_ready(self.run())
            seconds.append(time.perf_counter() - begin)
        return seconds


def _profile(folder: pathlib.Path | None, start: Any, finish: Any, args: Any) -> None:
    """Some exchanges; rank 0 has a product between the halves, and keeps a profile."""
    product = _Product(4096)
    product.seconds(1)
    jax.block_until_ready(finish(start(*args)))
    if folder is not None:
        jax.profiler.start_trace(folder, create_perfetto_trace=True)
    for _ in range(5):
        flight = start(*args)
        between = product.run() if folder is not None else None
        jax.block_until_ready((finish(flight), between))
    if folder is not None:
        jax.profiler.stop_trace()
