# SPDX-License-Identifier: Apache-2.0
"""The oracle: everything that jax_ep computes, in NumPy, all ranks at once.

It is written to be read next to the definitions, with loops where a loop is clearest. It imports
no JAX and nothing of the rest of jax_ep, so that a mistake there cannot be repeated here.

Arrays of all ranks have a leading axis `R`. Values are float64, except where the definition itself
rounds: received rows, the FP8 wire, and `combine(..., exact_bits=True)`, which follows the defined
sequence of float32 operations so that its result can be compared with a backend's bit by bit.
"""

from jax_ep.reference._balancing import place
from jax_ep.reference._exchange import (
    Dispatched,
    combine,
    combine_error_bound,
    combine_scalars,
    combine_vjp,
    dispatch,
    dispatch_scalars,
    dispatch_vjp,
)
from jax_ep.reference._layer import (
    load_balance_loss,
    moe,
    moe_dense,
    route,
    route_expert_choice,
    router_z_loss,
    silu,
    update_bias,
)
from jax_ep.reference._plan import Plan, plan
from jax_ep.reference._rounding import (
    QuantizedRows,
    dequantize_fp8,
    fma32,
    quantize_fp8,
    round_to,
)

__all__ = [
    "Dispatched",
    "Plan",
    "QuantizedRows",
    "combine",
    "combine_error_bound",
    "combine_scalars",
    "combine_vjp",
    "dequantize_fp8",
    "dispatch",
    "dispatch_scalars",
    "dispatch_vjp",
    "fma32",
    "load_balance_loss",
    "moe",
    "moe_dense",
    "place",
    "plan",
    "quantize_fp8",
    "round_to",
    "route",
    "route_expert_choice",
    "router_z_loss",
    "silu",
    "update_bias",
]

# What `help()`, reprs and pickle say, in the place of the private modules.
for _name in __all__:
    globals()[_name].__module__ = __name__
