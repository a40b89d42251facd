# SPDX-License-Identifier: Apache-2.0
"""`LoadWindow`: statistics of the last steps, kept where they are until somebody reads them."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jax_ep._src.balancing.load_report import LoadReport
from jax_ep._src.balancing.placement import ExpertPlacement
from jax_ep._src.limits import INT32_MAX, is_int
from jax_ep._src.public import set_module

_RINGS = {"counts": "tokens_per_expert", "rows": "rows_per_rank", "dropped": "dropped_per_rank"}


@set_module("jax_ep")
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadWindow:
    """Loads of the layers of a model in the last steps; a pytree.

    `add` is for inside of `jit`, with the window donated; `read` for the host, every so many steps.
    Arrays are as the statistics are, and where they are: with `stats="load"` nothing is exchanged.

    Attributes:
        counts: `[W, layers, ...]` int32, `tokens_per_expert` of the last `W` steps, a ring.
        rows: the same of `rows_per_rank`.
        dropped: the same of `dropped_per_rank`.
        total: `[2, layers, ...]` uint32, all selections of each expert: the low word, the high one.
        ema: `[layers, ...]` float32, exponential moving average of `tokens_per_expert`.
        step: `[]` int32, steps that were added.
        half_life: of the average, in steps; static.
        is_load: whether statistics are those of `stats="load"`; static.
    """

    counts: jax.Array
    rows: jax.Array
    dropped: jax.Array
    total: jax.Array
    ema: jax.Array
    step: jax.Array
    half_life: float = dataclasses.field(metadata={"static": True})
    is_load: bool = dataclasses.field(metadata={"static": True})

    @classmethod
    def like(cls, stats: Any, *, length: int = 100, half_life: float = 100.0) -> "LoadWindow":
        """An empty window for such statistics; their values are not read.

        Args:
            stats: what `add` takes, or the same of `jax.ShapeDtypeStruct`, as `jax.eval_shape`
                gives it.
            length: `W`, steps that it keeps.
            half_life: of the moving average, in steps.

        Raises:
            ValueError: an argument has a value that is not allowed.
        """
        if not is_int(length):
            raise ValueError(f"length is {length!r}; allowed: an int from 1 to {INT32_MAX}")
        if not 0 < half_life < math.inf:
            raise ValueError(f"half_life is {half_life}; allowed: finite, above 0")
        is_load = _is_load(stats)
        shapes = {ring: _shape(stats, name) for ring, name in _RINGS.items()}
        first = stats[0] if isinstance(stats, (list, tuple)) else stats

        def zeros(ring: str, lead: tuple[int, ...], dtype: Any) -> jax.Array:
            of_layer = getattr(first, _RINGS[ring])
            shape = (*lead, *shapes[ring])
            return _zeros_beside(of_layer, shape, dtype, len(shape) - len(of_layer.shape))

        return cls(
            **{ring: zeros(ring, (int(length),), jnp.int32) for ring in _RINGS},
            total=zeros("counts", (2,), jnp.uint32),
            ema=zeros("counts", (), jnp.float32),
            step=_zeros_beside(first.tokens_per_expert, (), jnp.int32, None),
            half_life=float(half_life),
            is_load=is_load,
        )

    def add(self, stats: Any) -> "LoadWindow":
        """With one more step; the oldest is forgotten if the window is full.

        Args:
            stats: a list of the `LayerStats` of each layer, or one in which layers are stacked
                along a first dimension, as `scan` gives them. All with `stats="all"`, or all with
                "load".

        Raises:
            ValueError: they are others than the window was made for.
        """
        is_load = _is_load(stats)
        place = self.step % self.counts.shape[0]
        rings, new = {}, {}
        for ring, name in _RINGS.items():
            before = getattr(self, ring)
            shape = _shape(stats, name)
            if shape != before.shape[1:] or is_load != self.is_load:
                raise ValueError(
                    f"stats have {name} {list(shape)}, stats={_kind(is_load)!r}; allowed: "
                    f"{list(before.shape[1:])}, stats={_kind(self.is_load)!r}, for which the "
                    "window was made"
                )
            if isinstance(stats, (list, tuple)):
                new[ring] = jnp.stack([getattr(layer, name) for layer in stats])
            else:
                new[ring] = getattr(stats, name)
            rings[ring] = before.at[place].set(new[ring])
        counts = new["counts"]
        low = self.total[0] + counts.astype(jnp.uint32)
        high = self.total[1] + (low < self.total[0]).astype(jnp.uint32)  # the carry
        keep = np.float32(0.5 ** (1 / self.half_life))
        now = counts.astype(jnp.float32)
        ema = jnp.where(self.step == 0, now, keep * self.ema + (1 - keep) * now)
        return dataclasses.replace(
            self, **rings, total=jnp.stack([low, high]), ema=ema, step=self.step + 1
        )

    def read(self, placement: ExpertPlacement | None = None) -> LoadReport:
        """What the window has, on the host; outside of `jit`.

        Args:
            placement: of the layers, where experts have copies and statistics are those of
                `stats="load"`, which are by slot. All steps must have had these slots: begin a new
                window when slots move.

        Raises:
            ValueError: the placement does not fit, or some of the arrays are on other processes'
                devices: pass them through `jax.jit` with replicated `out_shardings` first.
        """
        step, length = int(self.step), self.counts.shape[0]
        order = np.arange(max(0, step - length), step) % length
        rings = {ring: self._summed(_host(getattr(self, ring)), 2)[order] for ring in _RINGS}
        words = _host(self.total).astype(np.uint64)
        total = self._summed(words[0] + (words[1] << np.uint64(32)), 1)
        ema = self._summed(_host(self.ema).astype(np.float64), 1)
        if placement is not None:
            if not self.is_load or placement.slot_expert.shape != total.shape:
                raise ValueError(
                    f"placement has slots {list(placement.slot_expert.shape)}, and the window "
                    f"{list(total.shape)}, stats={_kind(self.is_load)!r}; allowed: a placement "
                    "only for statistics by slot, of as many"
                )
            rings["counts"], total, ema = (
                _by_expert(array, placement) for array in (rings["counts"], total, ema)
            )
        return LoadReport(**rings, total=total, ema=ema, step=step)

    def _summed(self, values: np.ndarray, axis: int) -> np.ndarray:
        """Over what devices have not added up; in 64 bits."""
        values = values.astype(np.int64) if values.dtype == np.int32 else values
        return values.sum(axis=axis) if self.is_load else values


def _zeros_beside(array: Any, shape: tuple[int, ...], dtype: Any, lead: int | None) -> jax.Array:
    """Zeros where an array is, with dimensions before its own; None: everywhere there."""
    zeros = jnp.zeros(shape, dtype)
    sharding = getattr(array, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return zeros
    spec = PartitionSpec() if lead is None else PartitionSpec(*[None] * lead, *sharding.spec)
    return jax.device_put(zeros, NamedSharding(sharding.mesh, spec))


def _host(array: jax.Array) -> np.ndarray:
    if not array.is_fully_addressable and not array.is_fully_replicated:
        raise ValueError(
            "the window has arrays on devices of other processes; allowed: replicated ones, as "
            "jax.jit(lambda window: window, out_shardings=...) makes them"
        )
    return np.asarray(array)


def _is_load(stats: Any) -> bool:
    """Whether statistics are those of "load"; raises unless they are some."""
    layers = stats if isinstance(stats, (list, tuple)) else [stats]
    names = _RINGS.values()
    if not layers or any(getattr(layer, n, None) is None for layer in layers for n in names):
        raise ValueError(
            "stats is no LayerStats, or one without tokens_per_expert, rows_per_rank or "
            "dropped_per_rank; allowed: what with_stats gives for stats='all' or 'load'"
        )
    kinds = {getattr(layer, "num_dropped", None) is None for layer in layers}
    if len(kinds) > 1:
        raise ValueError("stats are of stats='all' and of 'load'; allowed: all alike")
    return kinds.pop()


def _shape(stats: Any, name: str) -> tuple[int, ...]:
    """`[layers, ...]`: that of an array, of all layers."""
    if not isinstance(stats, (list, tuple)):
        shape = tuple(getattr(stats, name).shape)
        if len(shape) != (3 if _is_load(stats) else 2):
            raise ValueError(
                f"stats has {name} {list(shape)}, of one layer; allowed: [stats], or layers that "
                "are stacked along a first dimension"
            )
        return shape
    shapes = {tuple(getattr(layer, name).shape) for layer in stats}
    if len(shapes) > 1:
        raise ValueError(f"stats have {name} of the shapes {sorted(shapes)}; allowed: all alike")
    return len(stats), *shapes.pop()


def _kind(is_load: bool) -> str:
    return "load" if is_load else "all"


def _by_expert(array: np.ndarray, placement: ExpertPlacement) -> np.ndarray:
    """`[..., layers, E]` of `[..., layers, P]`."""
    out = np.zeros((*array.shape[:-1], placement.num_experts), array.dtype)
    for layer, experts in enumerate(placement.slot_expert):
        slots = np.flatnonzero(experts >= 0)
        np.add.at(out[..., layer, :].T, experts[slots], array[..., layer, slots].T)
    return out
