# SPDX-License-Identifier: Apache-2.0
"""`restore_experts`: weights of experts that no slot has, from the host."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jax_ep._src.balancing.arrays import PlacementArrays
from jax_ep._src.checks import is_array
from jax_ep._src.compat import as_array
from jax_ep._src.public import set_module

LoadExpert = Callable[[int, int], Any]


@set_module("jax_ep")
def restore_experts(
    params: Any,
    new: PlacementArrays,
    load_expert: LoadExpert,
    *,
    old: PlacementArrays | None = None,
    layer: int = 0,
) -> Any:
    """Weights of slots, of which those of experts without a living copy come from the host.

    What `move_experts(..., keep_lost=True)` leaves as it was. Each process asks for the experts
    that its own devices hold, one after the other, and there is no exchange and no collective, so
    that ranks that are lost are not missed. Outside of `shard_map`, between steps. Beside `params`
    there is room for as much again of the shards that get an expert.

    Args:
        params: a pytree of global arrays `[P, ...]`.
        new: the placement whose slots they are, from `ExpertPlacement.layer`.
        load_expert: `load_expert(layer, expert)` gives a pytree like `params` with NumPy or JAX
            arrays of one expert, `[...]`, such as from a checkpoint.
        old: the placement before: experts that are in a slot of it are left alone, because
            `move_experts` copies them. None: all experts of `new` are loaded.
        layer: what `load_expert` is told.

    Returns:
        The pytree of arrays, where they were.

    Raises:
        ValueError: an argument has a value that is not allowed, or `load_expert` gives something
            else than one expert.
    """
    for name, arrays in (("new", new), ("old", old)):
        if not isinstance(arrays, PlacementArrays) and not (name == "old" and arrays is None):
            raise ValueError(
                f"{name} is a {type(arrays).__name__}; allowed: what ExpertPlacement.layer gives"
            )
    if not callable(load_expert):
        raise ValueError(
            f"load_expert is a {type(load_expert).__name__}; allowed: a function of the layer and "
            "the expert"
        )
    after = np.asarray(new.slot_expert)
    wanted = after >= 0
    if old is not None:
        wanted &= ~np.isin(after, np.asarray(old.slot_expert))
    leaves, tree = jax.tree.flatten(params)
    leaves = [_Leaf(as_array(leaf), len(after)) for leaf in leaves]
    for expert in np.unique(after[wanted]).tolist():
        slots = np.flatnonzero(wanted & (after == expert)).tolist()
        if not any(leaf.holds(slot) for leaf in leaves for slot in slots):
            continue
        found, its_tree = jax.tree.flatten(load_expert(layer, expert))
        if its_tree != tree:
            raise ValueError(
                f"load_expert({layer}, {expert}) gave {its_tree}; allowed: a pytree like params, "
                f"{tree}"
            )
        for leaf, value in zip(leaves, found, strict=True):
            leaf.set(slots, value, f"load_expert({layer}, {expert})")
    return jax.tree.unflatten(tree, [leaf.array() for leaf in leaves])


class _Leaf:
    """An array of which some slots are replaced, shard by shard."""

    def __init__(self, array: Any, num_slots: int) -> None:
        if not isinstance(array, jax.Array) or not array.ndim or array.shape[0] != num_slots:
            got = list(array.shape) if is_array(array) else type(array).__name__
            raise ValueError(f"params have {got}; allowed: JAX arrays [{num_slots}, ...]")
        self._whole = array
        self._shards = [(s.index, s.data) for s in array.addressable_shards]
        self._is_own = [False] * len(self._shards)  # whose buffer nobody else has

    def holds(self, slot: int) -> bool:
        """Whether a device of this process has it."""
        return any(self._place(index, slot) is not None for index, _ in self._shards)

    def set(self, slots: list[int], value: Any, what: str) -> None:
        """Replaces slots; raises unless the value is one expert's."""
        shape, dtype = self._whole.shape[1:], self._whole.dtype
        value = as_array(value)
        if not is_array(value) or value.shape != shape or value.dtype != dtype:
            kind = f"{value.dtype}{list(value.shape)}" if is_array(value) else type(value).__name__
            raise ValueError(f"{what} gave {kind}; allowed: {dtype}{list(shape)}, as params have")
        value = np.asarray(value)
        for number, (index, data) in enumerate(self._shards):
            for slot in slots:
                if (place := self._place(index, slot)) is None:
                    continue
                put = _replace if self._is_own[number] else _copy_and_replace
                row = jax.device_put(value[index[1:]], data.sharding)
                data = put(data, row, place)
                self._is_own[number] = True
            self._shards[number] = (index, data)

    def array(self) -> jax.Array:
        """With what was replaced."""
        if not any(self._is_own):
            return self._whole
        shards = [data for _, data in self._shards]
        return jax.make_array_from_single_device_arrays(
            self._whole.shape, self._whole.sharding, shards
        )

    def _place(self, index: tuple[slice, ...], slot: int) -> int | None:
        """The slot's number in a shard, if it is there."""
        start, stop, _ = index[0].indices(self._whole.shape[0])
        return slot - start if start <= slot < stop else None


def _set_row(data: jax.Array, row: jax.Array, place: Any) -> jax.Array:
    return data.at[place].set(row)


_copy_and_replace = jax.jit(_set_row)
_replace = jax.jit(_set_row, donate_argnums=0)
