# SPDX-License-Identifier: Apache-2.0
"""Layers whose experts have copies: their placement, and the weights of slots."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_ep._src import compat
from jax_ep._src.balancing.arrays import PlacementArrays, check_ranks
from jax_ep._src.balancing.copies import expand_experts
from jax_ep._src.balancing.placement import ExpertPlacement
from jax_ep._src.balancing.planner import plan_placement
from jax_ep._src.checks import check_array, is_array
from jax_ep._src.config import EpConfig
from jax_ep._src.groups.group import EpGroup, kept
from jax_ep._src.limits import is_int
from jax_ep._src.public import set_module
from jax_ep.flax._params import ArraySpec, Initializer

if TYPE_CHECKING:
    from jax_ep.flax._layer import LayerSpec

TABLES = ("slot_expert", "copies", "upper")
_INT32 = np.dtype(np.int32)
# Arrays of a layer that are not its experts'.
OTHERS = {
    *("router", "router_bias", "selection_bias"),
    *("shared_gate", "shared_up", "shared_down", "shared_expert_gate"),
}


def initial_placement(
    group: EpGroup, placement: PlacementArrays | None, num_logical_experts: int | None
) -> PlacementArrays | None:
    """What a layer starts with: the one that is given, or an even one; None: it has no copies.

    Raises:
        ValueError: it does not fit the group, or there are too few slots.
    """
    if placement is None and num_logical_experts is None:
        return None
    if num_logical_experts is not None and not is_int(num_logical_experts):
        raise ValueError(
            f"num_logical_experts is {num_logical_experts!r}; allowed: None, or an int of at least "
            "1, the experts that the router knows"
        )
    num_slots = group.config.num_experts
    if num_slots % group.num_ranks:
        raise ValueError(
            f"placement is given, and EpConfig.num_experts is {num_slots}; allowed with it: a "
            f"multiple of the {group.num_ranks} ranks, slots for each of them"
        )
    if placement is None:
        assert num_logical_experts is not None
        even = np.ones(int(num_logical_experts))
        slots = group.num_local_experts
        return plan_placement(even, num_ranks=group.num_ranks, slots_per_rank=slots).layer(0)
    if not isinstance(placement, PlacementArrays):
        raise ValueError(
            f"placement is a {type(placement).__name__}; allowed: None, or the PlacementArrays "
            "that ExpertPlacement.layer gives"
        )
    num_experts = jnp.shape(placement.copies)[0]
    if num_logical_experts not in (None, num_experts):
        raise ValueError(
            f"num_logical_experts is {num_logical_experts}, and placement is of {num_experts} "
            "experts; allowed: the same number, or None"
        )
    check_ranks("placement", placement, group.num_ranks)
    of = ", a slot for each of EpConfig.num_experts"
    check_array("placement.slot_expert", placement.slot_expert, (num_slots,), _INT32, of=of)
    return placement


def check_placement(old: Mapping[str, Any], new: Any, num_ranks: int | None) -> dict[str, Any]:
    """The tables of a placement, to replace others, by name and where those are.

    Raises:
        ValueError: they have other shapes, or are for another number of ranks.
    """
    if not isinstance(new, PlacementArrays):
        raise ValueError(
            f"arrays is a {type(new).__name__}; allowed: the PlacementArrays that "
            "ExpertPlacement.layer gives"
        )
    if num_ranks is not None:
        check_ranks("arrays", new, num_ranks)
    tables = {}
    for name in TABLES:
        before, after = old[name], compat.as_array(getattr(new, name))
        of = ", as in the placement before"
        check_array(f"arrays.{name}", after, before.shape, _INT32, of=of)
        # As another one has it, so that nothing is compiled again.
        is_traced = any(isinstance(a, jax.core.Tracer) for a in (before, after))
        tables[name] = after if is_traced else jax.device_put(after, before.sharding)
    return tables


def of_slots(values: jax.Array, slot_expert: jax.Array) -> jax.Array:
    """Of experts `[E, ...]`, as slots have them, `[P, ...]`; zeros for a slot without one."""
    slot_expert = jnp.where(slot_expert < 0, values.shape[0], slot_expert)
    return values.at[slot_expert].get(mode="fill", fill_value=0)


def initializer_of(
    spec: "LayerSpec", param: ArraySpec, initializer: Initializer, arrays: PlacementArrays | None
) -> Initializer:
    """An initializer of a whole parameter: copies of an expert have the same values."""
    init = param.init(initializer)
    if arrays is None or spec.replicas != "stored" or not param.of_experts:
        return init
    num_experts, slot_expert = spec.num_routed, arrays.slot_expert

    def init_slots(key: jax.Array, shape: Any, dtype: Any) -> jax.Array:
        return of_slots(init(key, (num_experts, *shape[1:]), dtype), slot_expert)

    return init_slots


# --- weights that are expanded in each step ----------------------------------------------------


def weight_group(spec: "LayerSpec") -> EpGroup:
    """The group over which weights are copied to their slots; it is closed with the layer's."""
    group, config = spec.group, spec.group.config
    rows = max(_rows(spec, param) for param in spec.params().values() if param.of_experts)
    of_weights = EpConfig(
        num_experts=config.num_experts,
        num_topk=spec.max_copies,
        hidden=config.hidden,
        max_tokens_per_rank=spec.num_routed // group.num_ranks * rows,
        recv_capacity=group.num_local_experts * rows,
        dtype=config.dtype,
        max_num_sms=config.max_num_sms,
        low_latency_tokens=0,
        domain_size=config.domain_size,
    )

    def make() -> EpGroup:
        return EpGroup(
            group.mesh,
            group.axis_name,
            of_weights,
            backend=group.backend,
            warn_after=group.warn_after,
            timeout=group.timeout,
        )

    return kept(group, (weight_group, of_weights), make)


def _rows(spec: "LayerSpec", param: ArraySpec) -> int:
    """Rows of `H` elements that a device's part of one expert takes."""
    mesh = spec.group.mesh
    size = math.prod(param.shape[1:])
    for entry in param.partition[1:]:
        axes = (entry,) if isinstance(entry, str) else (entry or ())
        size //= math.prod(mesh.shape[axis] for axis in axes)
    return -(-size // spec.group.config.hidden)


def expanded(
    spec: "LayerSpec", weights: Mapping[str, jax.Array], arrays: PlacementArrays
) -> dict[str, jax.Array]:
    """Inside of `shard_map`: the weights of this rank's slots from those of its experts."""
    group, hidden = weight_group(spec), spec.group.config.hidden

    def expand(weight: jax.Array) -> jax.Array:
        flat = weight.reshape(weight.shape[0], -1)
        # Biases may be no whole rows.
        padding = -flat.shape[1] % hidden
        padded = jnp.pad(flat, ((0, 0), (0, padding)))
        slots = expand_experts(padded, arrays, group=group)
        return slots[:, : flat.shape[1]].reshape(-1, *weight.shape[1:])

    dims = spec.kind.dims()
    with jax.named_scope("jax_ep.expand_experts"):
        return {n: expand(w) if dims[n][:1] == ("experts",) else w for n, w in weights.items()}


# --- checkpoints ---------------------------------------------------------------------------------


@set_module("jax_ep.flax")
def stored_from_logical(
    params: Mapping[str, Any], plan: PlacementArrays | ExpertPlacement
) -> dict[str, Any]:
    """Parameters of a layer with a weight for each slot, from those with one for each expert.

    For layers with `replicas="stored"`: what was trained without copies, or with
    `replicas="expanded"`, becomes what they take. `load_experts` does the same while it reads a
    checkpoint.

    Args:
        params: arrays of one layer by name, of NumPy or JAX: those of experts are `[E, ...]`; those
            of the router and of shared experts stay as they are.
        plan: of the layer: `plan.layer(i)`, or an `ExpertPlacement` of one layer.

    Returns:
        The same names with arrays `[P, ...]`, of NumPy where they were, zeros for a slot without an
        expert. They have to be put where the layer has its own: `jax.device_put(array,
        layer.w_up.get_value().sharding)`.

    Raises:
        ValueError: `plan` is of several layers, or an array has not `E` experts.
    """
    if isinstance(plan, ExpertPlacement):
        if plan.num_layers != 1:
            raise ValueError(
                f"plan is of {plan.num_layers} layers; allowed: that of one, plan.layer(i)"
            )
        plan = plan.layer(0)
    if not isinstance(plan, PlacementArrays):
        raise ValueError(
            f"plan is a {type(plan).__name__}; allowed: an ExpertPlacement, or what its layer gives"
        )
    num_experts = plan.copies.shape[0]
    slot_expert = np.asarray(plan.slot_expert)
    stored = {}
    for name, value in params.items():
        array = compat.as_array(value)
        if name in OTHERS:
            stored[name] = array
            continue
        if not is_array(array) or array.ndim == 0 or array.shape[0] != num_experts:
            got = list(array.shape) if is_array(array) else type(array).__name__
            raise ValueError(f"params has {name!r}, {got}; allowed: [{num_experts}, ...]")
        if isinstance(array, np.ndarray):
            is_empty = (slot_expert < 0).reshape(-1, *[1] * (array.ndim - 1))
            stored[name] = np.where(is_empty, np.zeros((), array.dtype), array[slot_expert])
        else:
            stored[name] = of_slots(array, jnp.asarray(slot_expert))
    return stored


def sizes_of(arrays: PlacementArrays | None) -> dict[str, Any]:
    """Fields of `LayerSpec`."""
    if arrays is None:
        return {}
    num_experts, max_copies = arrays.copies.shape
    return {"num_logical_experts": num_experts, "max_copies": max_copies}


def as_arrays(tables: Mapping[str, Any], num_ranks: int) -> PlacementArrays:
    """From the tables by name."""
    own: dict[str, Any] = {name: tables[name] for name in TABLES}
    return PlacementArrays(**own, num_ranks=num_ranks)


def as_tables(arrays: PlacementArrays) -> dict[str, Any]:
    """By name."""
    return {name: getattr(arrays, name) for name in TABLES}
