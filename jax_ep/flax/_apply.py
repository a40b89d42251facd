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
from jax_ep._src.balancing.arrays import PlacementArrays
from jax_ep._src.balancing.place import check_token_ids
from jax_ep._src.checks import check_array, is_array
from jax_ep._src.experts.bound import ExpertWeights
from jax_ep._src.experts.kinds import Gated
from jax_ep._src.groups.group import kept
from jax_ep._src.rank_mask import checked_rank_mask
from jax_ep._src.sharded.moe import (
    check_context,
    check_fsdp_axes,
    moe_in_parts,
)
from jax_ep._src.sharded.selections import sent_selections
from jax_ep._src.sharded.token_split import (
    Tokens,
    TokenSplit,
    check_tokens_per_rank,
    reshard,
    run_on_tokens,
    sharding_dims,
    split_by_spec,
)
from jax_ep._src.sharded.weights import gather_experts
from jax_ep.flax import _stats
from jax_ep.flax._layer import LayerSpec, Router
from jax_ep.flax._placed import expanded
from jax_ep.flax._router import choose, logits_of, losses_of
from jax_ep.flax._stats import LayerStats, Stats

Params = Mapping[str, jax.Array]


def apply(
    spec: LayerSpec,
    params: Params,
    bias: jax.Array | None,
    x: Any,
    *,
    placement: PlacementArrays | None = None,
    router: Router | None = None,
    routing: bool = False,
    stats: Stats = "all",
    mask: Any = None,
    logits: Any = None,
    topk: Any = None,
    router_input: Any = None,
    token_ids: Any = None,
    rank_mask: Any = None,
    expert_mask: Any = None,
) -> tuple[jax.Array, LayerStats | None]:
    """Runs the layer on global arrays.

    Args:
        spec: of the layer.
        params: by the names of `spec.params()`.
        bias: `[E]` float32, see `jax_ep.route`, or None.
        x: `[..., H]`, floating point.
        placement: where copies of experts are, if they may have some.
        router: in the place of the layer's own.
        routing: whether statistics have logits and experts.
        stats: "all", "load" or None, see `jax_ep.flax.nnx.MoE.with_stats`.
        mask: see `jax_ep.flax.nnx.MoE.__call__`, as the following.
        logits: `[..., E]`.
        topk: `[..., K]` int32, and `[..., K]` float32 or None.
        router_input: `[..., H]`.
        token_ids: `[...]` int32 or uint32.
        rank_mask: `[R]` bool.
        expert_mask: `[E]` bool.

    Returns:
        `[..., H]` of `config.dtype`, and statistics, or None.

    Raises:
        ValueError: an argument does not fit the group's config, or the call is inside of
            `shard_map` or of another mesh.
        EpGroupClosed: the group has been closed.
    """
    spec.group.check_open()
    check_context(spec.group.mesh, "an MoE layer")
    _stats.check_stats(stats)
    if routing and stats is None:
        raise ValueError("routing is True, and stats None; allowed: 'all', 'load' with it")
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
    tokens = _tokens(spec, x, mask, logits, topk, router_input, token_ids)

    # Compiled even where the model is not, and traced once for all layers that are alike. Not by
    # static arguments, which JAX also has where it keeps no function: they hold the group. JAX
    # names the function and its arguments in messages.
    def moe_layer(weights: Any, tokens: Any) -> tuple[jax.Array, LayerStats | None]:
        return _run(spec, routing, stats, weights, tokens)

    key = (apply, spec, routing, stats)
    weights = {"params": dict(params), "selection_bias": bias, "placement": placement}
    weights["rank_mask"] = checked_rank_mask(rank_mask, spec.group, "an MoE layer")
    weights["expert_mask"] = _checked_expert_mask(spec, expert_mask, tokens)
    weights = {name: value for name, value in weights.items() if value is not None}
    return kept(spec.group, key, lambda: jax.jit(moe_layer))(weights, tokens)


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
    spec: LayerSpec,
    x: jax.Array,
    mask: Any,
    logits: Any,
    topk: Any,
    router_input: Any,
    token_ids: Any,
) -> Tokens:
    """By name, what there is; raises where it does not fit."""
    config, lead = spec.group.config, x.shape[:-1]
    tokens = {"x": x}
    if mask is not None:
        tokens["mask"] = compat.as_array(mask)
        check_array("mask", tokens["mask"], lead, jnp.dtype(bool), of=", as the tokens of x")
    if token_ids is not None:
        tokens["token_ids"] = check_token_ids(token_ids, lead)
    if router_input is not None:
        tokens["router_input"] = compat.as_array(router_input)
        _check_rows("router_input", spec, tokens["router_input"], lead)
    if logits is not None:
        tokens["logits"] = compat.as_array(logits)
        _check_logits(tokens["logits"], (*lead, spec.num_routed))
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


def _checked_expert_mask(spec: LayerSpec, expert_mask: Any, tokens: Tokens) -> Any:
    if expert_mask is None:
        return None
    if "topk_idx" in tokens:
        raise ValueError(
            "expert_mask is given, and the layer does not choose the experts: topk or a router of "
            "the caller's does; allowed with them: None"
        )
    expert_mask = compat.as_array(expert_mask)
    of = ", one for each expert that the router knows"
    check_array("expert_mask", expert_mask, (spec.num_routed,), jnp.dtype(bool), of=of)
    return expert_mask


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
    stats: Stats,
    weights: dict[str, Any],
    tokens: Tokens,
) -> tuple[jax.Array, LayerStats | None]:
    x = tokens["x"]
    lead, sharding = x.shape[:-1], jax.typeof(x).sharding
    split = _split(spec, x)
    if split.shape != lead:
        tokens = {n: a.reshape(*split.shape, *a.shape[len(lead) :]) for n, a in tokens.items()}
    if split.is_padded and "mask" not in tokens:
        # Padding goes to no expert.
        tokens["mask"] = jnp.ones(split.shape, bool)
    weight_specs = jax.tree.map(lambda _: PartitionSpec(), weights)
    weight_specs["params"] = {n: PartitionSpec(*p.partition) for n, p in spec.params().items()}
    stats_specs: Any = _stats.specs(spec.group.mesh, spec.group.axis_names, stats)
    if stats == "all":
        stats_specs |= dict.fromkeys(("load_balance_loss", "router_z_loss"), PartitionSpec())
    out, found = run_on_tokens(
        functools.partial(_block, spec, split, routing, stats),
        split,
        tokens,
        weights,
        weight_specs=weight_specs,
        stats_specs=stats_specs,
        fills={"mask": False, "topk_idx": -1},
    )
    if split.shape != lead:
        out = {name: a.reshape(*lead, *a.shape[len(split.shape) :]) for name, a in out.items()}
    if spec.is_explicit and spec.token_spec is None and not sharding.mesh.empty:
        out["x"] = reshard(spec.group.mesh, out["x"], sharding.spec)
    if stats is None:
        return out["x"], None
    if stats == "all":
        placement = weights.get("placement")
        found["tokens_per_expert"] = _by_expert(spec, found["tokens_per_expert"], placement)
    names = ("num_dropped", "load_balance_loss", "router_z_loss")
    found = dict.fromkeys(names) | found  # None without collectives
    return out["x"], LayerStats(**found, logits=out.get("logits"), topk_idx=out.get("topk_idx"))


def _by_expert(spec: LayerSpec, by_slot: jax.Array, placement: PlacementArrays | None) -> jax.Array:
    """`[E]`: selections of the experts that the router knows, from those of slots `[R * L]`."""
    num_experts = spec.num_routed
    if placement is None and num_experts == by_slot.shape[0]:
        return by_slot
    whole = reshard(spec.group.mesh, by_slot, PartitionSpec())
    if placement is None:
        return whole[:num_experts]
    expert = jnp.where(placement.slot_expert < 0, num_experts, placement.slot_expert)
    return jnp.zeros(num_experts, whole.dtype).at[expert].add(whole, mode="drop")


# --- what each device does ---------------------------------------------------------------------


def _block(
    spec: LayerSpec,
    split: TokenSplit,
    routing: bool,
    wanted: Stats,
    tokens: Tokens,
    weights: dict[str, Any],
) -> tuple[Tokens, dict[str, jax.Array]]:
    """One device's part: its tokens, and its part of the weights."""
    params, bias = weights["params"], weights.get("selection_bias")
    placement, rank_mask = weights.get("placement"), weights.get("rank_mask")
    group, dtype = spec.group, spec.group.config.dtype
    with jax.named_scope("jax_ep.router"):
        logits = logits_of(spec, params, tokens)
        topk_idx, topk_weights = choose(spec, logits, bias, weights.get("expert_mask"), tokens)
        sent, topk_weights = sent_selections(
            group,
            topk_idx,
            topk_weights,
            placement=placement,
            token_ids=tokens.get("token_ids"),
            rank_mask=rank_mask,
            renormalize=spec.renormalize,
        )
    of_router = ("router", "router_bias")
    params = {name: w.astype(dtype) for name, w in params.items() if name not in of_router}
    experts = ExpertWeights(spec.kind, {name: params[name] for name in spec.kind.dims()})
    dims = experts.leaf_dims()
    if spec.replicas == "expanded":
        assert placement is not None
        experts = dataclasses.replace(experts, weights=expanded(spec, experts.weights, placement))
    shared = functools.partial(_shared_experts, spec, params) if spec.shared_ffn else None
    out, stats = moe_in_parts(
        group,
        split,
        spec.axes,
        (tokens["x"].astype(dtype), sent, topk_weights),
        gather_experts(spec.axes, experts, dims),
        weigh=spec.weigh,
        overlap=shared,
        rank_mask=rank_mask,
    )
    outputs = {"x": out}
    if routing:
        outputs["topk_idx"] = topk_idx
        if logits is not None:
            outputs["logits"] = logits
    if wanted is None:
        return outputs, {}
    if wanted == "load":
        return outputs, _stats.load(split, stats, topk_idx, sent)
    balance, z = losses_of(spec, logits, topk_idx, (*split.axes, *split.gathered))
    counts = _stats.counts(group, split, stats, topk_idx, sent)
    return outputs, {**counts, "load_balance_loss": balance, "router_z_loss": z}


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
