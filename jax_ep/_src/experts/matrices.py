# SPDX-License-Identifier: Apache-2.0
"""One matrix for each expert, `[L, A, B]`: plain arrays, quantized ones, and sums with LoRA's."""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jax_ep._src.checks import check_array, is_array
from jax_ep._src.compat import as_array
from jax_ep._src.grouped_dot import grouped_dot
from jax_ep._src.public import set_module

# What a dimension of an array of experts is along: it decides how the array is split over a mesh.
# An int is the size of one that is not split.
Dim = Literal["experts", "hidden", "ffn"] | int | None
Dims = tuple[Dim, ...]
# rows `[C, A]`, matrices `[L, A, B]`, group_sizes `[L]` -> `[C, B]`.
Product = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]

_QUANTIZED = (np.dtype(np.int8), np.dtype(ml_dtypes.float8_e4m3fn))
_FLOAT32 = np.dtype(np.float32)


@set_module("jax_ep.experts")
class Matrices(abc.ABC):
    """What may stand in the place of an array `[L, A, B]` of matrices; a pytree.

    Subclass it for another format, and register the class as a pytree whose leaves are arrays.
    """

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """`(L, A, B)`."""

    @abc.abstractmethod
    def grouped_product(
        self, rows: jax.Array, group_sizes: jax.Array, product: Product
    ) -> jax.Array:
        """Each row times the matrix of its group.

        Args:
            rows: `[C, A]`, those of a group next to each other.
            group_sizes: `[L]` int32, rows of each group.
            product: to be used of plain arrays.

        Returns:
            `[C, B]` of the dtype of the rows.
        """

    @abc.abstractmethod
    def leaf_dims(self, dims: Dims) -> list[Dims]:
        """What the dimensions of each leaf are along, in the order of the pytree's leaves."""

    @abc.abstractmethod
    def check(self, name: str, shape: tuple[int | str, ...], dtype: np.dtype, *, of: str) -> None:
        """Raises ValueError unless the arrays are those of matrices of this shape."""


@set_module("jax_ep.experts")
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedMatrices(Matrices):
    """Matrices in 8 bits with scales: element `[l, a, b]` stands for its value times its scale.

    The scales are of blocks: each of their dimensions divides that of the values, so `[L, 1, 1]`
    is one for each matrix, `[L, 1, B]` one for each output channel, `[L, A // 128, B // 128]` one
    for each block of 128 times 128. Restored to the rows' dtype for each product; no gradients
    reach values or scales.

    Attributes:
        values: `[L, A, B]` int8 or float8_e4m3fn.
        scales: `[L, a, b]` float32, `a` a divisor of `A` and `b` of `B`.
    """

    values: jax.Array
    scales: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """`(L, A, B)`; `()` where the values are no array, which `check` refuses by name."""
        return getattr(as_array(self.values), "shape", ())

    def dequantize(self, dtype: Any) -> jax.Array:
        """`[L, A, B]`: the float32 products of values and scales, rounded once to `dtype`."""
        values, scales = as_array(self.values), as_array(self.scales)
        values, scales = (jax.lax.stop_gradient(part) for part in (values, scales))
        for axis in (1, 2):
            if scales.shape[axis] > 1:
                scales = jnp.repeat(scales, values.shape[axis] // scales.shape[axis], axis=axis)
        return (values.astype(jnp.float32) * scales).astype(dtype)

    def grouped_product(
        self, rows: jax.Array, group_sizes: jax.Array, product: Product
    ) -> jax.Array:
        """Each row times the restored matrix of its group."""
        return product(rows, self.dequantize(rows.dtype), group_sizes)

    def leaf_dims(self, dims: Dims) -> list[Dims]:
        """Scales are split as values are, along what they have more than one of."""
        if not is_array(as_array(self.scales)) or len(self.scales.shape) != len(self.shape):
            return [dims] * len(jax.tree.leaves(self))  # which `check` refuses
        # A matrix of one row or column has one scale there, which is split as its values are.
        shared = [
            scales == 1 and size > 1
            for scales, size in zip(as_array(self.scales).shape, self.shape, strict=True)
        ]
        return [dims, tuple(None if s else d for s, d in zip(shared, dims, strict=True))]

    def check(self, name: str, shape: tuple[int | str, ...], dtype: np.dtype, *, of: str) -> None:
        """Raises ValueError unless values and scales are those of such matrices."""
        del dtype
        values, scales = as_array(self.values), as_array(self.scales)
        if not is_array(values) or values.dtype not in _QUANTIZED:
            got = values.dtype if is_array(values) else type(values).__name__
            raise ValueError(f"{name}.values is {got}; allowed: int8, float8_e4m3fn")
        check_array(f"{name}.values", values, shape, values.dtype, of=of)
        is_divided = (
            is_array(scales)
            and scales.dtype == _FLOAT32
            and scales.ndim == 3
            and scales.shape[0] == values.shape[0]
            and all(s and v % s == 0 for s, v in zip(scales.shape, values.shape, strict=True))
        )
        if not is_divided:
            got = f"{scales.dtype}{list(scales.shape)}" if is_array(scales) else type(scales)
            raise ValueError(
                f"{name}.scales is {got}; allowed: float32[{values.shape[0]}, a, b], where a "
                f"divides {values.shape[1]} and b divides {values.shape[2]}"
            )


@set_module("jax_ep.experts")
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRank(Matrices):
    """Matrices plus a low-rank update of each: `matrices + scale * a @ b`, never multiplied out.

    LoRA on experts (Hu et al. 2021, arXiv:2106.09685). To train `a` and `b` only, differentiate
    in them only, or keep `matrices` as `QuantizedMatrices`.

    Attributes:
        matrices: `[L, A, B]`, an array or other `Matrices`.
        a: `[L, A, r]` of the dtype of the rows.
        b: `[L, r, B]` of the dtype of the rows.
        scale: of the update.
    """

    matrices: "jax.Array | Matrices"
    a: jax.Array
    b: jax.Array
    scale: float = dataclasses.field(default=1.0, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """`(L, A, B)`."""
        return as_array(self.matrices).shape

    def grouped_product(
        self, rows: jax.Array, group_sizes: jax.Array, product: Product
    ) -> jax.Array:
        """The product with the matrices, plus that with the update."""
        inner = product(rows, as_array(self.a), group_sizes)
        update = product(inner, as_array(self.b), group_sizes)
        scale = jnp.asarray(self.scale, rows.dtype)
        return product_with(rows, self.matrices, group_sizes, product) + scale * update

    def leaf_dims(self, dims: Dims) -> list[Dims]:
        """The rank is not split."""
        return [*leaf_dims(self.matrices, dims), (*dims[:2], None), (dims[0], None, dims[2])]

    def check(self, name: str, shape: tuple[int | str, ...], dtype: np.dtype, *, of: str) -> None:
        """Raises ValueError unless matrices and update are of this shape."""
        check_matrices(f"{name}.matrices", self.matrices, shape, dtype, of=of)
        a, b = as_array(self.a), as_array(self.b)
        rank = a.shape[2] if is_array(a) and a.ndim == 3 else "r"
        check_array(f"{name}.a", a, (*self.shape[:2], rank), dtype)
        check_array(f"{name}.b", b, (self.shape[0], rank, self.shape[2]), dtype)


def product_with(
    rows: jax.Array, matrices: "jax.Array | Matrices", group_sizes: jax.Array, product: Product
) -> jax.Array:
    """Each row times the matrix of its group, in whatever format the matrices are."""
    if isinstance(matrices, Matrices):
        return matrices.grouped_product(rows, group_sizes, product)
    return product(rows, as_array(matrices), group_sizes)


def leaf_dims(weight: Any, dims: Dims) -> list[Dims]:
    """What the dimensions of each leaf of a weight are along; `dims` are those of the weight."""
    return weight.leaf_dims(dims) if isinstance(weight, Matrices) else [dims]


def check_matrices(
    name: str, matrices: Any, shape: tuple[int | str, ...], dtype: np.dtype, *, of: str
) -> None:
    """Raises ValueError unless `matrices` are an array of this shape, or in a format, of it."""
    if isinstance(matrices, Matrices):
        matrices.check(name, shape, dtype, of=of)
        return
    array = as_array(matrices)
    if is_array(array) and array.ndim == 3 and _fits(array.shape, (shape[0], *shape[:0:-1])):
        of += ". Its matrices transposed would fit: jax_ep.flax.load_experts does that"
    check_array(name, array, shape, dtype, of=of)


def _fits(got: tuple[int, ...], shape: tuple[int | str, ...]) -> bool:
    return all(isinstance(size, str) or a == size for a, size in zip(got, shape, strict=True))


def add_bias(rows: jax.Array, bias: jax.Array | None, group_sizes: jax.Array) -> jax.Array:
    """Adds to each row `[C, B]` the bias of its group, of `[L, B]`; None adds nothing."""
    if bias is None:
        return rows
    # As a product with ones, whose gradient is a sum over each group's rows in a fixed order. That
    # of indexing would be a scatter, which on GPUs adds in any order.
    ones = jnp.ones((rows.shape[0], 1), rows.dtype)
    with jax.default_matmul_precision("highest"):  # it is no more than a copy
        return rows + grouped_dot(ones, as_array(bias)[:, None, :], group_sizes)
