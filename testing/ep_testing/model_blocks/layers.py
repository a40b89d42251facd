# SPDX-License-Identifier: Apache-2.0
"""Blocks by the Flax layers."""

from typing import Any

import jax
from flax import nnx

import jax_ep
from ep_testing.model_blocks.formulas import FFN, Params
from ep_testing.model_blocks.ports import PORTS
from ep_testing.model_blocks.running import Function
from jax_ep.flax import linen as ep_linen
from jax_ep.flax import nnx as ep_nnx


def nnx_function(name: str, group: jax_ep.EpGroup, **where: Any) -> Function:
    """By `jax_ep.flax.nnx.MoE`; `where` are its arguments that say where arrays are."""
    port = PORTS[name]
    # A constant is the cheapest initializer; the parameters are the block's.
    zeros = dict.fromkeys(("kernel_init", "router_init"), jax.nn.initializers.zeros)
    options = {**port.options, **where, **zeros}
    if port.router is not None:
        options["router"] = port.router()
    layer = ep_nnx.MoE(group, FFN, **options, rngs=nnx.Rngs(0))
    graph, state, rest = nnx.split(layer, (nnx.Param, ep_nnx.SelectionBias), ...)
    flat = nnx.to_flat_state(state)

    def function(params: Params, x: jax.Array) -> jax.Array:
        arrays = port.to_layer(params)
        variables = {".".join(path): (path, variable) for path, variable in flat}
        assert set(arrays) == set(variables)
        given = [(p, v.replace(arrays[name])) for name, (p, v) in variables.items()]
        layer = nnx.merge(graph, nnx.from_flat_state(given), rest)
        inputs, arguments = port.call(params, x)
        out, _ = layer.with_stats(inputs, **arguments)
        return out if port.rest is None else out + port.rest(params, x)

    return function


def linen_function(name: str, group: jax_ep.EpGroup, **where: Any) -> Function:
    """The same by `jax_ep.flax.linen.MoE`."""
    port = PORTS[name]
    layer = ep_linen.MoE(group, FFN, **port.options, **where)

    def function(params: Params, x: jax.Array) -> jax.Array:
        arrays = port.to_layer(params)
        bias = arrays.pop("selection_bias", None)
        variables = {"params": arrays}
        if bias is not None:
            variables[ep_linen.BIAS] = {"selection_bias": bias}
        inputs, arguments = port.call(params, x)
        out = layer.apply(variables, inputs, **arguments)
        return out if port.rest is None else out + port.rest(params, x)

    return function
