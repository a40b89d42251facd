# SPDX-License-Identifier: Apache-2.0
"""Dispatch and unweighted combine of gradients: linear, and each other's transposes."""

from typing import Any

import jax

from jax_ep._src.backends.ffi.primitives import bind, combine_p, dispatch_p
from jax_ep._src.backends.operands import (
    CombineOperands,
    CombineResults,
    DispatchOperands,
    DispatchResults,
)
from jax_ep._src.backends.plan import Plan
from jax_ep._src.backends.tangents import present
from jax_ep._src.spec import OpSpec


def dispatch_linear(
    spec: OpSpec, program_rank: jax.Array, x: Any, token_scalars: Any, plan: Plan
) -> DispatchResults:
    """Those of rows and scalars that there are, as gradients travel."""
    if not present((x, token_scalars)):
        return DispatchResults()
    operands = DispatchOperands(program_rank, x, None, token_scalars, None, None, plan.unweighted())
    return bind(dispatch_p, operands, spec=spec.for_cotangents())


def combine_linear(
    spec: OpSpec, program_rank: jax.Array, y: Any, row_scalars: Any, plan: Plan
) -> CombineResults:
    """The transpose of `dispatch_linear`."""
    if not present((y, row_scalars)):
        return CombineResults(None, None)
    operands = CombineOperands(program_rank, y, None, row_scalars, plan.unweighted())
    return bind(combine_p, operands, spec=spec.for_cotangents())
