# SPDX-License-Identifier: Apache-2.0
"""What a layer of either flavor computes, from global arrays to global arrays.

It opens `jax.shard_map` itself, over all axes of the group's mesh. Tokens are split over the data
axes and the expert axes: as `token_spec` says, else, on a mesh with explicit axes, along the shards
that `x` has, else along the first dimension of `x` if that divides, or all tokens in order.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jax_ep._src import compat
from jax_ep._src.checks import check_array, is_array
from jax_ep._src.experts.bound import ExpertWeights
from jax_ep._src.experts.kinds import Gated
from jax_ep._src.groups.group import kept
from jax_ep._src.moe import MoeStats
from jax_ep._src.sharded.moe import (
    check_context,
    check_fsdp_axes,
    check_tokens_per_rank,
    moe_in_parts,
    split_by_spec,
)
from jax_ep._src.sharded.token_split import (
    Tokens,
    TokenSplit,
    reshard,
    run_on_tokens,
    sharding_dims,
)
from jax_ep._src.sharded.weights import gather_experts
from jax_ep.flax._layer import LayerSpec, LayerStats, Router
from jax_ep.flax._router import choose, logits_of, losses_of

Params = Mapping[str, jax.Array]


def apply(
    spec: LayerSpec,
    params: Params,
    bias: jax.Array | None,
    x: Any,
    *,
    router: Router | None = None,
    routing: bool = False,
    mask: Any = None,
    logits: Any = None,
    topk: Any = None,
    router_input: Any = None,
) -> tuple[jax.Array, LayerStats]:
    """Runs the layer on global arrays.

    Args:
        spec: of the layer.
        params: by the names of `spec.params()`.
        bias: `[E]` float32, see `jax_ep.route`, or None.
        x: `[..., H]`, floating point.
        router: in the place of the layer's own.
        routing: whether statistics have logits and experts.
        mask: see `jax_ep.flax.nnx.MoE.__call__`, as the following.
        logits: `[..., E]`.
        topk: `[..., K]` int32, and `[..., K]` float32 or None.
        router_input: `[..., H]`.

    Returns:
        `[..., H]` of `config.dtype`, and statistics.

    Raises:
        ValueError: an argument does not fit the group's config, or the call is inside of
            `shard_map` or of another mesh.
        EpGroupClosed: the group has been closed.
    """
    spec.group.check_open()
    check_context(spec.group.mesh, "an MoE layer")
    x = compat.as_array(x)
    _check_rows("x", spec, x)
    if router_input is not None and logits is not None:
        raise ValueError("router_input and logits are both given; allowed: one of them")
    if router is not None:
        if logits is not None:
            raise ValueError(
                "logits is given, and the layer has a router of the caller's; allowed: topk"
            )
        if topk is None:
            logits, *topk = _routed(router(x if router_input is None else router_input))
    tokens = _tokens(spec, x, mask, logits, topk, router_input)

    # Compiled even where the model is not, and traced once for all layers that are alike. Not by
    # static arguments, which JAX also has where it keeps no function: they hold the group. JAX
    # names the function and its arguments in messages.
    def moe_layer(params: Any, selection_bias: Any, tokens: Any) -> tuple[jax.Array, LayerStats]:
        return _run(spec, routing, params, selection_bias, tokens)

    key = (apply, spec, routing)
    return kept(spec.group, key, lambda: jax.jit(moe_layer))(dict(params), bias, tokens)


def _routed(result: Any) -> tuple[Any, Any, Any]:
    if not isinstance(result, tuple) or len(result) != 3:
        kind = type(result).__name__
        count = f" of {len(result)}" if isinstance(result, tuple) else ""
        raise ValueError(
            f"router gave a {kind}{count}; allowed: (logits or None, topk_idx, topk_weights)"
        )
    return result


# --- what came ---------------------------------------------------------------------------------


def _tokens(
    spec: LayerSpec, x: jax.Array, mask: Any, logits: Any, topk: Any, router_input: Any
) -> Tokens:
    """By name, what there is; raises where it does not fit."""
    config, lead = spec.group.config, x.shape[:-1]
    tokens = {"x": x}
    if mask is not None:
        tokens["mask"] = compat.as_array(mask)
        check_array("mask", tokens["mask"], lead, jnp.dtype(bool), of=", as the tokens of x")
    if router_input is not None:
        tokens["router_input"] = compat.as_array(router_input)
        _check_rows("router_input", spec, tokens["router_input"], lead)
    if logits is not None:
        tokens["logits"] = compat.as_array(logits)
        _check_logits(tokens["logits"], (*lead, config.num_experts))
    if topk is not None:
        if not isinstance(topk, (tuple, list)) or len(topk) != 2:
            raise ValueError(
                f"topk is a {type(topk).__name__}; allowed: None, or (topk_idx, topk_weights), of "
                "which topk_weights may be None"
            )
        shape = (*lead, config.num_topk)
        for name, value, dtype in zip(
            ("topk_idx", "topk_weights"), topk, ("int32", "float32"), strict=True
        ):
            if value is not None or name == "topk_idx":
                tokens[name] = compat.as_array(value)
                check_array(name, tokens[name], shape, jnp.dtype(dtype), of=", as the tokens of x")
    has_logits = spec.has_router or "logits" in tokens
    if not has_logits and "topk_weights" not in tokens:
        raise ValueError(
            "topk has no topk_weights, and the layer no router; allowed: topk_weights float32"
            f"{[*lead, config.num_topk]}, or logits"
        )
    return tokens


def _check_rows(name: str, spec: LayerSpec, x: Any, lead: tuple[int, ...] | None = None) -> None:
    config = spec.group.config
    if not is_array(x):
        raise ValueError(f"{name} is a {type(x).__name__}; allowed: an array")
    is_right = x.ndim > 0 and x.shape[-1] == config.hidden and lead in (None, x.shape[:-1])
    # Numbers of 8 bits mean nothing without their scales.
    is_float = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize > 1
    if not is_right or not is_float:
        wanted = "..." if lead is None else ", ".join(map(str, lead))
        raise ValueError(
            f"{name} is {x.dtype}{list(x.shape)}; allowed: floating point of 16 bits or more, "
            f"[{wanted}, {config.hidden}] as EpConfig.hidden says"
        )


def _check_logits(logits: Any, shape: tuple[int, ...]) -> None:
    fits = is_array(logits) and logits.shape == shape
    if not fits or not jnp.issubdtype(logits.dtype, jnp.floating):
        got = f"{logits.dtype}{list(logits.shape)}" if is_array(logits) else type(logits).__name__
        raise ValueError(f"logits is {got}; allowed: floating point, {list(shape)}")


# --- which device has which tokens -------------------------------------------------------------


def _split(spec: LayerSpec, x: jax.Array) -> TokenSplit:
    mesh, lead = spec.group.mesh, x.shape[:-1]
    if spec.token_spec is not None:
        split = split_by_spec(
            spec.group, spec.token_spec, lead, spec.tensor_axes, spec.data_axes or ()
        )
    elif spec.is_explicit:
        # No token moves to its rank.
        dims = tuple(
            tuple(name for name in names if name in spec.token_axes)
            for names in sharding_dims(x, len(lead))
        )
        own = tuple(name for names in dims for name in names)
        others = tuple(name for name in spec.token_axes if name not in own)
        split = TokenSplit(mesh=mesh, shape=lead, dims=dims, others=others)
    else:
        shards = math.prod(mesh.shape[name] for name in spec.token_axes)
        if x.ndim == 1 or lead[0] % shards:
            lead = (math.prod(lead),)
        dims = (spec.token_axes, *[()] * (len(lead) - 1))
        split = TokenSplit(mesh=mesh, shape=lead, dims=dims)
    check_tokens_per_rank(spec.group, split)
    check_fsdp_axes(spec.fsdp_axes, split)
    return split


def _run(
    spec: LayerSpec,
    routing: bool,
    params: dict[str, jax.Array],
    bias: jax.Array | None,
    tokens: Tokens,
) -> tuple[jax.Array, LayerStats]:
    x = tokens["x"]
    lead, sharding = x.shape[:-1], jax.typeof(x).sharding
    split = _split(spec, x)
    if split.shape != lead:
        tokens = {n: a.reshape(*split.shape, *a.shape[len(lead) :]) for n, a in tokens.items()}
    if split.is_padded and "mask" not in tokens:
        # Padding goes to no expert.
        tokens["mask"] = jnp.ones(split.shape, bool)
    specs = {name: PartitionSpec(*p.partition) for name, p in spec.params().items()}
    stats_specs: Any = {name: PartitionSpec(*s.partition) for name, s in spec.stats().items()}
    stats_specs["tokens_per_expert"] = spec.axes.partition(("experts",))
    weights = (params,) if bias is None else (params, bias)
    out, stats = run_on_tokens(
        functools.partial(_block, spec, split, routing),
        split,
        tokens,
        weights,
        weight_specs=(specs, PartitionSpec())[: len(weights)],
        stats_specs=LayerStats(**stats_specs),
        fills={"mask": False, "topk_idx": -1},
    )
    if split.shape != lead:
        out = {name: a.reshape(*lead, *a.shape[len(split.shape) :]) for name, a in out.items()}
    if spec.is_explicit and spec.token_spec is None and not sharding.mesh.empty:
        out["x"] = reshard(spec.group.mesh, out["x"], sharding.spec)
    num_experts = spec.group.config.num_experts
    if num_experts < spec.num_experts:
        whole = reshard(spec.group.mesh, stats.tokens_per_expert, PartitionSpec())
        stats = dataclasses.replace(stats, tokens_per_expert=whole[:num_experts])
    return out["x"], dataclasses.replace(
        stats, logits=out.get("logits"), topk_idx=out.get("topk_idx")
    )


# --- what each device does ---------------------------------------------------------------------


def _block(
    spec: LayerSpec, split: TokenSplit, routing: bool, tokens: Tokens, weights: Any
) -> tuple[Tokens, LayerStats]:
    """One device's part: its tokens, and its part of the weights."""
    params, bias = weights if len(weights) == 2 else (*weights, None)
    dtype = spec.group.config.dtype
    with jax.named_scope("jax_ep.router"):
        logits = logits_of(spec, params, tokens)
        topk_idx, topk_weights = choose(spec, logits, bias, tokens)
    of_router = ("router", "router_bias")
    params = {name: w.astype(dtype) for name, w in params.items() if name not in of_router}
    experts = ExpertWeights(spec.kind, {name: params[name] for name in spec.kind.dims()})
    shared = functools.partial(_shared_experts, spec, params) if spec.shared_ffn else None
    out, stats = moe_in_parts(
        spec.group,
        split,
        spec.axes,
        (tokens["x"].astype(dtype), topk_idx, topk_weights),
        gather_experts(spec.axes, experts, experts.leaf_dims()),
        weigh=spec.weigh,
        overlap=shared,
    )
    balance, z = losses_of(spec, logits, topk_idx, (*split.axes, *split.gathered))
    outputs = {"x": out}
    if routing:
        outputs["topk_idx"] = topk_idx
        if logits is not None:
            outputs["logits"] = logits
    return outputs, _layer_stats(stats, balance, z)


def _layer_stats(stats: MoeStats, balance: jax.Array, z: jax.Array) -> LayerStats:
    return LayerStats(
        tokens_per_expert=stats.tokens_per_expert,
        num_dropped=stats.num_dropped,
        load_balance_loss=balance,
        router_z_loss=z,
    )


def _shared_experts(spec: LayerSpec, params: Params, tokens: jax.Array) -> jax.Array:
    """Of these tokens, or this device's part of the sum where `S` is split."""
    kind, axes = spec.shared_kind, spec.axes
    with jax.named_scope("jax_ep.shared_experts"):
        up = tokens @ axes.gather(params["shared_up"], ("hidden", "ffn"))
        if isinstance(kind, Gated):
            gate = tokens @ axes.gather(params["shared_gate"], ("hidden", "ffn"))
            inner = kind.activation(gate) * up
        else:
            inner = kind.activation(up)
        out = inner @ axes.gather(params["shared_down"], ("ffn", "hidden"))
        if spec.shared_gate:
            out = jax.nn.sigmoid(tokens @ params["shared_expert_gate"]) * out
        return out
