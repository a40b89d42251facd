# SPDX-License-Identifier: Apache-2.0
"""The roundings that the definitions of dispatch and combine name: fma, dtypes, FP8 blocks."""

from typing import NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import ArrayLike, DTypeLike

DOT_SUMS = 256
DOT_BLOCK = 1024
FP8_BLOCK = 128
FP8_MAX = np.float32(448.0)
FP8_MIN_AMAX = np.float32(1e-4)


def round_to(x: ArrayLike, dtype: DTypeLike) -> np.ndarray:
    """Rounds to the nearest value of `dtype`, ties to even; past its range to an infinity.

    Args:
        x: float32 for bfloat16 and float16: a float64 would be rounded twice on some paths.
        dtype: what to round to.
    """
    x = np.asarray(x)
    if np.dtype(dtype).itemsize < 4 and x.dtype.itemsize > 4:
        raise TypeError(f"x is {x.dtype}; rounding to {np.dtype(dtype)} starts from float32")
    with np.errstate(all="ignore"):
        return x.astype(dtype)


def fma32(a: ArrayLike, b: ArrayLike, c: ArrayLike) -> np.ndarray:
    """`a * b + c` of float32 values with one rounding to float32, as the fma instruction.

    The product of two float32 values is exact in float64 (48 of 53 bits). The sum may not be, and
    rounding it to 53 and then to 24 bits could differ from rounding once. So the float64 sum is
    rounded *to odd*: where it is inexact (TwoSum gives the exact error) and its last bit is even,
    it moves to the neighbor on the side of the true value, whose last bit is odd. A value rounded
    to odd with at least two spare bits rounds on to float32 as the true value would.
    """
    a, b, c = (np.asarray(v, np.float32).astype(np.float64) for v in (a, b, c))
    with np.errstate(all="ignore"):
        product = a * b
        total = product + c
        # Knuth's TwoSum: product + c == total + error, exactly.
        c_part = total - product
        error = (product - (total - c_part)) + (c - c_part)
        is_even = (total.view(np.int64) & 1) == 0
        move = np.isfinite(total) & (error != 0) & is_even
        toward = np.where(error > 0, np.inf, -np.inf)
        odd = np.where(move, np.nextafter(total, toward), total)
        return odd.astype(np.float32)


def dot32(a: ArrayLike, b: ArrayLike) -> np.ndarray:
    """The inner products of float32 rows `[..., H]`, summed in the order that is defined.

    Of each block of 1024 elements, element i goes to sum i % 256, in ascending order, by fused
    multiply-adds that begin with 0; then neighboring sums are added, 0 and 1, 2 and 3, and so on,
    until one is left. The blocks' sums are added in ascending order, to 0.
    """
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    dot = np.zeros(a.shape[:-1], np.float32)
    for block in range(0, a.shape[-1], DOT_BLOCK):
        end = min(block + DOT_BLOCK, a.shape[-1])
        sums = np.zeros((*a.shape[:-1], DOT_SUMS), np.float32)
        for begin in range(block, end, DOT_SUMS):
            columns = slice(begin, min(begin + DOT_SUMS, end))
            used = slice(0, columns.stop - begin)
            sums[..., used] = fma32(a[..., columns], b[..., columns], sums[..., used])
        with np.errstate(all="ignore"):
            while sums.shape[-1] > 1:
                sums = sums[..., 0::2] + sums[..., 1::2]
            dot = dot + sums[..., 0]
    return dot


class QuantizedRows(NamedTuple):
    """Rows as they are on the FP8 wire; of all ranks, or of one.

    Attributes:
        values: `[..., H]` float8_e4m3fn.
        scales: `[..., ceil(H / 128)]` float32.
    """

    values: np.ndarray
    scales: np.ndarray


def quantize_fp8(x: ArrayLike) -> QuantizedRows:
    """Scales every 128 elements of a row into the range of float8_e4m3fn, and rounds to it.

    Args:
        x: rows, `[..., H]`, of a type whose values are float32 values.

    Returns:
        Values `[..., H]` float8_e4m3fn, and scales `[..., ceil(H / 128)]` float32.
    """
    x = np.asarray(x).astype(np.float32)
    hidden = x.shape[-1]
    q = np.empty(x.shape, ml_dtypes.float8_e4m3fn)
    scale = np.empty((*x.shape[:-1], -(-hidden // FP8_BLOCK)), np.float32)
    with np.errstate(all="ignore"):
        for block in range(scale.shape[-1]):
            columns = slice(block * FP8_BLOCK, (block + 1) * FP8_BLOCK)
            # Both maxima hand on a NaN.
            amax = np.maximum(np.abs(x[..., columns]).max(axis=-1), FP8_MIN_AMAX)
            scale[..., block] = amax / FP8_MAX
            scaled = x[..., columns] / scale[..., block, None]
            q[..., columns] = scaled.astype(ml_dtypes.float8_e4m3fn)
    return QuantizedRows(q, scale)


def dequantize_fp8(q: np.ndarray, scale: np.ndarray, dtype: DTypeLike) -> np.ndarray:
    """Undoes `quantize_fp8`: the float32 product, rounded to `dtype`."""
    per_channel = np.repeat(scale, FP8_BLOCK, axis=-1)[..., : q.shape[-1]]
    with np.errstate(all="ignore"):
        return round_to(q.astype(np.float32) * per_channel, dtype)
