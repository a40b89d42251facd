# SPDX-License-Identifier: Apache-2.0
"""Rows in FP8: float8_e4m3fn with one float32 scale per 128 elements.

The rounding is that of DeepSeek-V3's activations (arXiv:2412.19437, section 3.3): `scale =
max(amax, 1e-4) / 448`, values divided by it and rounded to nearest even. Gradients that go straight
through it: `straight_through.py` (rows received in FP8), `backends/tangents.py` (the FP8 wire).
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jax_ep._src.compat import as_array
from jax_ep._src.limits import DTYPES
from jax_ep._src.public import set_module

SCALE_BLOCK = 128
_MAX = 448.0
_MIN_AMAX = 1e-4
_FLOAT8 = np.dtype(ml_dtypes.float8_e4m3fn)


@set_module("jax_ep")
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedRows:
    """Rows in FP8, as they travel with `EpConfig.wire_dtype` float8_e4m3fn. A pytree.

    Element `h` of a row stands for `float32(values[..., h]) * scales[..., h // 128]`. Has no
    gradient of its own: what is differentiated through `jax_ep.moe` stays unquantized outside of
    it.

    Attributes:
        values: `[..., H]` float8_e4m3fn.
        scales: `[..., ceil(H / 128)]` float32, one for each 128 values; the last may be for fewer.
    """

    values: jax.Array
    scales: jax.Array

    def dequantize(self, dtype: Any) -> jax.Array:
        """What the rows stand for: the float32 products, rounded once.

        Args:
            dtype: float32, bfloat16 or float16.

        Returns:
            `[..., H]` of `dtype`.

        Raises:
            ValueError: another dtype, or values and scales that are no rows in FP8; when it is
                traced to be differentiated.
        """
        known = _known_dtype(dtype)
        if known is None:
            raise ValueError(f"dtype is {dtype!r}; allowed: {', '.join(DTYPES)}")
        values, scales = as_array(self.values), as_array(self.scales)
        _check_parts(values, scales)
        return _dequantize(known, values, scales)


@set_module("jax_ep")
def quantize(x: jax.Array) -> QuantizedRows:
    """Rows in FP8: every 128 elements are scaled into the range of float8_e4m3fn and rounded.

    For each block of 128 elements (the last may be shorter), in float32: `scale = max(amax, 1e-4)
    / 448`, and the values are `x / scale`, rounded to nearest even. What `dispatch` does on the FP8
    wire to an array, so that `dispatch(quantize(x), ...)` gives the bits of `dispatch(x, ...)`.

    Args:
        x: `[..., H]`, float32, bfloat16 or float16.

    Returns:
        Values `[..., H]` and scales `[..., ceil(H / 128)]`.

    Raises:
        ValueError: `x` is something else; when it is traced to be differentiated.
    """
    x = as_array(x)
    if not isinstance(x, (jax.Array, np.ndarray)):
        raise ValueError(f"x is a {type(x).__name__}; allowed: an array [..., H]")
    if x.ndim < 1 or _known_dtype(x.dtype) is None:
        raise ValueError(
            f"x is {x.dtype}{list(x.shape)}; allowed: {', '.join(DTYPES)}, with a dimension"
        )
    return QuantizedRows(*_quantize(jnp.asarray(x)))


def _known_dtype(dtype: Any) -> np.dtype | None:
    try:
        return DTYPES.get(np.dtype(dtype).name)
    except TypeError:
        return None


def _check_parts(values: Any, scales: Any) -> None:
    for name, part, dtype in (("values", values, _FLOAT8), ("scales", scales, np.dtype("float32"))):
        if not isinstance(part, (jax.Array, np.ndarray)):
            raise ValueError(f"{name} is a {type(part).__name__}; allowed: an array")
        if part.dtype != dtype or part.ndim < 1:
            raise ValueError(
                f"{name} is {part.dtype}{list(part.shape)}; allowed: {dtype.name}, of at least one "
                "dimension"
            )
    wanted = (*values.shape[:-1], num_scales(values.shape[-1]))
    if scales.shape != wanted:
        raise ValueError(
            f"scales is float32{list(scales.shape)}; allowed with values "
            f"float8_e4m3fn{list(values.shape)}: float32{list(wanted)}"
        )


# --- the arithmetic ----------------------------------------------------------------------------


def num_scales(hidden: int) -> int:
    """Scales of a row of so many elements."""
    return -(-hidden // SCALE_BLOCK)


def quantize_rows(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`x [..., H]` -> float8_e4m3fn `[..., H]`, float32 scales `[..., ceil(H / 128)]`."""
    # As whoever else reads x gets it: where it is made in the same program, XLA would leave out the
    # rounding to its dtype.
    x = jax.lax.optimization_barrier(x)
    *rows, hidden = x.shape
    num_blocks = num_scales(hidden)
    padding = [(0, 0)] * len(rows) + [(0, num_blocks * SCALE_BLOCK - hidden)]
    blocks = jnp.pad(x.astype(jnp.float32), padding).reshape(*rows, num_blocks, SCALE_BLOCK)
    amax = jnp.max(jnp.abs(blocks), axis=-1)
    # The barriers hide that the divisors are a constant and a broadcast: XLA would multiply by
    # their reciprocals, which rounds differently. The selection has a batch where `amax` has one: a
    # barrier around what has none would leave a broadcast behind it.
    largest = jax.lax.optimization_barrier(jnp.where(amax > 0, _MAX, _MAX))
    scales = jnp.maximum(amax, _MIN_AMAX) / largest
    divisor = jax.lax.optimization_barrier(jnp.broadcast_to(scales[..., None], blocks.shape))
    values = (blocks / divisor).astype(_FLOAT8)
    return values.reshape(*rows, num_blocks * SCALE_BLOCK)[..., :hidden], scales


def dequantize_rows(values: jax.Array, scales: jax.Array, dtype: np.dtype) -> jax.Array:
    """What they stand for, rounded once to `dtype`."""
    factor = jnp.repeat(scales, SCALE_BLOCK, axis=-1)[..., : values.shape[-1]]
    return (values.astype(jnp.float32) * factor).astype(dtype)


# --- nothing to differentiate ------------------------------------------------------------------

# The tangents of FP8 values would be FP8 values: JAX would round every gradient to them, silently.


@jax.custom_jvp
def _quantize(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return quantize_rows(x)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _dequantize(dtype: np.dtype, values: jax.Array, scales: jax.Array) -> jax.Array:
    return dequantize_rows(values, scales, dtype)


def _refuse(name: str, *args: Any) -> Any:
    del args
    raise ValueError(
        f"{name} is differentiated, which has no gradient; allowed: jax_ep.moe with "
        "EpConfig.recv_dtype float8_e4m3fn, whose x is not quantized outside of it, or "
        "jax.lax.stop_gradient around what goes in"
    )


_quantize.defjvp(functools.partial(_refuse, "jax_ep.quantize"))
_dequantize.defjvp(functools.partial(_refuse, "QuantizedRows.dequantize"))
