# SPDX-License-Identifier: Apache-2.0
"""What the rules of differentiation of both backends share.

Tangents and cotangents travel in the rows' own dtype (`OpSpec.for_cotangents`), also where the rows
themselves go over the FP8 wire: the derivative of its rounding is taken to be 1 (straight through).
Rows that are quantized before or after they travel have none here: see `straight_through.py`.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.interpreters import ad

# For policies of `jax.checkpoint`: what was received, and the plan by which gradients travel.
RECV_NAME = "jax_ep.recv"


def named(tree: Any) -> Any:
    """Arrays that a policy may save as a part of what was received."""
    return jax.tree.map(lambda array: checkpoint_name(array, RECV_NAME), tree)


def nonzero(tangent: Any) -> Any:
    """A tangent or cotangent; None if it is zero or of something absent."""
    return None if type(tangent) is ad.Zero else tangent


def present(values: Sequence[Any]) -> bool:
    """Whether one of the values is not absent."""
    return any(value is not None for value in values)


def refuse_quantized(dots: Sequence[Any], *, quantized: bool) -> None:
    """Raises where rows that are quantized outside of the exchange are differentiated."""
    if quantized and present([nonzero(dot) for dot in dots]):
        raise ValueError(
            "dispatch is differentiated in x, and rows that go in or come out in FP8 have no "
            "gradient; allowed: jax_ep.moe with EpConfig.recv_dtype float8_e4m3fn and an x that is "
            "not quantized, or jax.lax.stop_gradient around x"
        )


def tangents_of(results: Sequence[Any], dots: Sequence[Any]) -> list[Any]:
    """The tangents of the results that are there; zero where `dots` has none."""
    return [
        ad.Zero(jax.typeof(result).to_tangent_aval()) if dot is None else dot
        for result, dot in zip(results, dots, strict=True)
        if result is not None
    ]


def cotangents_of(tree: Any, operands: Sequence[Any], bars: Any) -> list[Any]:
    """Of flat operands with this tree, the cotangents that `bars` has for the linear ones."""
    flat = tree.flatten_up_to(bars)
    return [
        bar if ad.is_undefined_primal(operand) else None
        for operand, bar in zip(operands, flat, strict=True)
    ]


def _where_valid(index: jax.Array, values: jax.Array) -> jax.Array:
    """`values` where `index` is one, 0 where it is negative. No `jnp.where`: that is a call.

    XLA of jaxlib 0.11.2 does not compile a call inside a computation that `compute_on` has put on
    another stream.
    """
    return jax.lax.select(index >= 0, values, jnp.zeros_like(values))


def row_weights(weights: jax.Array, row_topk_idx: jax.Array | None) -> jax.Array:
    """`[C]` float32: the factor of each row in a weighted combine; of no meaning without a token.

    In layout "rank" the sum of the row's weights, in the order of selections.
    """
    if row_topk_idx is None:
        return weights
    used = _where_valid(row_topk_idx, weights)
    return functools.reduce(jnp.add, [used[:, k] for k in range(used.shape[1])])


def weights_cotangent(row_dots: jax.Array, row_topk_idx: jax.Array | None) -> jax.Array:
    """The transpose of `row_weights`."""
    if row_topk_idx is None:
        return row_dots
    return _where_valid(row_topk_idx, jnp.broadcast_to(row_dots[:, None], row_topk_idx.shape))


def _valid_rows(row_source: jax.Array, rows: jax.Array) -> jax.Array:
    """Rows without a token, which may hold NaN, as 0."""
    return _where_valid(jnp.broadcast_to(row_source[:, None], rows.shape), rows)


def _float32(rows: jax.Array) -> jax.Array:
    return rows.astype(jnp.float32)


# Rematerialized, so that the backward keeps the rows in their own dtype and not in float32. What
# goes in and comes out is in that dtype too, the cotangent included: XLA makes arrays of all that
# crosses the border of what is rematerialized.
@jax.checkpoint
def weighted_rows_tangent(
    y: jax.Array | None,
    weights: jax.Array | None,
    y_dot: jax.Array | None,
    weights_dot: jax.Array | None,
    row_source: jax.Array,
    row_topk_idx: jax.Array | None,
) -> jax.Array:
    """The tangent of `row_weights(weights) * y`; y counts as 0 in rows without a token.

    `weights` is the factor of `y_dot`, 1 if None; `y` that of `weights_dot`.
    """
    terms = []

    def add(factor: jax.Array, rows: jax.Array) -> None:
        valid_factor = _where_valid(row_source, row_weights(factor, row_topk_idx))
        terms.append(valid_factor[:, None] * _float32(rows))

    if y_dot is not None:
        if weights is None:
            terms.append(_float32(y_dot))
        else:
            add(weights, y_dot)
    if weights_dot is not None:
        assert y is not None
        add(weights_dot, _valid_rows(row_source, y))
    rows = y if y_dot is None else y_dot
    assert rows is not None
    return sum(terms[1:], terms[0]).astype(rows.dtype)


# Likewise.
@jax.checkpoint
def products_of_rows(
    rows: jax.Array, factors: jax.Array | None, y: jax.Array | None, row_source: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
    """What `DispatchOperands.row_weights` and `y` make of received rows: rows, and `row_dots`."""
    row_dots = None
    if y is not None:
        valid_y = _valid_rows(row_source, y)
        row_dots = jnp.sum(_float32(rows) * _float32(valid_y), axis=1)
    if factors is not None:
        valid = _where_valid(row_source, factors)
        rows = (valid[:, None] * _float32(rows)).astype(rows.dtype)
    return rows, row_dots
