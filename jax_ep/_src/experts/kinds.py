# SPDX-License-Identifier: Apache-2.0
"""What an expert computes: static descriptions, hashable, without weights."""

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jax_ep._src.experts.matrices import Dims, Product, add_bias, product_with
from jax_ep._src.grouped_dot import grouped_dot
from jax_ep._src.public import set_module
from jax_ep._src.quantized import QuantizedRows
from jax_ep._src.types import Dispatched

Activation = Callable[[jax.Array], jax.Array]
Weights = Mapping[str, Any]

_UP: Dims = ("experts", "hidden", "ffn")
_DOWN: Dims = ("experts", "ffn", "hidden")
_UP_BIAS: Dims = ("experts", "ffn")
_DOWN_BIAS: Dims = ("experts", "hidden")


@set_module("jax_ep.experts")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Experts(abc.ABC):
    """What each expert computes of its rows. Subclass it, frozen, for another kind.

    Where `ffn` is split over devices (tensor parallelism), each of them computes its part, and the
    parts of the result are added up. So what is after the last product over `ffn` has to be linear,
    and `output_biases` are given to one of the devices, and zeros to the others.
    """

    @abc.abstractmethod
    def dims(self) -> dict[str, Dims]:
        """The weights by name, and what their dimensions are along, that of experts first."""

    def all_dims(self) -> dict[str, Dims]:
        """`dims()`, and the same of weights that may be left out."""
        return self.dims()

    @abc.abstractmethod
    def inner(self, recv: Dispatched, weights: Weights) -> Any:
        """What is computed first, of the rows; a pytree."""

    @abc.abstractmethod
    def outer(self, recv: Dispatched, inner: Any, weights: Weights) -> jax.Array:
        """`[C, H]`: the rest, of what `inner` gave, without the rows of `recv`."""

    @property
    def output_biases(self) -> tuple[str, ...]:
        """Names of the weights that are added to the result."""
        return ()

    def __call__(self, recv: Dispatched, weights: Weights) -> jax.Array:
        """`[C, H]`: the experts' results of the received rows."""
        return self.outer(recv, self.inner(recv, weights), weights)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _FeedForward(Experts):
    """Matrices up, something elementwise, matrices down."""

    product: Product | None = None
    bias: bool = False

    def dims(self) -> dict[str, Dims]:
        """The weights' names and dimensions."""
        every = self.all_dims().items()
        return {name: dims for name, dims in every if self.bias or not name.startswith("bias_")}

    @property
    def output_biases(self) -> tuple[str, ...]:
        return ("bias_down",)

    def _up(self, name: str, recv: Dispatched, weights: Weights) -> jax.Array:
        assert not isinstance(recv.x, QuantizedRows)
        y = product_with(
            recv.x, weights[f"w_{name}"], recv.group_sizes, self.product or grouped_dot
        )
        y = add_bias(y, weights.get(f"bias_{name}"), recv.group_sizes)
        return checkpoint_name(y, f"jax_ep.{name}")

    def _down(self, rows: jax.Array, recv: Dispatched, weights: Weights) -> jax.Array:
        y = product_with(rows, weights["w_down"], recv.group_sizes, self.product or grouped_dot)
        return add_bias(y, weights.get("bias_down"), recv.group_sizes)


@set_module("jax_ep.experts")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Gated(_FeedForward):
    """`(activation(x @ w_gate + bias_gate) * (x @ w_up + bias_up)) @ w_down + bias_down`.

    Attributes:
        activation: of the gate, elementwise; the same function for equal layers.
        bias: whether a layer makes the three biases.
        product: a grouped product in place of `jax.lax.ragged_dot`: rows `[C, A]`, matrices
            `[L, A, B]`, group sizes `[L]` to `[C, B]`, differentiable where it is trained.
    """

    activation: Activation = jax.nn.silu

    def all_dims(self) -> dict[str, Dims]:
        """The weights' names and dimensions, with those of biases."""
        biases = {"bias_gate": _UP_BIAS, "bias_up": _UP_BIAS, "bias_down": _DOWN_BIAS}
        return {"w_gate": _UP, "w_up": _UP, "w_down": _DOWN, **biases}

    def inner(self, recv: Dispatched, weights: Weights) -> Any:
        """The products with `w_gate` and `w_up`."""
        return self._up("gate", recv, weights), self._up("up", recv, weights)

    def outer(self, recv: Dispatched, inner: Any, weights: Weights) -> jax.Array:
        """The product with `w_down`."""
        gate, up = inner
        return self._down(self._gated(gate, up), recv, weights)

    def _gated(self, gate: jax.Array, up: jax.Array) -> jax.Array:
        return self.activation(gate) * up


@set_module("jax_ep.experts")
@dataclasses.dataclass(frozen=True, kw_only=True)
class GptOss(Gated):
    """The experts of gpt-oss: clamped, with `(up + 1) * gate * sigmoid(alpha * gate)`.

    The gate is at most `limit`, up is from `-limit` to `limit`, both with their biases
    (OpenAI 2025, gpt-oss model card, arXiv:2508.10925). `activation` is not used.

    Attributes:
        limit: of the clamp.
        alpha: in the sigmoid.
        bias: whether a layer makes the three biases.
    """

    bias: bool = True
    limit: float = 7.0
    alpha: float = 1.702

    def _gated(self, gate: jax.Array, up: jax.Array) -> jax.Array:
        gate = jnp.minimum(gate, self.limit)
        up = jnp.clip(up, -self.limit, self.limit)
        return (up + 1) * (gate * jax.nn.sigmoid(self.alpha * gate))


@set_module("jax_ep.experts")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Ungated(_FeedForward):
    """`activation(x @ w_up + bias_up) @ w_down + bias_down`, as in Switch and Nemotron.

    Attributes:
        activation: elementwise; the same function for equal layers.
        bias: whether a layer makes the two biases.
        product: as in `Gated`.
    """

    activation: Activation = jax.nn.relu

    def all_dims(self) -> dict[str, Dims]:
        """The weights' names and dimensions, with those of biases."""
        biases = {"bias_up": _UP_BIAS, "bias_down": _DOWN_BIAS}
        return {"w_up": _UP, "w_down": _DOWN, **biases}

    def inner(self, recv: Dispatched, weights: Weights) -> Any:
        """The product with `w_up`."""
        return self._up("up", recv, weights)

    def outer(self, recv: Dispatched, inner: Any, weights: Weights) -> jax.Array:
        """The product with `w_down`."""
        return self._down(self.activation(inner), recv, weights)


# `arrays` in the order of the names, so that equal ones are found equal.
@set_module("jax_ep.experts")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Custom(Experts):
    """A function of the received rows and weights of one's own.

    Attributes:
        function: `function(recv, weights) -> y [C, H]` of `config.dtype`; `recv` is a `Dispatched`,
            `weights` a dict. The same function for equal layers.
        arrays: name and dimensions of each weight: "experts", "hidden", "ffn", or an int, the size
            of one that is not split; that of experts first.
        added_last: names of the weights that are added to the result, see `output_biases`.
    """

    function: Callable[[Dispatched, dict[str, Any]], jax.Array]
    arrays: tuple[tuple[str, Dims], ...]
    added_last: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        names = {name for name, _ in self.arrays}
        if unknown := sorted(set(self.added_last) - names):
            raise ValueError(
                f"output_biases has {unknown}; allowed: names of the weights, {sorted(names)}"
            )

    def dims(self) -> dict[str, Dims]:
        """The weights' names and dimensions."""
        return dict(self.arrays)

    @property
    def output_biases(self) -> tuple[str, ...]:
        """Names of the weights that are added to the result."""
        return self.added_last

    def inner(self, recv: Dispatched, weights: Weights) -> Any:
        """The result: what of it is to be computed again is not known."""
        return self.function(recv, dict(weights))

    def outer(self, recv: Dispatched, inner: Any, weights: Weights) -> jax.Array:
        """The result."""
        del recv, weights
        return inner
