# SPDX-License-Identifier: Apache-2.0
"""The trained model as one function: rows of bytes in, the next byte of each row out.

Reading prompts and writing are the same function with rows of different lengths, through the same
layers and the same EP group: their receive buffers follow the bytes of a call. The program has no
collective of XLA; devices exchange in the MoE layers alone.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import jax_ep
from moe_lm.build import place
from moe_lm.nnx_model import LanguageModel
from moe_serve.cache import Rows, SlotCache, SlotMemory, by_device
from moe_serve.plans import Row, StepPlan, Written
from moe_serve.sampling import Sampling, sample

EXPERT_WEIGHTS = ("w_gate", "w_up", "w_down")

_GREEDY = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "seed": 0}
_DTYPES = {"temperature": np.float32, "top_k": np.int32, "top_p": np.float32, "seed": np.int32}


class ServingModel:
    """A model with its cache; in one process, or in several that run the same plans.

    Attributes:
        group: of the layers.
        layers: the MoE layers, in order.
        counts: `[layers, P]` int64: selections of each expert slot by all steps since
            `take_counts`, if it is of a device of this process.
    """

    def __init__(
        self, group: jax_ep.EpGroup, model: LanguageModel, *, slots: int, max_len: int, window: int
    ) -> None:
        """An empty cache of `slots` sequences of up to `max_len` bytes on each device."""
        self.group = group
        self._mesh = group.mesh
        self._window = window
        self._slots = slots
        self._model = model
        self._caches = [
            SlotCache.empty(
                group.mesh,
                slots=slots,
                max_len=max_len,
                num_heads=block.attention.num_heads,
                hidden=group.config.hidden,
            )
            for block in model.blocks
        ]
        self.counts = np.zeros((len(self._caches), group.config.num_experts), np.int64)
        self._split()
        num_routed = self.layers[0].router.shape[1]
        self._has_expert = np.ones((len(self._caches), num_routed), bool)
        self._alive = np.ones(group.num_ranks, bool)
        split = by_device(group.mesh)
        of_counts = NamedSharding(group.mesh, PartitionSpec(None, *group.mesh.axis_names))
        self._step = jax.jit(
            self._forward,
            donate_argnums=2,
            in_shardings=(None, None, None, split, split, None, None),
            out_shardings=(split, split, of_counts),
        )

    @property
    def layers(self) -> list[Any]:
        """The MoE layers."""
        return [block.moe for block in self._model.blocks]

    @property
    def num_devices(self) -> int:
        """Devices, each with `slots` of its own."""
        return self._mesh.size

    @property
    def own_devices(self) -> set[int]:
        """Those of this process."""
        here = jax.process_index()
        return {i for i, d in enumerate(self._mesh.devices.flat) if d.process_index == here}

    def set_experts(self, has_expert: np.ndarray) -> None:
        """Says which experts the routers may choose, `[layers, E]` bool."""
        self._has_expert = has_expert

    def set_alive(self, alive: np.ndarray) -> None:
        """Says which ranks take part in exchanges, `[R]` bool: nobody waits for another one."""
        self._alive = alive

    def weights(self, layer: int) -> dict[str, jax.Array]:
        """Of the experts of a layer, `[P, ...]` by name."""
        return {name: getattr(self.layers[layer], name).get_value() for name in EXPERT_WEIGHTS}

    def set_weights(self, layer: int, weights: Mapping[str, jax.Array]) -> None:
        """Replaces them by arrays of the same shapes."""
        for name, weight in weights.items():
            getattr(self.layers[layer], name).set_value(weight)
        self._split()

    def set_placement(self, layer: int, arrays: jax_ep.PlacementArrays) -> None:
        """Says where the experts of a layer are, if they may have copies."""
        self.layers[layer].set_placement(arrays)
        self._split()

    def _split(self) -> None:
        """What the step takes, from the layers."""
        self._graph, self._params, self._rest = nnx.split(self._model, nnx.Param, ...)

    def run(self, plan: StepPlan) -> list[Written]:
        """See `moe_serve.runner.Runner`; of rows on devices of others, nothing that counts."""
        return [written for step in plan.steps for written in self.step(*step)]

    def step(self, rows: Sequence[Row], width: int) -> list[Written]:
        """Reads rows of up to `width` bytes each.

        With a width of 1, each slot has its row, else each device has one. Every pair is one
        program, which is compiled when it is first needed.

        Returns:
            For each row the byte that follows. The cache has the rows; to step again with the same
            ones changes nothing, so a result may be thrown away.
        """
        batch, sampling, places = self._batch(rows, width)
        if jax.process_count() > 1:
            by_rows = by_device(self._mesh)
            batch, sampling = jax.tree.map(lambda a: place(a, by_rows), (batch, sampling))
        self._caches, result, counts = self._step(
            *(self._params, self._rest, self._caches, batch, sampling),
            *(self._has_expert, self._alive),
        )
        tokens, logprobs, counts = _fetched((*result, counts))
        self.counts += counts.reshape(*counts.shape[:1], -1, counts.shape[-1]).sum(axis=1)
        return [Written(int(tokens[at]), float(logprobs[at])) for at in places]

    def compile(self, width: int) -> None:
        """Compiles the program of a width, by a step without a sequence."""
        self.step([], width)

    def take_counts(self) -> np.ndarray:
        """The counts; they begin anew."""
        counts, self.counts = self.counts, np.zeros_like(self.counts)
        return counts

    def abandon(self) -> None:
        """Does nothing: a step of this process ends at the group's deadline, or with it."""

    def _batch(
        self, rows: Sequence[Row], width: int
    ) -> tuple[Rows, Sampling, list[tuple[int, int]]]:
        """The arrays of a step, and where in them each row is."""
        num_rows = self._slots if width == 1 else 1
        shape = (self.num_devices, num_rows)
        tokens = np.zeros((*shape, width), np.int32)
        start, length = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        slot = np.tile(np.arange(num_rows, dtype=np.int32), (self.num_devices, 1))
        sampling = {n: np.full(shape, value, _DTYPES[n]) for n, value in _GREEDY.items()}
        places = []
        for row in rows:
            at = (row.device, row.slot if width == 1 else 0)
            tokens[at][: len(row.tokens)] = np.frombuffer(row.tokens, np.uint8)
            slot[at], start[at], length[at] = row.slot, row.start, len(row.tokens)
            for name, values in sampling.items():
                values[at] = getattr(row.request, name)
            places.append(at)
        return Rows(tokens, slot, start, length), Sampling(**sampling), places

    def _forward(
        self,
        params: Any,
        rest: Any,
        caches: list[SlotCache],
        rows: Rows,
        sampling: Sampling,
        has_expert: jax.Array,
        alive: jax.Array,
    ) -> tuple[list[SlotCache], tuple[jax.Array, jax.Array], jax.Array]:
        model = nnx.merge(self._graph, params, rest)
        memories = [SlotMemory(cache, rows, self._mesh, self._window) for cache in caches]
        is_token = rows.is_token()
        x, counts = model.embed(rows.tokens), []
        for block, memory, allowed in zip(model.blocks, memories, has_expert, strict=True):
            x = x + block.attention(block.attention_norm(x), memory.attend)
            y = block.moe_norm(x)
            logits = jnp.where(allowed[None, None, None], y @ block.moe.router[...], -jnp.inf)
            y, stats = block.moe.with_stats(
                y, stats="load", mask=is_token, logits=logits, rank_mask=alive
            )
            x = x + y
            counts.append(stats.tokens_per_expert)
        # Exact, because at most one is 1.
        last = jnp.einsum("drsh,drs->drh", x, rows.is_last().astype(x.dtype))
        logits = model.head(model.norm(last))
        result = sample(logits, rows.start + rows.length, sampling)
        return [memory.cache for memory in memories], result, jnp.stack(counts)


def _fetched(arrays: tuple[jax.Array, ...]) -> tuple[np.ndarray, ...]:
    """Arrays on the host; what devices of other processes have is 0."""
    if jax.process_count() == 1:
        return jax.device_get(arrays)
    for array in arrays:
        array.copy_to_host_async()
    found = tuple(np.zeros(array.shape, array.dtype) for array in arrays)
    for array, out in zip(arrays, found, strict=True):
        for shard in array.addressable_shards:
            out[shard.index] = shard.data
    return found
