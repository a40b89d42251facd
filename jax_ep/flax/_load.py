# SPDX-License-Identifier: Apache-2.0
"""Puts the weights of checkpoints into the arrays of our layers: `load_experts`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_ep._src.balancing.arrays import PlacementArrays
from jax_ep._src.public import set_module
from jax_ep.flax._sources import LAYOUTS, Source, find_sources

# What the dimensions of a layer's arrays are: experts (with those that pad), all that the router
# knows, hidden, inner size, inner size of the shared expert.
_DIMS: dict[str, tuple[str | int, ...]] = {
    "w_gate": ("L", "H", "F"),
    "w_up": ("L", "H", "F"),
    "w_down": ("L", "F", "H"),
    "bias_gate": ("L", "F"),
    "bias_up": ("L", "F"),
    "bias_down": ("L", "H"),
    "router": ("H", "E"),
    "router_bias": ("E",),
    "selection_bias": ("E",),
    "shared_gate": ("H", "S"),
    "shared_up": ("H", "S"),
    "shared_down": ("S", "H"),
    "shared_expert_gate": ("H", 1),
}
# The router decides by small differences, in float32 whatever the experts have.
_OF_ROUTER = ("router", "router_bias", "selection_bias")


@dataclasses.dataclass(frozen=True)
class _Target:
    """An array to be made. No sharding: in NumPy, or `on_default_device`."""

    shape: tuple[int, ...]
    dtype: np.dtype
    sharding: Any = None
    on_default_device: bool = False


@set_module("jax_ep.flax")
def load_experts(
    layer: Any = None,
    *,
    layout: str,
    gate: Any = None,
    up: Any = None,
    down: Any = None,
    gate_up: Any = None,
    interleaved: bool = False,
    bias_gate: Any = None,
    bias_up: Any = None,
    bias_down: Any = None,
    bias_gate_up: Any = None,
    router: Any = None,
    router_bias: Any = None,
    selection_bias: Any = None,
    shared_gate: Any = None,
    shared_up: Any = None,
    shared_down: Any = None,
    shared_gate_up: Any = None,
    shared_expert_gate: Any = None,
    dense_layout: str | None = None,
    pad_experts: bool | int = False,
    placement: PlacementArrays | None = None,
    dtype: Any = None,
) -> dict[str, Any]:
    """Puts the weights of a checkpoint into arrays as `jax_ep.flax`'s layers have them.

    `layout` says how matrices lie in the checkpoint. It is never guessed, because where `H = F`
    both would fit:

    | | `layout="torch"`, `[out, in]` as in `nn.Linear` | `layout="jax"`, `[in, out]` |
    |---|---|---|
    | `gate`, `up` | `[F, H]` | `[H, F]` |
    | `gate_up`: both in one | `[2F, H]` | `[H, 2F]` |
    | `down` | `[H, F]` | `[F, H]` |
    | `router` | `[E, H]` | `[H, E]` |

    In `gate_up` come all of the gate and then all of up, or with `interleaved=True` the gate at
    even and up at odd places (gpt-oss). Where they lie otherwise, pass slices as `gate` and `up`.

    Experts come stacked, `[E, ...]`, or as a list of one by expert; a list may also hold functions
    without arguments that return an array (and so may an argument), which are called when that
    expert is needed. An array is made shard by shard: a process reads the experts that its own
    devices hold (and the first one, whose shape is checked), and has no copy of all of them.

    After an error some arrays may have been written, and others not. What is not passed is left
    alone, so that a layer may be filled by several calls.

    Args:
        layer: where the weights go. An `jax_ep.flax.nnx.MoE`: they are written into it, with the
            dtype and the sharding that its parameters have. A dict of the (unboxed) parameters of
            a `jax_ep.flax.linen.MoE`, arrays or `jax.ShapeDtypeStruct` with shardings: it says
            which shapes, dtypes and shardings are returned. None: NumPy arrays are returned.
        layout: "torch" or "jax"; of what has no `dense_layout`.
        gate: matrices of the gate, for gated experts. Floating point of 16 bits or more.
        up: matrices of the way up; for experts without a gate the only ones.
        down: matrices of the way down.
        gate_up: in place of `gate` and `up`.
        interleaved: how gate and up share `gate_up`, `bias_gate_up` and `shared_gate_up`.
        bias_gate: `[F]` of each expert.
        bias_up: `[F]` of each expert.
        bias_down: `[H]` of each expert.
        bias_gate_up: `[2F]` of each expert, in place of `bias_gate` and `bias_up`.
        router: one matrix; becomes float32.
        router_bias: `[E]`, added to the logits.
        selection_bias: `[E]`, what DeepSeek-V3 calls `e_score_correction_bias`.
        shared_gate: one matrix, as `gate` with the inner size of the shared expert.
        shared_up: one matrix, as `up`.
        shared_down: one matrix, as `down`.
        shared_gate_up: one matrix, in place of `shared_gate` and `shared_up`.
        shared_expert_gate: one matrix, `[1, H]` in layout "torch" and `[H, 1]` in "jax".
        dense_layout: of `router` and `shared_*`, where it is another than that of the experts: in
            Hugging Face's gpt-oss and Llama 4 it is "torch", and that of the experts "jax".
        pad_experts: whether experts of zeros follow, up to the number that `layer` has, or the
            number of experts that there are then. A layer whose `EpConfig.pad_experts` is True
            does so without being told. The router gets no columns for them.
        placement: where `replicas` is "stored" in a Linen layer, or without a layer: what is made
            has an expert for each slot, `[P, ...]`. An NNX layer has its own.
        dtype: of what is returned without a layer; None: as it comes. The router's is float32.

    Returns:
        What was made, by the names of the layer's parameters: `w_gate`, `w_up` `[E, H, F]`,
        `w_down` `[E, F, H]`, `bias_*`, `router` `[H, E]`, ... Those of an `nnx.MoE` are in it
        already.

    Raises:
        ValueError: an argument has a value, a shape or a dtype that is not allowed, or the layer
            has no such parameter. Where another layout would fit, the message names it.
    """
    arguments = {name: value for name, value in locals().items() if value is not None}
    _check_layouts(layout, dense_layout)
    sources = find_sources(arguments, layout, dense_layout or layout, interleaved)
    params = _params_of(layer)
    if params is not None:
        _check_names(sources, params)
    slots = _slots(layer, placement)
    sizes, num_experts = _sizes(sources, params, layer, pad_experts, slots)
    of = "the rest" if params is None else "the layer"
    for name, source in sources.items():
        in_checkpoint = [num_experts if dim == "L" else _size(sizes, dim) for dim in _DIMS[name]]
        source.check(in_checkpoint, _DIMS[name], of)
    made = {}
    for name in tuple(sources):
        source = sources.pop(name)  # so that what it has read may be forgotten
        param = None if params is None else params[name]
        made[name] = _make(source, _target(name, source, sizes, param, dtype), slots)
        if hasattr(param, "set_value"):
            param.set_value(made[name])
    return made


def _check_layouts(layout: str, dense_layout: str | None) -> None:
    for name, value in (("layout", layout), ("dense_layout", dense_layout)):
        if value not in LAYOUTS and not (name == "dense_layout" and value is None):
            raise ValueError(
                f"{name} is {value!r}; allowed: 'torch' (matrices are [out, in]) or 'jax' ([in, "
                "out]). Gate and up in one matrix are passed as gate_up, with interleaved=True "
                "where they alternate"
            )


def _params_of(layer: Any) -> dict[str, Any] | None:
    """The arrays that a layer has, by name; variables where it is one of NNX."""
    if layer is None:
        return None
    if isinstance(layer, Mapping):
        params = {name: layer[name] for name in _DIMS if name in layer}
        for name, value in params.items():
            if not hasattr(value, "shape") or not hasattr(value, "dtype"):
                raise ValueError(
                    f"layer[{name!r}] is a {type(value).__name__}; allowed: an array, or a "
                    "jax.ShapeDtypeStruct (flax.linen.unbox gives them)"
                )
    else:
        params = {name: getattr(layer, name, None) for name in _DIMS}
        params = {name: value for name, value in params.items() if hasattr(value, "set_value")}
    if not params:
        raise ValueError(
            f"layer is a {type(layer).__name__}; allowed: a jax_ep.flax.nnx.MoE, a dict of the "
            "parameters of a jax_ep.flax.linen.MoE, or None"
        )
    for name, value in params.items():
        if len(_array(value).shape) != len(_DIMS[name]):
            raise ValueError(
                f"layer has {name} {list(_array(value).shape)}; allowed: one layer, where it has "
                f"{len(_DIMS[name])} dimensions. Load stacked layers one by one, without a layer, "
                "and stack what is returned"
            )
    return params


def _array(value: Any) -> Any:
    return value.get_value() if hasattr(value, "get_value") else value


def _check_names(sources: Mapping[str, Source], params: Mapping[str, Any]) -> None:
    for name, source in sources.items():
        if name not in params:
            raise ValueError(
                f"{source.argument} was passed, and the layer has no {name}; it has: "
                f"{', '.join(params)}"
            )


# --- sizes -------------------------------------------------------------------------------------


def _sizes(
    sources: Mapping[str, Source],
    params: Mapping[str, Any] | None,
    layer: Any,
    pad_experts: bool | int,
    slots: np.ndarray | None,
) -> tuple[dict[str, int], int]:
    """The size of each dimension in the layer, and how many experts the checkpoint should have."""
    known = [] if params is None else [(n, _array(value).shape) for n, value in params.items()]
    sizes: dict[str, int] = {}
    for name, shape in [*known, *((name, source.shape) for name, source in sources.items())]:
        for dim, size in zip(_DIMS[name], shape, strict=True):
            sizes.setdefault(str(dim), size)
    counts = [source.num_experts for source in sources.values() if source.per_expert]
    if not counts:
        return sizes, 0
    if slots is not None:
        sizes["L"] = sizes["L"] if params is not None else len(slots)
        if sizes["L"] != len(slots):
            raise ValueError(
                f"placement has {len(slots)} slots; allowed: {sizes['L']}, as the layer has"
            )
        return sizes, int(slots.max()) + 1
    if params is None and pad_experts is not False:
        if isinstance(pad_experts, bool) or pad_experts < counts[0]:
            raise ValueError(
                f"pad_experts is {pad_experts}; allowed without a layer: False, or a number of "
                f"experts that is at least {counts[0]}"
            )
        sizes["L"] = pad_experts
        return sizes, counts[0]
    of_router = None if params is None else sizes.get("E")
    of_router = getattr(getattr(layer, "spec", None), "num_routed", of_router)
    may_pad = pad_experts or of_router == counts[0]
    # What is not padding can be selected, and has to be in the checkpoint.
    if of_router is not None and of_router not in (sizes["L"], counts[0]):
        return sizes, of_router
    return sizes, counts[0] if may_pad and counts[0] < sizes["L"] else sizes["L"]


def _slots(layer: Any, placement: PlacementArrays | None) -> np.ndarray | None:
    """The expert of each slot, -1 where there is none; None: experts come in their order."""
    spec = getattr(layer, "spec", None)
    if spec is not None and placement is not None:
        raise ValueError("placement is given, and the layer has its own; allowed with it: None")
    if spec is not None and spec.replicas == "stored":
        placement = layer.placement
    if placement is not None and not isinstance(placement, PlacementArrays):
        raise ValueError(
            f"placement is a {type(placement).__name__}; allowed: None, or the PlacementArrays "
            "that ExpertPlacement.layer gives"
        )
    return None if placement is None else np.asarray(placement.slot_expert)


def _size(sizes: Mapping[str, int], dim: str | int) -> int:
    return dim if isinstance(dim, int) else sizes[dim]


def _target(name: str, source: Source, sizes: Mapping[str, int], param: Any, dtype: Any) -> _Target:
    shape = tuple(_size(sizes, dim) for dim in _DIMS[name])
    if param is None:
        own = np.float32 if name in _OF_ROUTER else (dtype or source.dtype)
        return _Target(shape, np.dtype(own))
    array = _array(param)
    if isinstance(array, jax.Array) and not array.committed:
        return _Target(shape, np.dtype(array.dtype), on_default_device=True)
    return _Target(shape, np.dtype(array.dtype), getattr(array, "sharding", None))


# --- arrays ------------------------------------------------------------------------------------


def _make(source: Source, target: _Target, slots: np.ndarray | None) -> Any:
    """The whole array, or the shards of it that this process has."""
    blocks: dict[tuple[tuple[int, int, int], ...], np.ndarray] = {}

    def block(index: Any) -> np.ndarray:  # a tuple of slices
        # Devices that are alike along other axes of the mesh share a block.
        key = tuple(s.indices(n) for s, n in zip(index, target.shape, strict=True))
        if key not in blocks:
            blocks[key] = _read_block(source, key, target.dtype, slots)
        return blocks[key]

    if target.sharding is None:
        whole = block((slice(None),) * len(target.shape))
        return jnp.asarray(whole) if target.on_default_device else whole
    return jax.make_array_from_callback(target.shape, target.sharding, block)


def _read_block(
    source: Source,
    key: tuple[tuple[int, int, int], ...],
    dtype: np.dtype,
    slots: np.ndarray | None,
) -> np.ndarray:
    if not source.per_expert:
        return np.ascontiguousarray(source.read()[tuple(slice(*k) for k in key)], dtype)
    experts, rest = range(*key[0]), tuple(slice(*k) for k in key[1:])
    out = np.zeros((len(experts), *(len(range(*k)) for k in key[1:])), dtype)
    for row, number in zip(out, experts, strict=True):
        expert = number if slots is None else int(slots[number])
        if 0 <= expert < source.shape[0]:
            row[...] = source.read(expert)[rest]
    return out
