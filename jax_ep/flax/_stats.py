# SPDX-License-Identifier: Apache-2.0
"""What a call of a layer says about its routing: `LayerStats`, and how devices make it."""

import dataclasses
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from jax_ep._src import compat
from jax_ep._src.groups.group import EpGroup
from jax_ep._src.moe import MoeStats
from jax_ep._src.public import set_module
from jax_ep._src.rank_mask import num_lost
from jax_ep._src.sharded.selections import over_tokens, stats_of_mesh
from jax_ep._src.sharded.token_split import TokenSplit

Stats = Literal["all", "load"] | None


@set_module("jax_ep.flax.nnx")
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerStats:
    """What one call of a layer says about its routing, over all tokens of all devices.

    With `with_stats(..., stats="load")` devices add up nothing: what follows has a first dimension
    `D`, of the coordinates of the mesh's other axes, which is to be summed over, and every array
    stays where its numbers are. `tokens_per_expert` is then by slot: `[D, P]`, `P = R * L`, and a
    placement says which experts they are. `jax_ep.LoadWindow` takes either.

    Attributes:
        tokens_per_expert: `[E]` int32, selections of each expert, before any drop. With copies,
            `E` are the experts that the router knows.
        num_dropped: `[]` int32, of those the ones that found no room. None with "load".
        load_balance_loss: `[]` float32, see `jax_ep.load_balance_loss`. Differentiable. 0 where
            the call had no logits. None with "load".
        router_z_loss: `[]` float32, see `jax_ep.router_z_loss`. Differentiable. 0 where the call
            had no logits. None with "load".
        logits: `[..., E]` float32, the router's, differentiable; None but where they are asked for
            by `with_stats(..., routing=True)`, and there are any.
        topk_idx: `[..., K]` int32, the experts chosen, lost or not, -1 for a token that is masked;
            None but where it is asked for.
        rows_per_rank: `[R]` int32, selections of each rank's experts before any drop, copies
            counted where they went; "load": `[D, R]`.
        dropped_per_rank: `[R]` int32, of those the ones that found no room; "load": `[D, R]`.
        num_tokens: `[]` int32, tokens with a selection that is sent; "load": `[D, R]`.
        num_lost: `[]` int32, selections that are not sent, and are in no other count: of experts
            that have no copy, of ranks that `rank_mask` leaves out, and of these ranks' tokens;
            "load": `[D, R]`.
    """

    tokens_per_expert: jax.Array
    num_dropped: jax.Array
    load_balance_loss: jax.Array
    router_z_loss: jax.Array
    logits: jax.Array | None = None
    topk_idx: jax.Array | None = None
    # Any: None, in the statistics of a layer that has not been called, and in no other ones.
    rows_per_rank: jax.Array | Any = None
    dropped_per_rank: jax.Array | Any = None
    num_tokens: jax.Array | Any = None
    num_lost: jax.Array | Any = None

    @classmethod
    def zeros(cls, num_experts: int) -> "LayerStats":
        """Those of a layer that has not been called."""
        return cls(
            tokens_per_expert=jnp.zeros((num_experts,), jnp.int32),
            num_dropped=jnp.zeros((), jnp.int32),
            load_balance_loss=jnp.zeros((), jnp.float32),
            router_z_loss=jnp.zeros((), jnp.float32),
        )

    def as_dict(self) -> dict[str, jax.Array]:
        """By name, in the order of the attributes; without those that are None."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if value is not None}


def check_stats(stats: Any) -> None:
    """Raises unless it says which statistics are wanted."""
    allowed = (*get_args(get_args(Stats)[0]), None)
    if stats not in allowed:
        raise ValueError(f"stats is {stats!r}; allowed: {', '.join(map(repr, allowed))}")


def specs(mesh: Mesh, experts: tuple[str, ...], stats: Stats) -> dict[str, PartitionSpec]:
    """Where the arrays of `counts` and `load` are."""
    if stats is None:
        return {}
    by_rank, whole = PartitionSpec(experts), PartitionSpec()
    if stats == "load":
        others = tuple(name for name in mesh.axis_names if name not in experts)
        by_rank = whole = PartitionSpec(others or None, experts)
    found = dict.fromkeys(("tokens_per_expert", "rows_per_rank", "dropped_per_rank"), by_rank)
    found |= dict.fromkeys(("num_tokens", "num_lost"), whole)
    return found if stats == "load" else found | {"num_dropped": whole}


def counts(
    group: EpGroup, split: TokenSplit, stats: MoeStats, chosen: jax.Array, sent: jax.Array
) -> dict[str, jax.Array]:
    """Inside of `shard_map`: of all devices.

    Args:
        group: of the layer.
        split: of the tokens.
        stats: of this device.
        chosen: `[T, K]`, experts of this device's tokens, or -1.
        sent: `[T, K]`, where these went; -1 for those that are lost, too.
    """
    of_mesh, dropped = stats_of_mesh(group, split, stats)
    num_tokens, lost = over_tokens(split, *_of_tokens(chosen, sent))
    return {
        "tokens_per_expert": of_mesh.tokens_per_expert,
        "rows_per_rank": of_mesh.tokens_per_expert.sum(dtype=jnp.int32)[None],
        "dropped_per_rank": dropped[None],
        "num_tokens": num_tokens,
        "num_lost": lost,
        "num_dropped": of_mesh.num_dropped,
    }


def load(
    split: TokenSplit, stats: MoeStats, chosen: jax.Array, sent: jax.Array
) -> dict[str, jax.Array]:
    """Inside of `shard_map`: what this device knows; zeros where another one counts the same."""
    num_tokens, lost = _of_tokens(chosen, sent)
    rows = {
        "tokens_per_expert": stats.tokens_per_expert[None],
        "rows_per_rank": stats.tokens_per_expert.sum(dtype=jnp.int32)[None, None],
        "dropped_per_rank": stats.num_dropped[None, None],
    }
    tokens = {"num_tokens": num_tokens[None, None], "num_lost": lost[None, None]}
    own = (*split.axes, *split.gathered)
    return _once(split.mesh, split.axes, rows) | _once(split.mesh, own, tokens)


def _of_tokens(chosen: jax.Array, sent: jax.Array) -> tuple[jax.Array, jax.Array]:
    num_tokens = (sent >= 0).any(axis=-1).sum(dtype=jnp.int32)
    return num_tokens, num_lost(chosen, sent)


def _once(mesh: Mesh, axes: tuple[str, ...], values: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Zeros but on the first of the devices along other axes, which have the same."""
    everywhere = frozenset(mesh.axis_names)
    values = dict(zip(values, compat.as_varying(everywhere, *values.values()), strict=True))
    alike = tuple(name for name in mesh.axis_names if name not in axes)
    if not alike:
        return values
    is_first = jax.lax.axis_index(alike) == 0
    return {name: jnp.where(is_first, value, 0) for name, value in values.items()}
