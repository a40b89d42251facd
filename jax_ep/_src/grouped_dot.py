# SPDX-License-Identifier: Apache-2.0
"""`grouped_dot`: `jax.lax.ragged_dot` that every transformation of JAX takes.

JAX to 0.12 batches `ragged_dot` only where all of its operands are batched, does not batch its
gradients, and has no reverse mode of its reverse mode. Here the product is a primitive, whose
batching is one product for each element of the batch, as it is one exchange for `dispatch` and
`combine`. What is computed, and in which precision, is `jax.lax.ragged_dot_general`'s.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.lax import RaggedDotDimensionNumbers

from jax_ep._src import compat
from jax_ep._src.batching import one_by_one

# The three are each other's transposes, so that a gradient of any order is made of them. Their
# operands are rows `[C, ...]` first, then matrices or rows; g is the group of row c.
_ROWS = "rows"  # y[c] = x[c] @ w[g]
_BACK = "back"  # x[c] = y[c] @ w[g].T
_SUMS = "sums"  # w[g] = sum over c of outer(x[c], y[c])
_DIMENSIONS = {
    _ROWS: RaggedDotDimensionNumbers((([1], [1]), ([], [])), [0], [0]),
    _BACK: RaggedDotDimensionNumbers((([1], [2]), ([], [])), [0], [0]),
    _SUMS: RaggedDotDimensionNumbers((([0], [0]), ([], [])), [0], []),
}

grouped_dot_p = Primitive("jax_ep_grouped_dot")
grouped_dot_p.multiple_results = True


def grouped_dot(rows: jax.Array, matrices: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """`[C, F]`: each row times the matrix of its group; 0 for rows past the last group.

    Args:
        rows: `[C, H]`, those of a group next to each other.
        matrices: `[L, H, F]`, of the dtype of the rows.
        group_sizes: `[L]` integers, rows of each group.
    """
    config: Any = jax.config  # which has its options as attributes that no type checker sees
    operands = compat.varying_alike(rows, matrices, group_sizes)
    (out,) = grouped_dot_p.bind(
        *operands, kind=_ROWS, precision=config.jax_default_matmul_precision
    )
    return out


def _compute(
    a: jax.Array, b: jax.Array, group_sizes: jax.Array, *, kind: str, precision: Any
) -> list[jax.Array]:
    # The setting where the product was traced, which need not be the one where it is lowered.
    with jax.default_matmul_precision(precision):
        return [jax.lax.ragged_dot_general(a, b, group_sizes, _DIMENSIONS[kind])]


def _abstract(a: Any, b: Any, group_sizes: Any, *, kind: str, precision: Any) -> list[Any]:
    del precision
    shape = {
        _ROWS: (a.shape[0], b.shape[-1]),
        _BACK: (a.shape[0], b.shape[1]),
        _SUMS: (group_sizes.shape[0], a.shape[1], b.shape[1]),
    }[kind]
    return [compat.like(a, shape, a.dtype)]


def _jvp(primals: Sequence[Any], tangents: Sequence[Any], **params: Any) -> Any:
    """A product of two: the sum of those with one of them replaced by its tangent."""
    a, b, group_sizes = primals
    a_dot, b_dot, _ = tangents
    (out,) = grouped_dot_p.bind(a, b, group_sizes, **params)
    terms = []
    if type(a_dot) is not ad.Zero:
        terms += grouped_dot_p.bind(a_dot, b, group_sizes, **params)
    if type(b_dot) is not ad.Zero:
        terms += grouped_dot_p.bind(a, b_dot, group_sizes, **params)
    zero = ad.Zero(jax.typeof(out).to_tangent_aval())
    return [out], [sum(terms[1:], terms[0]) if terms else zero]


def _transpose(
    cotangents: Sequence[Any], a: Any, b: Any, group_sizes: Any, *, kind: str, precision: Any
) -> list[Any]:
    (bar,) = cotangents
    if type(bar) is ad.Zero:
        return [None] * 3
    product = functools.partial(grouped_dot_p.bind, precision=precision)
    if ad.is_undefined_primal(a):
        left, right, of_a = {
            _ROWS: (bar, b, _BACK),
            _BACK: (bar, b, _ROWS),
            _SUMS: (b, bar, _BACK),
        }[kind]
        return [*product(left, right, group_sizes, kind=of_a), None, None]
    left, right, of_b = {
        _ROWS: (a, bar, _SUMS),
        _BACK: (bar, a, _SUMS),
        _SUMS: (a, bar, _ROWS),
    }[kind]
    return [None, *product(left, right, group_sizes, kind=of_b), None]


grouped_dot_p.def_impl(_compute)
grouped_dot_p.def_abstract_eval(_abstract)
mlir.register_lowering(grouped_dot_p, mlir.lower_fun(_compute, multiple_results=True))
ad.primitive_jvps[grouped_dot_p] = _jvp
ad.primitive_transposes[grouped_dot_p] = _transpose
batching.primitive_batchers[grouped_dot_p] = functools.partial(one_by_one, grouped_dot_p)
