# SPDX-License-Identifier: Apache-2.0
"""What attention remembers of the sequences that are being written.

A *slot* is room for one sequence of up to `N` bytes. Every device has the same number of slots and
computes attention over its own alone: only the MoE layers exchange something. The room is
contiguous and there from the beginning; servers of large models page theirs.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moe_lm.attention import rotate


class Rows(NamedTuple):
    """Rows of bytes that a step reads: `rows` of them on each of `D` devices.

    Attributes:
        tokens: `[D, rows, S]` int32.
        slot: `[D, rows]` int32, of the device; distinct where `length` is not 0. A step with as
            many rows as slots has row `i` for slot `i`.
        start: `[D, rows]` int32: the position of the first byte.
        length: `[D, rows]` int32: bytes that count, 0 for a row without a sequence.
    """

    tokens: jax.Array
    slot: jax.Array
    start: jax.Array
    length: jax.Array

    def is_token(self) -> jax.Array:
        """`[D, rows, S]` bool: False for what only fills rows up."""
        return self._number() < self.length[..., None]

    def is_last(self) -> jax.Array:
        """`[D, rows, S]` bool: True for the last that counts in each row."""
        return self._number() == self.length[..., None] - 1

    def _number(self) -> jax.Array:
        return jnp.arange(self.tokens.shape[-1])[None, None, :]


class SlotCache(NamedTuple):
    """One layer's.

    Attributes:
        keys: `[D, slots, N, heads, channels]` float32, rotated.
        values: `[D, slots, N, heads, channels]` float32.
    """

    keys: jax.Array
    values: jax.Array

    @classmethod
    def empty(
        cls, mesh: Mesh, *, slots: int, max_len: int, num_heads: int, hidden: int
    ) -> "SlotCache":
        """Without any sequence; split over all devices of the mesh."""
        shape = (mesh.size, slots, max_len, num_heads, hidden // num_heads)
        zeros = functools.partial(jnp.zeros, shape, device=by_device(mesh))
        return cls(zeros(), zeros())


def by_device(mesh: Mesh) -> NamedSharding:
    """Of arrays whose first dimension is that of all devices."""
    return NamedSharding(mesh, PartitionSpec(mesh.axis_names))


class SlotMemory:
    """One layer's cache while a step runs: `attend` adds the rows, and reads what was before."""

    def __init__(self, cache: SlotCache, rows: Rows, mesh: Mesh, window: int) -> None:
        """Every byte sees the last `window`, its own included."""
        self.cache = cache
        self._rows = rows
        self._mesh = mesh
        self._window = window

    def attend(self, q: jax.Array, k: jax.Array, v: jax.Array, num_heads: int) -> jax.Array:
        """`[D, rows, S, H]` each, to the same shape; an `Attend` of the model."""
        split = PartitionSpec(self._mesh.axis_names)
        attend = jax.shard_map(
            functools.partial(_attend, num_heads, self._window),
            mesh=self._mesh,
            in_specs=split,
            out_specs=split,
        )
        self.cache, out = attend(self.cache, self._rows, q, k, v)
        return out


def _attend(
    num_heads: int,
    window: int,
    cache: SlotCache,
    rows: Rows,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
) -> tuple[SlotCache, jax.Array]:
    """On one device, the first dimension of everything being 1."""
    is_token = rows.is_token()[0]
    slot, start = rows.slot[0], rows.start[0]
    num_rows, seq_len, hidden = q.shape[1:]
    q, k, v = (a[0].reshape(num_rows, seq_len, num_heads, -1) for a in (q, k, v))
    positions = start[:, None] + jnp.arange(seq_len)[None, :]
    room = cache.keys.shape[2]
    # What only fills up is written nowhere.
    at = slot[:, None], jnp.where(is_token, positions, room)
    keys = cache.keys[0].at[at].set(rotate(k, positions), mode="drop")
    values = cache.values[0].at[at].set(v, mode="drop")
    own = (keys, values)
    if num_rows != keys.shape[0]:
        own = (keys[slot], values[slot])
    seen = jnp.arange(room)[None, None, :]
    last = positions[:, :, None]
    mask = (seen <= last) & (seen > last - window)
    out = jax.nn.dot_product_attention(rotate(q, positions), *own, mask=mask[:, None])
    return SlotCache(keys[None], values[None]), out.reshape(1, num_rows, seq_len, hidden)
