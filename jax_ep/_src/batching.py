# SPDX-License-Identifier: Apache-2.0
"""`one_by_one`: how primitives are batched whose calls are not to be merged."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive

from jax_ep._src import compat


def one_by_one(
    primitive: Primitive, args: Sequence[Any], dims: Sequence[Any], **params: Any
) -> tuple[list[Any], list[int]]:
    """One call for each element of the batch, in order, so that ranks meet in the same order."""
    batched = [jnp.moveaxis(a, d, 0) for a, d in zip(args, dims, strict=True) if d is not None]

    def one(elements: list[Any]) -> list[Any]:
        element = iter(elements)
        operands = [next(element) if d is not None else a for a, d in zip(args, dims, strict=True)]
        # `vmap(spmd_axis_name=...)` spreads the batched ones over a further axis.
        return primitive.bind(*compat.varying_alike(*operands), **params)

    outputs = jax.lax.map(one, batched)
    return list(outputs), [0] * len(outputs)
