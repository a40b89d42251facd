# SPDX-License-Identifier: Apache-2.0
"""One layer of DeepSeek-V3: 256 experts, 8 of them for each of 4096 tokens a rank, 7168 channels.

The rows of all ranks would be gigabytes, so that no process makes all of them. Each rank compares
all of its rows on its GPU with what they must hold; the oracle gets some columns and tokens.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import Mesh

import jax_ep
from ep_testing import assertions
from ep_testing.programs import over_ranks
from ep_testing.rank_programs import place
from jax_ep import reference

TOKENS, HIDDEN, TOPK, EXPERTS = 4096, 7168, 8, 256
# The first and the last 128: whole blocks of the FP8 wire.
_COLUMNS = np.r_[:128, HIDDEN - 128 : HIDDEN]
_EVERY = 16  # token that the oracle sums up


def config(layout: str, wire_dtype: str | None) -> jax_ep.EpConfig:
    """Of the layer; a quarter more rows than even routing needs in layout "expert"."""
    base = jax_ep.EpConfig(
        num_experts=EXPERTS,
        num_topk=TOPK,
        hidden=HIDDEN,
        max_tokens_per_rank=TOKENS,
        wire_dtype=wire_dtype,
        layout=layout,
    )
    return base.with_capacity_factor(1.25) if layout == "expert" else base


def routing(num_ranks: int) -> tuple[np.ndarray, np.ndarray]:
    """`topk_idx` and `topk_weights`, `[R, T, K]`."""
    rng = np.random.default_rng(0)
    scores = rng.random((num_ranks, TOKENS, EXPERTS), np.float32)
    idx = np.argpartition(scores, TOPK, axis=-1)[..., :TOPK].astype(np.int32)
    return idx, rng.uniform(0.05, 1.0, idx.shape).astype(np.float32)


def _payload(number: Any, column: Any, xp: Any) -> Any:
    """Rows of tokens, in sixteenths from -8 to 7.94: exact in bfloat16."""
    mixed = (number[:, None] + 1) * xp.uint32(0x9E3779B1) ^ column[None, :] * xp.uint32(0x85EBCA77)
    mixed = (mixed ^ (mixed >> 15)) * xp.uint32(0x27D4EB2F)
    whole = (mixed >> 24).astype(xp.int32) - 128
    return (whole.astype(xp.float32) / 16).astype(ml_dtypes.bfloat16)


def run(mesh: Mesh, layout: str, wire_dtype: str | None) -> dict[str, Any]:
    """An exchange: how many elements of rows are wrong (without FP8), and parts of the results."""
    shape = config(layout, wire_dtype)
    with jax_ep.EpGroup(mesh, "expert", shape, backend="ffi") as group:

        def on_rank(idx, w):
            rank = jax.lax.axis_index("expert").astype(jnp.uint32)
            column = jnp.arange(HIDDEN, dtype=jnp.uint32)
            own = rank * TOKENS + jnp.arange(TOKENS, dtype=jnp.uint32)
            received = jax_ep.dispatch(_payload(own, column, jnp), idx, w, group=group)
            source = received.handle.row_source
            sent = _payload(jnp.maximum(source, 0).astype(jnp.uint32), column, jnp)
            sent = jnp.where(source[:, None] >= 0, sent, jnp.zeros((), sent.dtype))
            out = jax_ep.combine(received.x, received.handle, received.weights, group=group)
            return {
                "wrong": jnp.sum(received.x != sent, dtype=jnp.int32),
                "slot": received.handle.slot,
                "row_source": source,
                "group_sizes": received.group_sizes,
                "weights": received.weights,
                "rows": received.x[:, _COLUMNS],
                "out": out[::_EVERY, _COLUMNS],
            }

        return over_ranks(group, on_rank)(*place(mesh, *routing(mesh.size)))


def check(got: dict[str, np.ndarray], layout: str, wire_dtype: str | None) -> None:
    """Compares all ranks' results with the oracle's."""
    num_ranks = len(got["wrong"])
    idx, weights = routing(num_ranks)
    number = np.arange(num_ranks * TOKENS, dtype=np.uint32)
    x = _payload(number, _COLUMNS.astype(np.uint32), np).reshape(num_ranks, TOKENS, -1)
    want = reference.dispatch(
        x,
        idx,
        weights,
        num_experts=EXPERTS,
        layout=layout,
        capacity_factor=config(layout, wire_dtype).capacity_factor,
        dtype=ml_dtypes.bfloat16,
        wire_dtype=wire_dtype,
    )
    for name, values in (
        ("slot", want.plan.slot),
        ("row_source", want.plan.row_source),
        ("group_sizes", want.group_sizes),
        ("weights", want.weights),
    ):
        np.testing.assert_array_equal(got[name], values, name)
    if wire_dtype is None:
        np.testing.assert_array_equal(got["wrong"], 0, "elements of rows")
    np.testing.assert_array_equal(assertions.bits(got["rows"]), assertions.bits(want.x), "rows")
    some = {f: getattr(want.plan, f)[:, ::_EVERY] for f in ("topk_idx", "slot")}
    plan = dataclasses.replace(want.plan, **some)
    sums = reference.combine(want.x, plan, want.weights, dtype=ml_dtypes.bfloat16)
    np.testing.assert_array_equal(assertions.bits(got["out"]), assertions.bits(sums), "sums")
