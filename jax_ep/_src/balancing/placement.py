# SPDX-License-Identifier: Apache-2.0
"""`ExpertPlacement`: which expert is in which slot, and which part of its tokens goes there."""

import dataclasses
import functools
import hashlib
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from jax_ep._src.balancing import packing, shares
from jax_ep._src.public import set_module

if TYPE_CHECKING:
    from jax_ep._src.balancing.arrays import PlacementArrays

_VERSION = 1  # of the file
_FIELDS = ("slot_expert", "copies", "upper", "alive")
# Loads above it could add up to infinity.
_MOST_LOAD = 1e300


@set_module("jax_ep")
@dataclasses.dataclass(frozen=True, eq=False)
class ExpertPlacement:
    """Which expert is in which slot, for each layer. `plan_placement` makes it.

    Rank `r` of `R` has the slots `r * S` to `r * S + S - 1`; `P = R * S` is the number of experts
    that dispatch and combine know, `EpConfig.num_experts`, and `E` that of the router. Placements
    are equal if their arrays are; they can be hashed and pickled. The arrays are read-only NumPy
    arrays, copied from what is given. Nothing here but `layer` needs JAX.

    Attributes:
        slot_expert: `[layers, P]` int32, the logical expert of each slot, or -1.
        copies: `[layers, E, J]` int32, the slots of each expert, ascending; -1 behind.
        upper: `[layers, E, J]` int32, where the share of each copy ends, in 2^-16; that of the
            last copy 65536, -1 behind.
        alive: `[R]` bool, the ranks that may have experts.

    Raises:
        ValueError: the arrays do not fit each other.
    """

    slot_expert: np.ndarray
    copies: np.ndarray
    upper: np.ndarray
    alive: np.ndarray

    def __post_init__(self) -> None:
        for name in _FIELDS:
            array = np.array(getattr(self, name), bool if name == "alive" else np.int32, order="C")
            array.setflags(write=False)
            object.__setattr__(self, name, array)
        _check(self)

    @property
    def num_layers(self) -> int:
        """Layers."""
        return self.slot_expert.shape[0]

    @property
    def num_experts(self) -> int:
        """`E`, logical experts."""
        return self.copies.shape[1]

    @property
    def num_ranks(self) -> int:
        """`R`."""
        return self.alive.shape[0]

    @property
    def slots_per_rank(self) -> int:
        """`S`."""
        return self.slot_expert.shape[1] // self.num_ranks

    @property
    def max_copies(self) -> int:
        """`J`, the width of the tables: copies that an expert may have."""
        return self.copies.shape[2]

    @functools.cached_property
    def digest(self) -> str:
        """16 hexadecimal digits of the arrays' SHA-256: for logs, and to compare between ranks."""
        digest = hashlib.sha256()
        for name in _FIELDS:
            array = getattr(self, name)
            digest.update(f"{name} {array.shape} ".encode())
            digest.update(array.astype(array.dtype.newbyteorder("<")).tobytes())
        return digest.hexdigest()[:16]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ExpertPlacement):
            return NotImplemented
        return all(np.array_equal(getattr(self, n), getattr(other, n)) for n in _FIELDS)

    def __hash__(self) -> int:
        return hash(self.digest)

    def __reduce__(self) -> tuple[Any, ...]:
        return ExpertPlacement, tuple(getattr(self, name) for name in _FIELDS)

    def __repr__(self) -> str:
        return (
            f"ExpertPlacement({self.num_layers} layers, {self.num_experts} experts in "
            f"{self.num_ranks} ranks * {self.slots_per_rank} slots, digest {self.digest})"
        )

    def imbalance(self, load: ArrayLike) -> np.ndarray:
        """`[layers]` float64: load of the hottest rank per mean of the alive ones, with the shares.

        1 is even; a layer without load counts as even. Experts without a copy count nowhere.

        Args:
            load: `[layers, E]`, or `[E]` for one layer, finite and at least 0.

        Raises:
            ValueError: `load` has another shape or such values.
        """
        load = self._as_load(load)
        slot = np.arange(self.slot_expert.shape[1]) // self.slots_per_rank
        result = np.ones(self.num_layers)
        for layer, copies in enumerate(self.copies):
            is_there = copies >= 0
            upper = np.where(is_there, self.upper[layer], 0)
            parts = np.diff(upper, axis=1, prepend=0) / shares.ONE * load[layer, :, None]
            loads = np.bincount(slot[copies[is_there]], parts[is_there], minlength=self.num_ranks)
            mean = loads.cumsum()[-1] / self.alive.sum()
            result[layer] = loads.max() / mean if mean > 0 else 1.0
        return result

    def lower_bound(self, load: ArrayLike) -> np.ndarray:
        """`[layers]` float64: no placement with as many slots has an `imbalance` below it.

        The hottest copy of the best numbers of copies, per mean of the alive ranks; at least 1.
        That every rank has `S` slots and that groups stay on a node is not in it, so there may be
        no placement that reaches it.

        Args:
            load: as for `imbalance`.

        Raises:
            ValueError: as `imbalance`.
        """
        load = self._as_load(load)
        num_alive = int(self.alive.sum())
        most = min(num_alive, self.max_copies)
        num_slots = num_alive * self.slots_per_rank
        result = np.ones(self.num_layers)
        for layer, of_layer in enumerate(load):
            mean = of_layer.cumsum()[-1] / num_alive
            if mean > 0:
                copies = packing.replicate(of_layer, num_slots, most)
                result[layer] = max(1.0, (of_layer / copies).max() / mean)
        return result

    def lost(self, alive: ArrayLike) -> np.ndarray:
        """`[layers, E]` bool: experts without a copy on a rank that is alive.

        Args:
            alive: `[R]` bool.

        Raises:
            ValueError: `alive` is something else.
        """
        alive = as_alive(alive, self.num_ranks)
        rank = np.maximum(self.copies, 0) // self.slots_per_rank
        return ((self.copies >= 0) & alive[rank]).sum(axis=2) == 0

    def only_alive(self, alive: ArrayLike) -> "ExpertPlacement":
        """The same slots but for those of lost ranks, which are empty; copies share evenly.

        What is left when ranks are lost: what `move_experts` moves from, and, until a new plan is
        in force, where tokens go. Experts without a living copy have none: `lost`.

        Args:
            alive: `[R]` bool.

        Raises:
            ValueError: `alive` is something else.
        """
        alive = as_alive(alive, self.num_ranks) & self.alive
        slots = np.where(np.repeat(alive, self.slots_per_rank), self.slot_expert, -1)
        even = np.zeros((self.num_layers, self.num_experts))
        return with_shares(slots, even, self.max_copies, alive)

    def reshare(self, load: ArrayLike) -> "ExpertPlacement":
        """The same slots with shares for other loads. No weights move.

        Args:
            load: as for `imbalance`.

        Raises:
            ValueError: as `imbalance`.
        """
        return with_shares(self.slot_expert, self._as_load(load), self.max_copies, self.alive)

    def moves(self, old: "ExpertPlacement") -> int:
        """Slots, of all layers, that have an expert, and another one than in `old`.

        Raises:
            ValueError: `old` has other layers or slots.
        """
        if old.slot_expert.shape != self.slot_expert.shape:
            raise ValueError(
                f"old has slot_expert of shape {old.slot_expert.shape}; allowed: "
                f"{self.slot_expert.shape}, as the new one"
            )
        return int(((self.slot_expert != old.slot_expert) & (self.slot_expert >= 0)).sum())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes an `.npz` file, which NumPy alone can read.

        Args:
            path: of the file, used as it is.
        """
        with open(path, "wb") as file:
            np.savez(file, version=_VERSION, **{name: getattr(self, name) for name in _FIELDS})

    @staticmethod
    def load(path: str | os.PathLike[str]) -> "ExpertPlacement":
        """Reads what `save` wrote.

        Raises:
            ValueError: the file is of another version or has no placement in it.
        """
        with np.load(path, allow_pickle=False) as file:
            missing = [name for name in ("version", *_FIELDS) if name not in file]
            if missing:
                raise ValueError(
                    f"{path} has no {missing}; allowed: a file of ExpertPlacement.save"
                )
            if int(file["version"]) != _VERSION:
                raise ValueError(f"{path} is of version {file['version']}; allowed: {_VERSION}")
            return ExpertPlacement(*(file[name] for name in _FIELDS))

    def layer(self, index: int) -> "PlacementArrays":
        """The arrays of one layer, as JAX arrays, for `place`.

        Args:
            index: of the layer; negative ones count from the end.
        """
        import jax.numpy as jnp  # noqa: PLC0415  nothing else here needs JAX

        from jax_ep._src.balancing.arrays import PlacementArrays  # noqa: PLC0415

        return PlacementArrays(
            slot_expert=jnp.asarray(self.slot_expert[index]),
            copies=jnp.asarray(self.copies[index]),
            upper=jnp.asarray(self.upper[index]),
            num_ranks=self.num_ranks,
        )

    def _as_load(self, load: ArrayLike) -> np.ndarray:
        return as_load(load, num_layers=self.num_layers, num_experts=self.num_experts)


def only_layers(placement: ExpertPlacement, layers: Iterable[int]) -> ExpertPlacement:
    """A placement of some of the layers, at least one, in this order."""
    index = list(layers)
    slot_expert, copies, upper = (getattr(placement, name)[index] for name in _FIELDS[:3])
    return ExpertPlacement(slot_expert, copies, upper, placement.alive)


def with_layers(
    placement: ExpertPlacement, layers: Iterable[int], new: ExpertPlacement
) -> ExpertPlacement:
    """A placement in which these layers are those of another, which has them in this order."""
    index = list(layers)

    def table(name: str) -> np.ndarray:
        array = getattr(placement, name).copy()
        array[index] = getattr(new, name)
        return array

    slot_expert, copies, upper = map(table, _FIELDS[:3])
    return ExpertPlacement(slot_expert, copies, upper, placement.alive)


def with_shares(
    slot_expert: np.ndarray, load: np.ndarray, max_copies: int, alive: np.ndarray
) -> ExpertPlacement:
    """A placement with these slots `[layers, P]`, and the shares that suit these loads best.

    Raises:
        ValueError: an expert has more than `max_copies` copies.
    """
    slots_per_rank = slot_expert.shape[1] // len(alive)
    copies = copies_of(slot_expert, load.shape[1], max_copies)
    tables = zip(load, copies, strict=True)
    upper = [shares.shares_upper(w, c, slots_per_rank, alive) for w, c in tables]
    return ExpertPlacement(slot_expert, copies, np.stack(upper), alive)


def copies_of(slot_expert: np.ndarray, num_experts: int, max_copies: int) -> np.ndarray:
    """`[layers, E, J]` int32: the slots of each expert, ascending, -1 behind.

    Raises:
        ValueError: an expert has more than `max_copies` copies.
    """
    copies = np.full((len(slot_expert), num_experts, max_copies), -1, np.int32)
    for layer, experts in enumerate(slot_expert):
        slots = np.argsort(experts, kind="stable")
        slots = slots[experts[slots] >= 0]
        owner = experts[slots]
        number = np.arange(len(slots)) - np.searchsorted(owner, owner)
        if (number >= max_copies).any():
            most = int(owner[number.argmax()])
            raise ValueError(
                f"max_copies is {max_copies}, and expert {most} of layer {layer} has "
                f"{int(number.max()) + 1} copies"
            )
        copies[layer, owner, number] = slots
    return copies


def as_load(
    load: ArrayLike, *, num_layers: int | None = None, num_experts: int | None = None
) -> np.ndarray:
    """`[layers, E]` float64 of `[layers, E]` or, for one layer, `[E]`.

    Raises:
        ValueError: it has another shape, or values that are not finite or below 0.
    """
    given = np.asarray(load)
    if given.dtype.kind not in "iuf":
        raise ValueError(f"load is of dtype {given.dtype}; allowed: integers or floats")
    array = given.astype(np.float64)
    array = array[None] if array.ndim == 1 else array
    fits = array.ndim == 2 and array.size > 0
    fits = fits and num_layers in (None, array.shape[0]) and num_experts in (None, array.shape[1])
    if not fits:
        layers, experts = num_layers or "layers", num_experts or "E"
        also = f" or [{experts}]" if num_layers in (None, 1) else ""
        raise ValueError(f"load has shape {given.shape}; allowed: [{layers}, {experts}]{also}")
    wrong = np.argwhere(~((array >= 0) & (array <= _MOST_LOAD)))
    if len(wrong):
        index = tuple(wrong[0].tolist())
        where = ", ".join(map(str, index[2 - given.ndim :]))
        raise ValueError(
            f"load[{where}] is {array[index]}; allowed: finite numbers of at least 0, up to "
            f"{_MOST_LOAD:g}"
        )
    return array


def as_alive(alive: ArrayLike, num_ranks: int) -> np.ndarray:
    """`[R]` bool.

    Raises:
        ValueError: it is something else.
    """
    array = np.asarray(alive)
    if array.dtype != np.bool_ or array.shape != (num_ranks,):
        raise ValueError(f"alive is {array.dtype}{list(array.shape)}; allowed: bool[{num_ranks}]")
    return array


def _check(placement: ExpertPlacement) -> None:
    slot_expert, copies = placement.slot_expert, placement.copies
    shapes = [getattr(placement, name).shape for name in _FIELDS]
    fits = [len(shape) for shape in shapes] == [2, 3, 3, 1] and all(map(all, shapes))
    fits = fits and shapes[1] == shapes[2] and shapes[0][0] == shapes[1][0]
    if not fits or shapes[0][1] % shapes[3][0]:
        raise ValueError(
            f"slot_expert, copies, upper and alive have the shapes {shapes}; allowed: "
            "[layers, R * S], [layers, E, J], [layers, E, J] and [R]"
        )
    if slot_expert.min() < -1 or slot_expert.max() >= placement.num_experts:
        raise ValueError(
            f"slot_expert has values from {slot_expert.min()} to {slot_expert.max()}; allowed: "
            f"-1 to {placement.num_experts - 1}"
        )
    by_rank = slot_expert.reshape(len(slot_expert), placement.num_ranks, -1)
    ordered = np.sort(by_rank, axis=2)
    twice = np.argwhere((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0))
    if len(twice):
        layer, rank, slot = twice[0].tolist()
        raise ValueError(
            f"slot_expert has expert {ordered[layer, rank, slot]} twice on rank {rank} of layer "
            f"{layer}; allowed: experts of a rank are distinct"
        )
    if by_rank[:, ~placement.alive].max(initial=-1) >= 0:
        raise ValueError("slot_expert has experts on ranks that are not alive; allowed: -1 there")
    wanted = copies_of(slot_expert, placement.num_experts, placement.max_copies)
    if not np.array_equal(copies, wanted):
        raise ValueError("copies does not have the slots of slot_expert, ascending, and -1 behind")
    _check_upper(placement)


def _check_upper(placement: ExpertPlacement) -> None:
    upper, is_there = placement.upper, placement.copies >= 0
    ends = np.where(is_there, upper, shares.ONE)
    ascends = (np.diff(ends, axis=2, prepend=0) >= 0).all()
    last = is_there & ~np.concatenate([is_there[..., 1:], is_there[..., :1] & False], axis=2)
    if not ascends or (upper[~is_there] != -1).any() or (upper[last] != shares.ONE).any():
        raise ValueError(
            f"upper does not ascend from 0 or more to {shares.ONE} for each expert's copies, with "
            "-1 behind"
        )
