# SPDX-License-Identifier: Apache-2.0
"""The tensors of a checkpoint, read one expert at a time in the orientation of our layers."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

LAYOUTS = ("torch", "jax")
# What a fused argument holds.
_FUSED = {
    "gate_up": ("gate", "up"),
    "bias_gate_up": ("bias_gate", "bias_up"),
    "shared_gate_up": ("shared_gate", "shared_up"),
}
# Argument -> the parameter, where they are called differently.
_PARAMS = {"gate": "w_gate", "up": "w_up", "down": "w_down"}
# Argument -> dimensions of one item of it, without that of the experts.
_EXPERT_NDIM = {
    "gate": 2,
    "up": 2,
    "gate_up": 2,
    "down": 2,
    "bias_gate": 1,
    "bias_up": 1,
    "bias_gate_up": 1,
    "bias_down": 1,
}
_DENSE_NDIM = {
    "router": 2,
    "router_bias": 1,
    "selection_bias": 1,
    "shared_gate": 2,
    "shared_up": 2,
    "shared_gate_up": 2,
    "shared_down": 2,
    "shared_expert_gate": 2,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """What one parameter is made of.

    Attributes:
        argument: of `load_experts`, for messages.
        value: an array, a list of them by expert, or functions that return such.
        layout: "torch" or "jax"; means nothing to vectors.
        layout_argument: which argument says so.
        ndim: dimensions of one item.
        per_expert: whether there is an item for each expert.
        num_experts: how many; 0 where there is one item for all.
        item_shape: as the checkpoint has it.
        dtype: of the first item.
        part: of the outputs, what is read: "all", "first" half, "second" half, "even", "odd".
    """

    argument: str
    value: Any
    layout: str
    layout_argument: str
    ndim: int
    per_expert: bool
    num_experts: int
    item_shape: tuple[int, ...]
    dtype: np.dtype
    part: str = "all"

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole, as the layer has it but for experts that pad."""
        experts = (self.num_experts,) if self.per_expert else ()
        return (*experts, *_oriented(self.item_shape, self.layout, self.part))

    def read(self, expert: int = 0) -> np.ndarray:
        """An item, `[in, out]` or a vector.

        Raises:
            ValueError: it is unlike the first one.
        """
        item = _item(self.value, expert if self.per_expert else None)
        if item.shape != self.item_shape:
            raise ValueError(
                f"{self.argument}[{expert}] is {item.dtype}{list(item.shape)}; allowed: "
                f"{list(self.item_shape)}, as {self.argument}[0] is"
            )
        _check_dtype(self.argument, item.dtype)
        if self.part != "all":
            half = _outputs(item.shape, self.layout) // 2
            taken = {
                "first": slice(half),
                "second": slice(half, None),
                "even": slice(None, None, 2),
                "odd": slice(1, None, 2),
            }[self.part]
            item = item[taken] if _out_axis(item.shape, self.layout) == 0 else item[:, taken]
        return item.T if self.layout == "torch" else item

    def check(self, allowed: Sequence[int], dims: Sequence[str | int], of: str) -> None:
        """Raises unless the whole has the allowed shape.

        Args:
            allowed: the shape, experts that pad not counted.
            dims: what they are called, for the message.
            of: who has that shape, for the message.

        Raises:
            ValueError: it has not; the message names the layout that would fit.
        """
        allowed = tuple(allowed)
        if self.shape == allowed:
            return
        first = 1 if self.per_expert else 0
        names = ", ".join(str(d) for d in dims[first:])
        count = f"{self.num_experts} x " if self.per_expert else ""
        reads = ""
        if self.ndim == 2:
            own = ", ".join(map(str, self.shape[first:]))
            reads = f", which {self.layout_argument}={self.layout!r} reads as [{names}] = [{own}]"
        want = f"{allowed[0]} x " if self.per_expert else ""
        raise ValueError(
            f"{self.argument} is {count}{self.dtype}{list(self.item_shape)}{reads}; allowed: "
            f"{want}[{names}] = {list(allowed[first:])}, as {of} has{self._what_fits(allowed, of)}"
        )

    def _what_fits(self, allowed: tuple[int, ...], of: str) -> str:
        first = 1 if self.per_expert else 0
        if self.shape[first:] == allowed[first:]:
            is_padded = of == "the layer" and self.shape < allowed
            return ". pad_experts=True adds experts of zeros" if is_padded else ""
        fused = next((f for f, parts in _FUSED.items() if self.argument in parts), None)
        as_others = [(self.argument, self.part)]
        if fused is not None:
            as_others.append((fused, "first"))
        if self.argument in _FUSED:
            as_others += [(name, "all") for name in _FUSED[self.argument]]
        for argument, part in as_others:
            for layout in dict.fromkeys((self.layout, *LAYOUTS)):
                if _oriented(self.item_shape, layout, part) != allowed[first:]:
                    continue
                found = f"passed as {argument}" if argument != self.argument else ""
                if layout != self.layout:
                    found += f"{' ' if found else ''}with {self.layout_argument}={layout!r}"
                    transposed = "or its transpose (swapaxes(-1, -2)) where the others fit"
                    return f". It would fit {found}, {transposed}"
                return f". It would fit {found}"
        return ". No layout would fit"


def _out_axis(item_shape: Sequence[int], layout: str) -> int:
    return 0 if len(item_shape) == 1 or layout == "torch" else 1


def _outputs(item_shape: Sequence[int], layout: str) -> int:
    return item_shape[_out_axis(item_shape, layout)]


def _oriented(item_shape: tuple[int, ...], layout: str, part: str) -> tuple[int, ...]:
    """The shape `[in, out]` of an item's part; an odd number of outputs has no halves."""
    shape = list(item_shape)
    if part != "all":
        axis = _out_axis(item_shape, layout)
        shape[axis] = shape[axis] // 2 if shape[axis] % 2 == 0 else -1
    return tuple(reversed(shape)) if layout == "torch" else tuple(shape)


# --- from arguments ----------------------------------------------------------------------------


def find_sources(
    arguments: Mapping[str, Any], layout: str, dense_layout: str, interleaved: bool
) -> dict[str, Source]:
    """What each parameter is made of, by the parameter's name.

    Args:
        arguments: those of `load_experts` that were passed; others than tensors are ignored.
        layout: of experts.
        dense_layout: of the router and of the shared expert.
        interleaved: whether fused ones alternate.

    Raises:
        ValueError: none was passed, two say the same, or one is no tensor of its dimensions.
    """
    layouts = {
        "layout": (layout, _EXPERT_NDIM),
        "dense_layout" if dense_layout != layout else "layout ": (dense_layout, _DENSE_NDIM),
    }
    found: dict[str, Source] = {}
    for layout_argument, (of_these, ndims) in layouts.items():
        for argument, ndim in ndims.items():
            if argument not in arguments:
                continue
            source = _source(
                argument,
                arguments[argument],
                layout=of_these,
                layout_argument=layout_argument.strip(),
                ndim=ndim,
                per_expert=ndims is _EXPERT_NDIM,
            )
            if argument in _FUSED and _outputs(source.item_shape, of_these) % 2:
                raise ValueError(
                    f"{argument} is {source.dtype}{list(source.item_shape)} with "
                    f"{source.layout_argument}={of_these!r}; allowed: an even number of outputs"
                )
            for name, part in _parts(argument, interleaved).items():
                if name in found:
                    raise ValueError(
                        f"{found[name].argument} and {argument} were both passed; allowed: "
                        "gate and up, or both in one"
                    )
                found[name] = dataclasses.replace(source, part=part)
    if not found:
        raise ValueError(
            "load_experts got no tensor; allowed: at least one of "
            f"{', '.join((*_EXPERT_NDIM, *_DENSE_NDIM))}"
        )
    return found


def _parts(argument: str, interleaved: bool) -> dict[str, str]:
    """The parameters that an argument holds, and which part of its outputs each is."""
    if argument not in _FUSED:
        return {_PARAMS.get(argument, argument): "all"}
    parts = ("even", "odd") if interleaved else ("first", "second")
    return {_PARAMS.get(n, n): part for n, part in zip(_FUSED[argument], parts, strict=True)}


def _source(argument: str, value: Any, *, ndim: int, per_expert: bool, **options: Any) -> Source:
    if callable(value):
        value = functools.cache(value)
    whole = value() if callable(value) else value
    is_list = isinstance(whole, Sequence)
    if is_list and (not per_expert or not whole):
        raise ValueError(
            f"{argument} is a {type(whole).__name__} of {len(whole)}; allowed: "
            f"{'at least one expert' if per_expert else 'an array'}"
        )
    first = _item(value, 0 if is_list else None, whole_shape=not is_list)
    shape = tuple(first.shape)
    dims = ndim if is_list or not per_expert else ndim + 1
    if len(shape) != dims:
        hint = ""
        if per_expert:
            hint = f": one for each expert, stacked, or a list of arrays of {ndim} dimensions"
        of = "[0]" if is_list else ""
        raise ValueError(
            f"{argument}{of} is {first.dtype}{list(shape)}; allowed: {dims} dimensions{hint}"
        )
    _check_dtype(argument, first.dtype)
    stacked = per_expert and not is_list
    return Source(
        argument=argument,
        value=value,
        ndim=ndim,
        per_expert=per_expert,
        num_experts=(shape[0] if stacked else len(whole)) if per_expert else 0,
        item_shape=shape[1:] if stacked else shape,
        dtype=np.dtype(first.dtype),
        **options,
    )


def _item(value: Any, expert: int | None, *, whole_shape: bool = False) -> Any:
    """One expert's array in NumPy, or all of it; with `whole_shape` what has shape and dtype."""
    value = value() if callable(value) else value
    if expert is not None:  # before it is converted, which may take a copy
        value = value[expert]
        value = value() if callable(value) else value
    if hasattr(value, "detach"):
        value = _of_torch(value)
    if whole_shape and hasattr(value, "shape") and hasattr(value, "dtype"):
        return value
    return np.asarray(value)


def _of_torch(tensor: Any) -> np.ndarray:
    """A tensor of PyTorch, which gives NumPy no bfloat16. No copy if it is on the CPU."""
    tensor = tensor.detach().cpu().contiguous()
    return np.asarray(jax.dlpack.from_dlpack(tensor))


def _check_dtype(argument: str, dtype: Any) -> None:
    if not jnp.issubdtype(dtype, jnp.floating) or np.dtype(dtype).itemsize < 2:
        raise ValueError(
            f"{argument} is {dtype}; allowed: floating point of 16 bits or more. Quantized values "
            "mean nothing without their scales: multiply these in first, or keep them quantized "
            "with jax_ep.experts.QuantizedMatrices"
        )
