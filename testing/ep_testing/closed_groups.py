# SPDX-License-Identifier: Apache-2.0
"""What a program does whose group has been closed, as each process sees it."""

import functools
import gc
import logging
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ep_testing.problems import EpProblem
from ep_testing.programs import make_group, over_ranks
from ep_testing.rank_programs import layer, place
from jax_ep._src import compat

# By then XLA replays its graphs without asking the handlers.
_CALLS = 30


class Records(logging.Handler):
    """Keeps what the library logs: level and message."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[str, str]] = []
        logging.getLogger("jax_ep").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append((record.levelname, record.getMessage()))


def _three_layers(group):
    """A program with enough of our calls for a graph, `[R, T, H]` in and out."""

    def on_rank(x, idx, w):
        for _ in range(3):
            x = layer(x, idx, w, group=group) * 0.5
        return x

    return over_ranks(group, on_rank)


def _run(program, tokens) -> np.ndarray:
    """The parts of the result that are here."""
    out = jax.block_until_ready(program(*tokens))
    return np.stack([np.asarray(shard.data)[0] for shard in out.addressable_shards])


def _tokens(mesh: Mesh, problem: EpProblem) -> list[jax.Array]:
    x = np.ones((problem.num_ranks, problem.num_tokens, problem.hidden), problem.np_dtype)
    return place(mesh, x, problem.topk_idx, problem.topk_weights)


def called_after_close(mesh: Mesh, problem: EpProblem, with_new_group: bool) -> dict[str, Any]:
    """Calls a program often, closes its group, and calls it once more.

    Args:
        mesh: of one device a rank.
        problem: of the exchanges.
        with_new_group: whether a group of the same sizes is made, and used, before the last call.

    Returns:
        `name`: of the closed group; `error`: what JAX raised in the last call, None if nothing;
        `all_nan`: whether its result held nothing but NaN; `log`: what the library logged; `alive`:
        that the GPU still computes; `new_is_right`: that a new group then gives what the closed one
        had given.
    """
    records = Records()
    tokens = _tokens(mesh, problem)
    group = make_group(problem, "ffi", mesh=mesh, timeout=60.0)
    run = _three_layers(group)
    for _ in range(_CALLS):
        first = _run(run, tokens)
    group.close()
    gc.collect()
    new = None
    if with_new_group:
        new = make_group(problem, "ffi", mesh=mesh, timeout=60.0)
        run_new = _three_layers(new)
        for _ in range(_CALLS):
            _run(run_new, tokens)
    error, all_nan = None, None
    try:
        all_nan = bool(np.isnan(_run(run, tokens).astype(np.float32)).all())
    except jax.errors.JaxRuntimeError as e:
        error = str(e)
    alive = float(jax.jit(jnp.sum)(jnp.ones(8, jnp.float32))) == 8.0
    if new is None:
        new = make_group(problem, "ffi", mesh=mesh, timeout=60.0)
        run_new = _three_layers(new)
    right = np.array_equal(_run(run_new, tokens), first)
    new.close()  # looks at the records
    return {
        "name": group.name,
        "error": error,
        "all_nan": all_nan,
        "log": records.lines,
        "alive": alive,
        "new_is_right": right,
    }


def late_but_in_time(
    mesh: Mesh, problem: EpProblem, victim: int, delay: float, warn_after: float
) -> dict[str, Any]:
    """One process sleeps before its exchange; the others are warned, and then get their results."""
    records = Records()
    tokens = _tokens(mesh, problem)
    with make_group(problem, "ffi", mesh=mesh, warn_after=warn_after, timeout=120.0) as group:
        run = over_ranks(group, functools.partial(layer, group=group))
        want = _run(run, tokens)
        compat.coordination_client().wait_at_barrier("ready", 60_000)
        if jax.process_index() == victim:
            time.sleep(delay)
            got = _run(run, tokens)
            health = group.health()
        else:
            out = run(*tokens)
            time.sleep(delay / 2)
            health = group.health()
            jax.block_until_ready(out)
            got = np.stack([np.asarray(s.data)[0] for s in out.addressable_shards])
        time.sleep(1.0)  # for the watch
    return {"log": records.lines, "right": np.array_equal(got, want), "health": health}
