# SPDX-License-Identifier: Apache-2.0
"""The FP8 wire format in JAX: float8_e4m3fn with one float32 scale per 128 elements.

The rounding is that of DeepSeek-V3's activations (arXiv:2412.19437, section 3.3): `scale =
max(amax, 1e-4) / 448`, values divided by it and rounded to nearest even.
"""

import jax
import jax.numpy as jnp

SCALE_BLOCK = 128
_MAX = 448.0
_MIN_AMAX = 1e-4


def _num_blocks(hidden: int) -> int:
    return -(-hidden // SCALE_BLOCK)


def quantize(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`x [T, H]` -> float8_e4m3fn `[T, H]`, float32 scales `[T, ceil(H / 128)]`."""
    num_tokens, hidden = x.shape
    num_blocks = _num_blocks(hidden)
    padded = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, num_blocks * SCALE_BLOCK - hidden)))
    blocks = padded.reshape(num_tokens, num_blocks, SCALE_BLOCK)
    amax = jnp.max(jnp.abs(blocks), axis=2)
    # The barriers hide that the divisors are a constant and a broadcast: XLA would multiply by
    # their reciprocals, which rounds differently.
    largest = jax.lax.optimization_barrier(jnp.full_like(amax, _MAX))
    scales = jnp.maximum(amax, _MIN_AMAX) / largest
    divisor = jax.lax.optimization_barrier(jnp.broadcast_to(scales[..., None], blocks.shape))
    quantized = (blocks / divisor).astype(jnp.float8_e4m3fn)
    return quantized.reshape(num_tokens, -1)[:, :hidden], scales


def dequantize(quantized: jax.Array, scales: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The inverse of `quantize`, rounded once to `dtype`."""
    hidden = quantized.shape[1]
    factor = jnp.repeat(scales, SCALE_BLOCK, axis=1, total_repeat_length=None)[:, :hidden]
    return (quantized.astype(jnp.float32) * factor).astype(dtype)
