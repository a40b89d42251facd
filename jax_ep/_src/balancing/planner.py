# SPDX-License-Identifier: Apache-2.0
"""`plan_placement`: experts and copies of experts onto ranks. NumPy only."""

import logging
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from jax_ep._src.balancing import packing
from jax_ep._src.balancing.placement import ExpertPlacement, as_alive, as_load, with_shares
from jax_ep._src.limits import INT32_MAX, is_int
from jax_ep._src.public import set_module

_logger = logging.getLogger("jax_ep")

_DEFAULT_MOST = 16  # copies: keeps the tables small
_COSTS = 1.01  # what a small max_copies may cost before a warning says so


class _Sizes(NamedTuple):
    num_experts: int
    slots_per_rank: int
    num_nodes: int
    num_groups: int
    max_copies: int
    alive: np.ndarray  # [R] bool

    @property
    def node_of_rank(self) -> np.ndarray:
        """`[R]`."""
        return np.arange(len(self.alive)) // (len(self.alive) // self.num_nodes)


@set_module("jax_ep")
def plan_placement(
    load: ArrayLike,
    *,
    num_ranks: int,
    slots_per_rank: int,
    num_nodes: int = 1,
    num_groups: int | None = None,
    alive: ArrayLike | None = None,
    previous: ExpertPlacement | None = None,
    max_moved: int | None = None,
    max_copies: int | None = None,
) -> ExpertPlacement:
    """Plans which experts get copies, where all of them live, and how copies share the tokens.

    Per layer, in float64, with ties to the lower index, so that the same loads give the same
    placement on every machine: the expert with the hottest copies gets one more until the slots
    are full; copies go, the hottest first, to the lightest rank with a free slot; copies of the
    hottest rank are exchanged with others' while that helps; the copies' shares make the hottest
    rank as cool as they can. With `previous`, spare slots go to experts that want more copies, and
    then copies are exchanged. Milliseconds a layer; nothing needs to wait for it.

    Args:
        load: `[E]` or `[layers, E]`, integers or floats, finite and at least 0: what each expert
            got. A layer without any load is planned as if all experts had the same.
        num_ranks: `R`.
        slots_per_rank: `S`; `R * S` is the group's `EpConfig.num_experts`.
        num_nodes: `R` is a multiple of it. Above 1, experts of a group stay on one node, as
            group-limited routing (DeepSeek-V3) wants it; every node gets as many groups.
        num_groups: of experts, a multiple of `num_nodes`; experts of a group are neighbors.
        alive: `[R]` bool; the others get no expert. None: all are.
        previous: the placement to start from: slots that keep their expert keep their number.
        max_moved: with `previous`, slots of each layer that may get another expert; None: any
            number. Experts without a living copy get one beyond it.
        max_copies: `J`, copies that an expert may have: the width of the tables, so that a new
            placement compiles nothing. None: that of `previous`, or the smaller of `R` and 16. If
            it costs more than 1 % of balance, the logger `jax_ep` gets a warning.

    Raises:
        ValueError: an argument has a value that is not allowed, or the alive ranks have too few
            slots for all experts.
    """
    loads = as_load(load)
    sizes = _sizes(loads, num_ranks, slots_per_rank, num_nodes, num_groups, alive, max_copies)
    if max_copies is None and previous is not None:
        sizes = sizes._replace(max_copies=previous.max_copies)
    if max_moved is not None and not is_int(max_moved, 0):
        raise ValueError(f"max_moved is {max_moved!r}; allowed: None or an int of at least 0")
    if max_moved is not None and previous is None:
        raise ValueError(f"max_moved is {max_moved} without previous; allowed: None")
    if previous is not None:
        _check_previous(previous, loads, sizes)
    _warn_of_few_copies(loads, sizes)
    slot_expert = []
    for layer, of_layer in enumerate(loads):
        even = of_layer if of_layer.any() else np.ones_like(of_layer)
        if previous is None:
            slot_expert.append(_fresh(even, sizes))
        else:
            slot_expert.append(_adapted(even, sizes, previous, layer, max_moved))
    return with_shares(np.stack(slot_expert), loads, sizes.max_copies, sizes.alive)


def _fresh(load: np.ndarray, sizes: _Sizes) -> np.ndarray:
    """`[P]` of one layer, from its loads `[E]`."""
    slots = np.full((len(sizes.alive), sizes.slots_per_rank), -1)
    node_of_expert = _node_of_expert(load, sizes)
    for node in range(sizes.num_nodes):
        experts = np.flatnonzero(node_of_expert == node)
        ranks = np.flatnonzero(sizes.alive & (sizes.node_of_rank == node))
        _check_room(len(experts), len(ranks), node, sizes)
        shape = len(ranks), sizes.slots_per_rank
        most = min(len(ranks), sizes.max_copies)
        copies = packing.replicate(load[experts], shape[0] * shape[1], most)
        found = packing.pack(load[experts], copies, *shape)
        slots[ranks] = np.where(found >= 0, experts[found], -1)
    return slots.ravel()


def _node_of_expert(load: np.ndarray, sizes: _Sizes) -> np.ndarray:
    """`[E]`: groups onto nodes, as many on each."""
    if sizes.num_nodes == 1:
        return np.zeros(len(load), np.int64)
    of_group = np.add.accumulate(load.reshape(sizes.num_groups, -1), axis=1)[:, -1]
    one_each = np.ones(sizes.num_groups, np.int64)
    per_node = sizes.num_groups // sizes.num_nodes
    groups = packing.pack(of_group, one_each, sizes.num_nodes, per_node, close_enough=1.0)
    node_of_group = np.empty(sizes.num_groups, np.int64)
    node_of_group[groups] = np.arange(sizes.num_nodes)[:, None]
    return np.repeat(node_of_group, len(load) // sizes.num_groups)


def _adapted(
    load: np.ndarray,
    sizes: _Sizes,
    previous: ExpertPlacement,
    layer: int,
    max_moved: int | None,
) -> np.ndarray:
    """`[P]` of one layer, from its loads `[E]` and its previous placement."""
    node_of_expert = _node_before(previous, layer, load, sizes)
    before = previous.slot_expert[layer].reshape(len(sizes.alive), -1).astype(np.int64)
    slots = np.where(sizes.alive[:, None], before, -1)
    left = max_moved
    for node in _hottest_first(load, node_of_expert, sizes.num_nodes):
        experts = np.flatnonzero(node_of_expert == node)
        ranks = np.flatnonzero(sizes.alive & (sizes.node_of_rank == node))
        _check_room(len(experts), len(ranks), node, sizes)
        number = np.full(len(load) + 1, -1)  # of an expert among those of the node
        number[experts] = np.arange(len(experts))
        most = min(len(ranks), sizes.max_copies)
        found, moved = packing.adapt(load[experts], number[slots[ranks]], most, left)
        slots[ranks] = np.where(found >= 0, experts[found], -1)
        left = None if left is None else max(left - moved, 0)
    return slots.ravel()


def _hottest_first(load: np.ndarray, node_of_expert: np.ndarray, num_nodes: int) -> list[int]:
    """Nodes by falling load, because the first ones may use up what may be moved."""
    loads = np.bincount(node_of_expert, load, minlength=num_nodes)
    return np.argsort(-loads, kind="stable").tolist()


def _node_before(
    previous: ExpertPlacement, layer: int, load: np.ndarray, sizes: _Sizes
) -> np.ndarray:
    """`[E]`, or an error where experts of a group are on several nodes.

    A group that has no copy left, after ranks were lost, goes where there is room for it: the
    hottest first, to the node with the least load.
    """
    if sizes.num_nodes == 1:
        return np.zeros(sizes.num_experts, np.int64)
    copies = previous.copies[layer]
    node = sizes.node_of_rank[np.maximum(copies, 0) // sizes.slots_per_rank]
    node = np.where(copies >= 0, node, -1).reshape(sizes.num_groups, -1)
    node_of_group = node.max(axis=1)
    kept, gone = np.flatnonzero(node_of_group >= 0), np.flatnonzero(node_of_group < 0)
    room = sizes.num_groups // sizes.num_nodes - np.bincount(
        node_of_group[kept], minlength=sizes.num_nodes
    )
    if (room < 0).any() or ((node >= 0) & (node != node_of_group[:, None])).any():
        raise ValueError(
            f"previous has groups of layer {layer} on several nodes, or not as many on each of the "
            f"{sizes.num_nodes} nodes; allowed: a placement planned with the same num_nodes and "
            "num_groups"
        )
    of_group = load.reshape(sizes.num_groups, -1).sum(axis=1)
    of_node = np.bincount(node_of_group[kept], of_group[kept], minlength=sizes.num_nodes)
    for group in gone[np.argsort(-of_group[gone], kind="stable")]:
        lightest = np.where(room > 0, of_node, np.inf).argmin()
        node_of_group[group] = lightest
        room[lightest] -= 1
        of_node[lightest] += of_group[group]
    return np.repeat(node_of_group, sizes.num_experts // sizes.num_groups)


# --- arguments ---------------------------------------------------------------------------------


def _sizes(
    loads: np.ndarray,
    num_ranks: int,
    slots_per_rank: int,
    num_nodes: int,
    num_groups: int | None,
    alive: ArrayLike | None,
    max_copies: int | None,
) -> _Sizes:
    numbers = {"num_ranks": num_ranks, "slots_per_rank": slots_per_rank, "num_nodes": num_nodes}
    optional = {"num_groups": num_groups, "max_copies": max_copies}
    numbers |= {name: value for name, value in optional.items() if value is not None}
    for name, value in numbers.items():
        if not is_int(value):
            raise ValueError(f"{name} is {value!r}; allowed: an int from 1 to {INT32_MAX}")
    num_experts = loads.shape[1]
    living = np.ones(num_ranks, bool) if alive is None else as_alive(alive, num_ranks)
    if not living.any():
        raise ValueError("alive has no rank; allowed: at least one True")
    if num_ranks == 1 and slots_per_rank > num_experts:
        raise ValueError(
            f"slots_per_rank is {slots_per_rank}; allowed with 1 rank: {num_experts}, one for each "
            "expert, because copies on one rank are of no use"
        )
    if max_copies is None:
        max_copies = min(num_ranks, _DEFAULT_MOST)
    groups = num_nodes if num_groups is None else num_groups
    if num_nodes > 1 and num_groups is None:
        raise ValueError(f"num_groups is None with num_nodes {num_nodes}; allowed: both of them")
    if num_ranks % num_nodes:
        raise ValueError(f"num_nodes is {num_nodes}; allowed: divisors of num_ranks {num_ranks}")
    if groups % num_nodes:
        raise ValueError(f"num_groups is {groups}; allowed: multiples of num_nodes {num_nodes}")
    if num_experts % groups:
        raise ValueError(f"num_groups is {groups}; allowed: divisors of the {num_experts} experts")
    return _Sizes(num_experts, slots_per_rank, num_nodes, groups, max_copies, living)


def _check_room(num_experts: int, num_ranks: int, node: int, sizes: _Sizes) -> None:
    if num_ranks * sizes.slots_per_rank >= num_experts:
        return
    where = f" of node {node}" if sizes.num_nodes > 1 else ""
    whose = "its" if sizes.num_nodes > 1 else "all"
    if not num_ranks:
        raise ValueError(
            f"alive has no rank{where}; allowed: at least one that holds {whose} experts"
        )
    least = -(-num_experts // num_ranks)
    raise ValueError(
        f"slots_per_rank is {sizes.slots_per_rank}; allowed: at least {least}, so that "
        f"{num_ranks} alive ranks{where} hold {whose} {num_experts} experts"
    )


def _check_previous(previous: ExpertPlacement, loads: np.ndarray, sizes: _Sizes) -> None:
    has = (*previous.copies.shape[:2], previous.num_ranks, previous.slots_per_rank)
    wanted = (*loads.shape, len(sizes.alive), sizes.slots_per_rank)
    if has != wanted:
        raise ValueError(
            f"previous has (layers, experts, ranks, slots of a rank) {has}; allowed: {wanted}"
        )
    count = (previous.copies >= 0).sum(axis=2)
    if count.max() > sizes.max_copies:
        layer, expert = divmod(int(count.argmax()), count.shape[1])
        raise ValueError(
            f"max_copies is {sizes.max_copies}, and expert {expert} of layer {layer} has "
            f"{count[layer, expert]} copies"
        )


def _warn_of_few_copies(loads: np.ndarray, sizes: _Sizes) -> None:
    """Says what `max_copies` costs, if it costs something."""
    num_alive = int(sizes.alive.sum())
    if sizes.max_copies >= num_alive or sizes.num_nodes > 1:
        return
    num_slots = num_alive * sizes.slots_per_rank
    if num_slots < sizes.num_experts:
        return  # an error, in a moment
    costs = []  # (with per without, layer, wanted copies, with, without), of layers where it costs
    for layer, load in enumerate(loads):
        mean = load.cumsum()[-1] / num_alive
        capped = packing.replicate(load, num_slots, sizes.max_copies)
        with_limit = max(mean, (load / capped).max())
        if with_limit <= mean * _COSTS:
            continue
        free = packing.replicate(load, num_slots, num_alive)
        without = max(mean, (load / free).max())
        if with_limit > without * _COSTS:
            found = (free.max(), with_limit / mean, without / mean)
            costs.append((with_limit / without, -layer, *found))
    if costs:
        _, layer, wanted, with_limit, without = max(costs)
        _logger.warning(
            "max_copies is %d, which makes %d of %d layers less even; layer %d wants %d copies of "
            "an expert: its hottest rank gets at least %.3f of the mean, %.3f without that limit",
            *(sizes.max_copies, len(costs), len(loads), -layer, wanted, with_limit, without),
        )
