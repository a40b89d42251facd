# SPDX-License-Identifier: Apache-2.0
"""The gradient of a dispatch over the FP8 wire: straight through its rounding."""

import functools

import jax

from jax_ep._src.backends.ffi.linear import combine_linear
from jax_ep._src.backends.ffi.primitives import bind, dispatch_p
from jax_ep._src.backends.operands import NO_PLAN, DispatchOperands, DispatchResults
from jax_ep._src.spec import OpSpec


# Rows go out in FP8, gradients come back in the rows' own dtype: the derivative of rounding is
# taken to be 1 (straight through), which no linear rule could say. Not for rows that are quantized
# before or after they travel: those have no gradient (see `restored.py`).
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def dispatch_fp8(spec: OpSpec, operands: DispatchOperands) -> DispatchResults:
    """A dispatch over the FP8 wire."""
    return bind(dispatch_p, operands, spec=spec)


def _dispatch_fp8_fwd(spec: OpSpec, operands: DispatchOperands) -> tuple:
    return bind(dispatch_p, operands, spec=spec), (operands.program_rank, operands.plan)


def _dispatch_fp8_bwd(spec: OpSpec, residuals: tuple, bars: DispatchResults) -> tuple:
    program_rank, plan = residuals
    x_bar, scalars_bar = combine_linear(spec, program_rank, bars.rows, bars.row_scalars, plan)
    return (DispatchOperands(None, x_bar, None, scalars_bar, None, None, NO_PLAN),)


dispatch_fp8.defvjp(_dispatch_fp8_fwd, _dispatch_fp8_bwd)
