# SPDX-License-Identifier: Apache-2.0
"""Experts with their weights: what `moe_with_experts` and `sharded_moe` take."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, get_args

import jax

from jax_ep._src.checks import check_array, is_array
from jax_ep._src.compat import as_array
from jax_ep._src.experts.kinds import Activation, Custom, Experts, Gated, GptOss, Ungated
from jax_ep._src.experts.matrices import Dim, Dims, Matrices, Product, check_matrices, leaf_dims
from jax_ep._src.groups.group import EpGroup
from jax_ep._src.public import set_module
from jax_ep._src.types import Dispatched

_DIMS = get_args(get_args(Dim)[0])


@set_module("jax_ep.experts")
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ExpertWeights:
    """A kind of experts and their weights; a pytree, and a function of what was received.

    Inside of `shard_map` the weights are this rank's (`L` experts), for `moe_with_experts`;
    outside they are the group's (`E` experts), for `sharded_moe`.

    Attributes:
        kind: what is computed.
        weights: by name, as `kind.dims()` has them.
    """

    kind: Experts = dataclasses.field(metadata={"static": True})
    weights: dict[str, Any]

    def __call__(self, recv: Dispatched) -> jax.Array:
        """`[C, H]`: the experts' results of the received rows."""
        return self.kind(recv, self.weights)

    def leaf_dims(self) -> list[Dims]:
        """What the dimensions of each leaf are along, in the order of the pytree's leaves."""
        dims = self.kind.all_dims()
        return [
            d for name in sorted(self.weights) for d in leaf_dims(self.weights[name], dims[name])
        ]

    def check(self, group: EpGroup, *, num_experts: int | None = None) -> None:
        """Raises ValueError unless the weights are those of a group's rank, or of `num_experts`."""
        num = group.num_local_experts if num_experts is None else num_experts
        of = f", of the {num} experts on each of the group's {group.num_ranks} ranks"
        if num_experts is not None:
            of = f", of the group's {num} experts"
        sizes: dict[Any, int | str] = {"experts": num, "hidden": group.config.hidden, "ffn": "F"}
        for name, dims in self.kind.all_dims().items():
            if name not in self.weights:
                continue
            weight = as_array(self.weights[name])
            if sizes["ffn"] == "F" and "ffn" in dims:
                sizes["ffn"] = _ffn_of(weight, dims, group.config.hidden)
            shape = tuple(
                d if isinstance(d, int) else sizes.get(d, f"d{i}") for i, d in enumerate(dims)
            )
            is_own = isinstance(self.kind, Custom) and is_array(weight)
            dtype = weight.dtype if is_own else group.config.dtype
            check = check_matrices if len(dims) == 3 else check_array
            check(name, weight, shape, dtype, of=of)


def _ffn_of(weight: Any, dims: Dims, hidden: int) -> int | str:
    """`F` as the first of the weights has it, if that has `H` where it should."""
    shape = weight.shape if is_array(weight) or isinstance(weight, Matrices) else ()
    fits = len(shape) == len(dims) and all(
        size == hidden for size, dim in zip(shape, dims, strict=True) if dim == "hidden"
    )
    return shape[dims.index("ffn")] if fits else "F"


@set_module("jax_ep.experts")
def gated(
    w_gate: Any,
    w_up: Any,
    w_down: Any,
    *,
    activation: Activation = jax.nn.silu,
    bias_gate: jax.Array | None = None,
    bias_up: jax.Array | None = None,
    bias_down: jax.Array | None = None,
    product: Product | None = None,
) -> ExpertWeights:
    """Gated experts: `(activation(x @ w_gate + b) * (x @ w_up + b)) @ w_down + b`.

    For `moe_with_experts` the arrays are one rank's, `L` experts; for `sharded_moe` the group's,
    `E` of them. Where an array of matrices is asked for, a `QuantizedMatrices`, a `LowRank` or
    another `Matrices` may stand.

    Args:
        w_gate: `[L, H, F]` of `config.dtype`.
        w_up: `[L, H, F]` of `config.dtype`.
        w_down: `[L, F, H]` of `config.dtype`.
        activation: of the gate, elementwise.
        bias_gate: `[L, F]` of `config.dtype`, or None.
        bias_up: `[L, F]` of `config.dtype`, or None.
        bias_down: `[L, H]` of `config.dtype`, or None.
        product: a grouped product in place of `jax.lax.ragged_dot`, see `Gated`.
    """
    return _bound(
        Gated(activation=activation, product=product),
        w_gate=w_gate,
        w_up=w_up,
        w_down=w_down,
        bias_gate=bias_gate,
        bias_up=bias_up,
        bias_down=bias_down,
    )


@set_module("jax_ep.experts")
def ungated(
    w_up: Any,
    w_down: Any,
    *,
    activation: Activation = jax.nn.relu,
    bias_up: jax.Array | None = None,
    bias_down: jax.Array | None = None,
    product: Product | None = None,
) -> ExpertWeights:
    """Experts without a gate: `activation(x @ w_up + b) @ w_down + b`. Arguments as of `gated`.

    Args:
        w_up: `[L, H, F]` of `config.dtype`.
        w_down: `[L, F, H]` of `config.dtype`.
        activation: elementwise.
        bias_up: `[L, F]` of `config.dtype`, or None.
        bias_down: `[L, H]` of `config.dtype`, or None.
        product: a grouped product in place of `jax.lax.ragged_dot`.
    """
    kind = Ungated(activation=activation, product=product)
    return _bound(kind, w_up=w_up, w_down=w_down, bias_up=bias_up, bias_down=bias_down)


@set_module("jax_ep.experts")
def gpt_oss(
    w_gate: Any,
    w_up: Any,
    w_down: Any,
    *,
    bias_gate: jax.Array | None = None,
    bias_up: jax.Array | None = None,
    bias_down: jax.Array | None = None,
    limit: float = 7.0,
    alpha: float = 1.702,
    product: Product | None = None,
) -> ExpertWeights:
    """The experts of gpt-oss, see `GptOss`. Arguments as of `gated`.

    Args:
        w_gate: `[L, H, F]` of `config.dtype`.
        w_up: `[L, H, F]` of `config.dtype`.
        w_down: `[L, F, H]` of `config.dtype`.
        bias_gate: `[L, F]` of `config.dtype`, or None.
        bias_up: `[L, F]` of `config.dtype`, or None.
        bias_down: `[L, H]` of `config.dtype`, or None.
        limit: what gate and up are clamped to.
        alpha: in the sigmoid.
        product: a grouped product in place of `jax.lax.ragged_dot`.
    """
    return _bound(
        GptOss(limit=limit, alpha=alpha, product=product),
        w_gate=w_gate,
        w_up=w_up,
        w_down=w_down,
        bias_gate=bias_gate,
        bias_up=bias_up,
        bias_down=bias_down,
    )


@set_module("jax_ep.experts")
def custom(
    function: Callable[[Dispatched, dict[str, Any]], jax.Array],
    weights: Mapping[str, Any],
    dims: Mapping[str, Dims],
    *,
    output_biases: tuple[str, ...] = (),
) -> ExpertWeights:
    """Experts that are a function of one's own, for `sharded_moe` and the layers.

    `moe_with_experts` takes any function of a `Dispatched`; this says besides how the weights are
    split over a mesh.

    Args:
        function: `function(recv, weights) -> y [C, H]` of `config.dtype`.
        weights: by name: arrays, or `Matrices` for those of three dimensions.
        dims: by name: what each dimension is along, "experts", "hidden", "ffn" or None.
        output_biases: names of the weights that are added to the result, see `Experts`.

    Raises:
        ValueError: weights and dims are of other names, or a dimension is along something else.
    """
    if set(weights) != set(dims):
        raise ValueError(
            f"dims has the names {sorted(dims)}; allowed: those of weights, {sorted(weights)}"
        )
    for name, entries in dims.items():
        if any(isinstance(entry, str) and entry not in _DIMS for entry in entries):
            raise ValueError(
                f"dims[{name!r}] is {tuple(entries)!r}; allowed in it: {', '.join(_DIMS)}, an int "
                "(the size of a dimension), None"
            )
    arrays = tuple((name, tuple(dims[name])) for name in sorted(dims))
    kind = Custom(function=function, arrays=arrays, added_last=tuple(output_biases))
    return ExpertWeights(kind, {name: as_array(weight) for name, weight in weights.items()})


def _bound(kind: Experts, **weights: Any) -> ExpertWeights:
    """Without the biases that were not given; matrices that are None are refused by name later."""
    given = {
        name: as_array(weight)
        for name, weight in weights.items()
        if weight is not None or not name.startswith("bias_")
    }
    return ExpertWeights(kind, given)
