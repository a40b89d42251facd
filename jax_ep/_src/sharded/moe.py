# SPDX-License-Identifier: Apache-2.0
"""`sharded_moe`: `moe_with_experts` on global arrays."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from jax_ep._src import compat
from jax_ep._src.balancing.arrays import PlacementArrays, check_placement
from jax_ep._src.balancing.place import check_token_ids
from jax_ep._src.checks import check_array, check_group, is_array
from jax_ep._src.experts.bound import ExpertWeights
from jax_ep._src.experts.matrices import Dims
from jax_ep._src.groups.group import EpGroup, kept
from jax_ep._src.moe import MoeStats, Overlap, Weigh, moe_with_experts
from jax_ep._src.public import set_module
from jax_ep._src.rank_mask import checked_rank_mask, num_lost
from jax_ep._src.sharded.selections import over_tokens, sent_selections, stats_of_mesh
from jax_ep._src.sharded.token_split import (
    Tokens,
    TokenSplit,
    gather_tokens,
    run_on_tokens,
    split_by_spec,
    sum_of_parts,
)
from jax_ep._src.sharded.weights import (
    WeightAxes,
    check_axes,
    check_parts,
    expert_specs,
    gather_experts,
)

Axes = str | Sequence[str]


@overload
def sharded_moe(
    x: jax.Array,
    topk_idx: jax.Array,
    topk_weights: jax.Array,
    experts: ExpertWeights,
    *,
    group: EpGroup,
    token_spec: PartitionSpec,
    tensor_axes: Axes = ...,
    fsdp_axes: Axes = ...,
    mask: jax.Array | None = ...,
    weigh: Weigh = ...,
    placement: PlacementArrays | None = ...,
    token_ids: jax.Array | None = ...,
    rank_mask: jax.Array | None = ...,
    renormalize: bool = ...,
    with_stats: Literal[False] = ...,
) -> jax.Array: ...


@overload
def sharded_moe(
    x: jax.Array,
    topk_idx: jax.Array,
    topk_weights: jax.Array,
    experts: ExpertWeights,
    *,
    group: EpGroup,
    token_spec: PartitionSpec,
    tensor_axes: Axes = ...,
    fsdp_axes: Axes = ...,
    mask: jax.Array | None = ...,
    weigh: Weigh = ...,
    placement: PlacementArrays | None = ...,
    token_ids: jax.Array | None = ...,
    rank_mask: jax.Array | None = ...,
    renormalize: bool = ...,
    with_stats: Literal[True],
) -> tuple[jax.Array, MoeStats]: ...


@set_module("jax_ep")
def sharded_moe(
    x: jax.Array,
    topk_idx: jax.Array,
    topk_weights: jax.Array,
    experts: ExpertWeights,
    *,
    group: EpGroup,
    token_spec: PartitionSpec,
    tensor_axes: Axes = (),
    fsdp_axes: Axes = (),
    mask: jax.Array | None = None,
    weigh: Weigh = "output",
    placement: PlacementArrays | None = None,
    token_ids: jax.Array | None = None,
    rank_mask: jax.Array | None = None,
    renormalize: bool = False,
    with_stats: bool = False,
) -> jax.Array | tuple[jax.Array, MoeStats]:
    """`moe_with_experts` on global arrays: opens `jax.shard_map` over the group's mesh itself.

    Tokens are where `token_spec` says. Axes of the group that it does not name split each shard
    further, and the results are gathered; so it may be `P()` for tokens that are everywhere. What
    does not divide is padded. Along axes of the mesh that are named nowhere, every device does the
    same work.

    Experts' weights are split over the group's axes along their experts, and:

    * over `tensor_axes` along `F`: each device computes with its part, and the results, not the
      received rows, are added up (`psum`, in `config.dtype`). A tensor axis that `token_spec` names
      splits the tokens, too: they are gathered over it before, and the sums reduce-scattered.
    * over `fsdp_axes` along `H`: gathered before they are used, and gradients reduce-scattered.
      What was gathered is kept for the backward pass, unless `jax.checkpoint` says otherwise.

    Nothing else is gathered. Differentiable in `x`, `topk_weights` and the weights of experts that
    are not quantized.

    Args:
        x: `[..., H]` of `config.dtype`.
        topk_idx: `[..., K]` int32, as `dispatch` takes it; with a `placement` as `place` does.
        topk_weights: `[..., K]` float32.
        experts: of all ranks, from `jax_ep.experts`: arrays `[E, ...]`, with
            `EpConfig.pad_experts` also `[R * L, ...]`; with a `placement` those of its slots.
        group: an open `EpGroup` whose config has layout "expert".
        token_spec: of `x`: mesh axes for each of its dimensions but the last.
        tensor_axes: mesh axes over which `F` is split.
        fsdp_axes: mesh axes over which `H` of the weights is split; axes that split tokens.
        mask: `[...]` bool: False where a token goes to no expert, such as padding; None: all go.
        weigh: as `moe_with_experts` takes it.
        placement: where copies of experts are, as `ExpertPlacement.layer` gives it, whose slots
            are the group's experts: each device calls `place` for its tokens. An operand: another
            one with tables of the same shapes compiles nothing. None: no copies.
        token_ids: `[...]` int32 or uint32, as `place` takes it: with it a token of a rank goes to
            the same copies whatever tokens are beside it. Without effect where there is no
            `placement`.
        rank_mask: `[R]` bool, the ranks of each group that take part, as `dispatch` takes it; or
            None. The others are drained, and not lost: what is gathered and reduced here, and the
            statistics, are collectives of all devices.
        renormalize: as `moe_with_experts` takes it; selections of experts that have no copy in
            `placement` count as left out, too.
        with_stats: whether to return what the experts were asked for, too.

    Returns:
        `[..., H]` of `config.dtype`, split as `token_spec` says (on explicit axes but along a
        dimension that does not divide, which is gathered). With `with_stats`: a tuple of
        this and a `MoeStats` of the whole mesh, with `tokens_per_expert` `[R * L]`, by slot where
        there is a placement. `num_lost` then counts selections of experts without a copy as well.

    Raises:
        ValueError: an argument does not fit the group's config or mesh; the message names it. Or
            the call is inside of `shard_map`, where `moe_with_experts` is to be called.
        EpGroupClosed: the group has been closed.
    """
    check_group(group, expert_layout_for="sharded_moe")
    group.check_open()
    check_context(group.mesh, "sharded_moe")
    x, topk_idx, topk_weights = (compat.as_array(a) for a in (x, topk_idx, topk_weights))
    tokens = _checked_tokens(group, x, topk_idx, topk_weights, mask=mask, token_ids=token_ids)
    if not isinstance(experts, ExpertWeights):
        raise ValueError(
            f"experts is a {type(experts).__name__}; allowed: what jax_ep.experts.gated, ungated, "
            "gpt_oss or custom returns, which says how weights are split"
        )
    experts = _padded(group, jax.tree.map(jnp.asarray, experts))
    experts.check(group, num_experts=group.num_ranks * group.num_local_experts)
    tensor_axes = check_axes(group.mesh, "tensor_axes", tensor_axes, group.axis_names)
    check_parts(experts.kind, tensor_axes)
    split = split_by_spec(group, token_spec, x.shape[:-1], tensor_axes)
    fsdp_axes = check_axes(group.mesh, "fsdp_axes", fsdp_axes, (*group.axis_names, *tensor_axes))
    check_fsdp_axes(fsdp_axes, split)
    axes = WeightAxes(mesh=group.mesh, experts=group.axis_names, ffn=tensor_axes, hidden=fsdp_axes)
    if placement is not None:
        check_placement("placement", placement, group)
    replicated = {
        "placement": placement,
        "rank_mask": checked_rank_mask(rank_mask, group, "sharded_moe"),
    }
    options = {"weigh": weigh, "renormalize": bool(renormalize)}
    key = (sharded_moe, split, axes, *options.values())
    run = kept(group, key, lambda: jax.jit(functools.partial(_run, group, split, axes, **options)))
    out, stats = run(tokens, experts, replicated)
    return (out, stats) if with_stats else out


def _run(
    group: EpGroup,
    split: TokenSplit,
    axes: WeightAxes,
    tokens: Tokens,
    experts: ExpertWeights,
    replicated: dict[str, Any],
    **options: Any,
) -> tuple[jax.Array, MoeStats]:
    may_lose = any(value is not None for value in replicated.values())
    stats_specs: Any = MoeStats(
        tokens_per_expert=axes.partition(("experts",)),  # type: ignore[arg-type]
        num_dropped=PartitionSpec(),  # type: ignore[arg-type]
        num_lost=PartitionSpec() if may_lose else None,  # type: ignore[arg-type]
    )
    out, stats = run_on_tokens(
        functools.partial(_on_device, group, split, axes, experts.leaf_dims(), options),
        split,
        tokens,
        (experts, replicated),
        weight_specs=(
            expert_specs(axes, experts),
            jax.tree.map(lambda _: PartitionSpec(), replicated),
        ),
        stats_specs=stats_specs,
        fills={"topk_idx": -1, "mask": False},
    )
    return out["out"], stats


def _on_device(
    group: EpGroup,
    split: TokenSplit,
    axes: WeightAxes,
    dims: Sequence[Dims],
    options: dict[str, Any],
    tokens: Tokens,
    weights: tuple[ExpertWeights, dict[str, Any]],
) -> tuple[Tokens, MoeStats]:
    experts, replicated = weights
    idx = tokens["topk_idx"]
    if "mask" in tokens:
        idx = jnp.where(tokens["mask"][:, None], idx, -1)
    sent, topk_weights = sent_selections(
        group,
        idx,
        tokens["topk_weights"],
        token_ids=tokens.get("token_ids"),
        renormalize=options["renormalize"],
        **replicated,
    )
    out, stats = moe_in_parts(
        group,
        split,
        axes,
        (tokens["x"], sent, topk_weights),
        gather_experts(axes, experts, dims),
        weigh=options["weigh"],
        rank_mask=replicated["rank_mask"],
    )
    stats, _ = stats_of_mesh(group, split, stats)
    if any(value is not None for value in replicated.values()):
        (lost,) = over_tokens(split, num_lost(idx, sent))
        stats = dataclasses.replace(stats, num_lost=lost)
    return {"out": out}, stats


def moe_in_parts(
    group: EpGroup,
    split: TokenSplit,
    axes: WeightAxes,
    tokens: tuple[jax.Array, jax.Array, jax.Array],
    experts: ExpertWeights,
    *,
    weigh: Weigh,
    overlap: Overlap | None = None,
    rank_mask: jax.Array | None = None,
) -> tuple[jax.Array, MoeStats]:
    """Inside of `shard_map`: `moe_with_experts` with the parts of experts along the tensor axes.

    Args:
        group: an open group.
        split: of the tokens.
        axes: of the weights.
        tokens: this device's `x`, `topk_idx` and `topk_weights`.
        experts: what `gather_experts` gives.
        weigh: as `moe_with_experts` takes it.
        overlap: as `moe_with_experts` takes it, of parts along the tensor axes, too.
        rank_mask: as `moe_with_experts` takes it.

    Returns:
        This device's `[T, H]`, and statistics.
    """
    x, topk_idx, topk_weights = gather_tokens(split, *tokens)
    # Before the exchange: gradients are then added up by token, not by received row.
    x, topk_weights = compat.as_varying(frozenset(axes.ffn), x, topk_weights)
    out, stats = moe_with_experts(
        x,
        topk_idx,
        topk_weights,
        experts,
        group=group,
        weigh=weigh,
        overlap=overlap,
        rank_mask=rank_mask,
        with_stats=True,
    )
    return sum_of_parts(split, out, axes.ffn), stats


def check_fsdp_axes(fsdp_axes: tuple[str, ...], split: TokenSplit) -> None:
    """Raises unless weights are gathered by devices that have other tokens."""
    if not set(fsdp_axes) <= set(split.axes):
        raise ValueError(
            f"fsdp_axes is {fsdp_axes}; allowed: axes that split the tokens, {split.axes}, since "
            "what is split over others would be gathered to do the same work"
        )


def check_context(mesh: Mesh, what: str) -> None:
    """Raises where `shard_map` over the group's mesh cannot be opened."""
    context = jax.sharding.get_abstract_mesh()
    if context.manual_axes:
        raise ValueError(
            f"{what} is called inside of jax.shard_map over the axes {context.manual_axes}; "
            "allowed: outside of it, because it opens one over the whole mesh of its group. "
            "Inside of one over at least the group's axes, call jax_ep.route and jax_ep.moe"
        )
    if not context.empty and context != mesh.abstract_mesh:
        raise ValueError(
            f"{what} is called under a mesh (jax.set_mesh) that is {_show_mesh(context)}; "
            f"allowed: no mesh, or that of its group, {_show_mesh(mesh)}. Make the group on the "
            "mesh that the program uses"
        )


def _show_mesh(mesh: Mesh | jax.sharding.AbstractMesh) -> str:
    axes = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
    return "(" + ", ".join(f"{name}: {size} {kind.name}" for name, size, kind in axes) + ")"


def _checked_tokens(
    group: EpGroup, x: Any, topk_idx: Any, topk_weights: Any, *, mask: Any, token_ids: Any
) -> Tokens:
    """By name, what there is; raises where it does not fit."""
    config = group.config
    if not is_array(x) or x.ndim < 2 or x.shape[-1] != config.hidden or x.dtype != config.dtype:
        got = f"{x.dtype}{list(x.shape)}" if is_array(x) else f"a {type(x).__name__}"
        allowed = f"{config.dtype.name}[..., {config.hidden}], with at least two dimensions"
        raise ValueError(f"x is {got}; allowed: {allowed}")
    lead = x.shape[:-1]
    check_array("topk_idx", topk_idx, (*lead, config.num_topk), np.dtype(np.int32))
    check_array("topk_weights", topk_weights, (*lead, config.num_topk), np.dtype(np.float32))
    tokens = {"x": x, "topk_idx": topk_idx, "topk_weights": topk_weights}
    if mask is not None:
        mask = compat.as_array(mask)
        check_array("mask", mask, lead, np.dtype(bool))
        tokens["mask"] = jnp.asarray(mask)
    if token_ids is not None:
        tokens["token_ids"] = check_token_ids(token_ids, lead)
    return tokens


def _padded(group: EpGroup, experts: ExpertWeights) -> ExpertWeights:
    """With weights of experts that nobody selects, where the config pads experts."""
    num, padded = group.config.num_experts, group.num_ranks * group.num_local_experts
    if num == padded or None in experts.weights.values():  # which is refused by name
        return experts
    leaves, tree = jax.tree.flatten(experts)
    dims = experts.leaf_dims()

    def pad(leaf: jax.Array, entries: Any) -> jax.Array:
        if not leaf.ndim or entries[:1] != ("experts",) or leaf.shape[0] != num:
            return leaf
        return jnp.pad(leaf, [(0, padded - num), *[(0, 0)] * (leaf.ndim - 1)])

    return jax.tree.unflatten(tree, [pad(a, d) for a, d in zip(leaves, dims, strict=True)])
