# SPDX-License-Identifier: Apache-2.0
"""Choosing every token's experts, and keeping the experts evenly loaded.

Everything here is computed in float32, whatever the dtype of the logits, and is about the tokens
of one rank; what is about all ranks takes `axis_name`. The losses are in `losses.py`, routing in
which experts choose in `expert_choice.py`.
"""

import numbers
import warnings
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jax_ep._src.limits import is_int
from jax_ep._src.losses import AxisName, load_balance_loss, router_z_loss
from jax_ep._src.public import set_module
from jax_ep._src.scores import LEAST_NORMAL, Score, as_logits, normalized, scores_of, show

__all__ = [
    "AxisName",
    "GroupScore",
    "Score",
    "load_balance_loss",
    "route",
    "router_z_loss",
    "update_bias",
]

GroupScore = Literal["top2", "max"]

_NO_GRADIENT = (
    "num_topk is 1 and normalize is True: every token's weight is 1 (times scale), so the router "
    "gets no gradient from the output and learns from auxiliary losses only. With normalize=False, "
    "as in Switch Transformer, a token's weight is its expert's score"
)


@set_module("jax_ep")
def route(
    logits: ArrayLike,
    *,
    num_topk: int,
    score: Score = "softmax",
    bias: ArrayLike | None = None,
    num_groups: int | None = None,
    num_topk_groups: int | None = None,
    group_score: GroupScore = "top2",
    normalize: bool = True,
    epsilon: float = 1e-20,
    scale: float = 1.0,
    expert_mask: ArrayLike | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Chooses every token's experts and their weights.

    With `score="softmax"` and no more, this is plain top-k gating (Shazeer et al. 2017,
    arXiv:1701.06538). `normalize` makes the order of softmax and top-k irrelevant: a softmax of
    the `K` largest logits is the softmax of all of them, divided by its sum over the `K`. So
    "softmax after top-k" is `normalize=True`, and "softmax before top-k, weights not normalized"
    is `normalize=False`.

    `score="sigmoid"` with `bias`, `num_groups` and `num_topk_groups` is the gating of DeepSeek-V3
    (DeepSeek-AI 2024, arXiv:2412.19437, section 2.1.2): the bias decides who is chosen and has no
    part in the weights; a token's experts come from its best groups only. What a group of experts
    scores differs between recipes, and so do the experts that are chosen: see `group_score`. In
    the table, "groups" are `num_groups` and `num_topk_groups`; `scale` is the recipe's own factor.

    | recipe | arguments beside `num_topk` |
    |---|---|
    | Mixtral, Qwen3-MoE, DBRX | none |
    | gpt-oss, GraniteMoE (softmax after top-k) | none |
    | Switch Transformer, Qwen2-MoE, OLMoE, Jamba, DeepSeek-V2-Lite | `normalize=False` |
    | DeepSeek-V2 (`group_limited_greedy`) | groups, `group_score="max"`, `normalize=False` |
    | DeepSeek-V3 (`noaux_tc`) | `score="sigmoid"`, `bias`, groups |
    | GLM-4.5, MiniMax-M2 | `score="sigmoid"`, `bias` |
    | LFM2-MoE | `score="sigmoid"`, `bias`, `epsilon=1e-6` |
    | ERNIE-4.5 | `bias` |
    | DeepSeek-V4 | `score=lambda v: jnp.sqrt(jax.nn.softplus(v))`, `bias` |

    Gradients reach `logits` through the weights; the choice and the bias have none. Of equal
    float32 scores, that of the lower index counts as the larger one, for experts and for groups.

    Some of a token's experts may be masked by adding -1e9 or -inf to their logits: their weights
    and gradients are then 0. A token whose logits are all -inf has weights and gradients of 0. If
    there is a NaN or +inf among a token's logits, its experts are distinct, but which ones they are
    is undefined, and its weights and gradients may be NaN.

    Args:
        logits: `[T, E]`, floating point.
        num_topk: `K`, experts per token, from 1 to `E`.
        score: "softmax" over the experts, "sigmoid" of each logit, or a function that has the
            logits `[T, E]` in float32 and gives `[T, E]` float32 scores of at least 0, those of a
            token from that token's logits. It is called twice. The logit of an expert that
            scores exactly 0 gets no gradient; an expert with a logit of -inf scores 0, whatever
            the function gives for it.
        bias: `[E]`, added to the scores for the choice only; see `update_bias`.
        num_groups: the experts form this many groups of neighbors, equal in size.
        num_topk_groups: groups that a token may use. Needs `num_groups`, and is needed by it.
        group_score: what a group scores: "top2", the sum of its two largest biased scores
            (DeepSeek-V3), or "max", the largest one (DeepSeek-V2; with a bias, too). Without
            effect where there are no groups.
        normalize: whether a token's weights are divided by their sum plus `epsilon`. With
            `num_topk=1` that makes each of them 1, whatever the logits are, so that no gradient
            reaches `logits`: pass False there, as Switch Transformer does.
        epsilon: at least 0; what is below float32's least normal number, 1.2e-38, is 0. A sum of 0
            gives weights of 0 with any of them. 1e-20 is the constant of DeepSeek-V3. For the
            softmax it makes no difference to 0, as Mixtral has it: the sum is at least `K / E`.
        scale: what the weights are multiplied by at the end.
        expert_mask: `[E]` bool, False for experts that no token may choose, such as those of which
            no rank that takes part has a copy (see `rank_mask` of `dispatch`). Their logits count
            as -inf, whatever the bias, and their scores as 0 in that of their group. A token that
            may choose fewer than `K` gets -1 for the rest, with weights of 0. None: all may be
            chosen.

    Returns:
        `topk_idx [T, K]` int32, the largest biased score first, and `topk_weights [T, K]` float32.

    Raises:
        ValueError: an argument has a value that is not allowed; the message names it, the value
            and what is allowed.

    Warns:
        UserWarning: `num_topk` is 1 and `normalize` is True.
    """
    logits = as_logits(logits)
    _check_experts(logits.shape[1], num_topk, bias)
    _check_groups(logits.shape[1], num_topk, num_groups, num_topk_groups, group_score)
    _as_epsilon(epsilon)  # refused where it is not used, too
    num_topk = int(num_topk)  # NumPy's integers are taken as well
    if num_topk == 1 and normalize and logits.shape[1] > 1:
        # Python shows it once for each place that calls; that of all layers is one.
        warnings.warn(_NO_GRADIENT, stacklevel=2)
    may_be = None if expert_mask is None else _as_expert_mask(expert_mask, logits.shape[1])[None, :]
    if may_be is not None:
        logits = jnp.where(may_be, logits, -jnp.inf)
    scores = scores_of(logits, score)
    ranked = jax.lax.stop_gradient(scores)
    if bias is not None:
        ranked = ranked + jax.lax.stop_gradient(jnp.asarray(bias).astype(jnp.float32))[None, :]
    if may_be is not None:
        ranked = jnp.where(may_be, ranked, -jnp.inf)
    if num_groups is not None and num_topk_groups is not None:
        limits = int(num_groups), int(num_topk_groups), group_score
        ranked = _only_best_groups(ranked, *limits, masked=may_be is not None)
    # Stable: of equal values, top_k puts the lower index first.
    best, topk_idx = jax.lax.top_k(ranked, num_topk)
    topk_weights = jnp.take_along_axis(scores, topk_idx, axis=-1, mode="promise_in_bounds")
    if may_be is not None:
        is_one = ~jnp.isneginf(best)
        topk_idx, topk_weights = jnp.where(is_one, topk_idx, -1), jnp.where(is_one, topk_weights, 0)
    topk_weights = weights_of(topk_weights, normalize=normalize, epsilon=epsilon, scale=scale)
    return topk_idx.astype(jnp.int32), topk_weights


def weights_of(
    topk_scores: jax.Array, *, normalize: bool, epsilon: float, scale: float
) -> jax.Array:
    """`[T, K]`: the weights of experts that were chosen, of their scores `[T, K]`; see `route`."""
    if normalize:
        topk_scores = normalized(topk_scores, _as_epsilon(epsilon))
    return topk_scores * jnp.asarray(scale, jnp.float32)


@set_module("jax_ep")
def update_bias(bias: ArrayLike, tokens_per_expert: ArrayLike, *, rate: float) -> jax.Array:
    """One step of balancing without an auxiliary loss: `bias + rate * sign(mean load - load)`.

    From Wang et al. 2024 (arXiv:2408.15664, algorithm 1), as DeepSeek-V3 uses it. To be called
    once per training step, outside the gradient, with the load of the whole batch.

    Args:
        bias: `[E]`, floating point; start from zeros.
        tokens_per_expert: `[E]` integers, of all experts and summed over all ranks; their sum has
            to fit int32.
        rate: the step; 0.001 in the papers.

    Returns:
        `[E]` of the dtype of `bias`. An expert with exactly the mean load keeps its bias.

    Raises:
        ValueError: as `route` does.
    """
    bias, load = jnp.asarray(bias), jnp.asarray(tokens_per_expert)
    if bias.ndim != 1 or not jnp.issubdtype(bias.dtype, jnp.floating):
        raise ValueError(f"bias is {show(bias)}; allowed: [E], floating point")
    if load.shape != bias.shape or not jnp.issubdtype(load.dtype, jnp.integer):
        raise ValueError(
            f"tokens_per_expert is {show(load)}; allowed: [{bias.shape[0]}] as bias, integers"
        )
    # In integers, because a rounded mean would move experts that have exactly the mean load.
    mean, remainder = jnp.divmod(load.sum(dtype=load.dtype), bias.shape[0])
    is_above = load > mean
    is_below = (load < mean) | (~is_above & (remainder > 0))
    sign = is_below.astype(bias.dtype) - is_above.astype(bias.dtype)
    return bias + jnp.asarray(rate, bias.dtype) * sign


def _only_best_groups(
    ranked: jax.Array,
    num_groups: int,
    num_topk_groups: int,
    group_score: GroupScore,
    *,
    masked: bool,
) -> jax.Array:
    """Minus infinity for the experts outside of a token's best groups."""
    num_tokens, num_experts = ranked.shape
    groups = ranked.reshape(num_tokens, num_groups, num_experts // num_groups)
    counted = 1 if group_score == "max" else min(2, groups.shape[-1])
    best, _ = jax.lax.top_k(groups, counted)
    sums = best.sum(axis=-1)
    if masked:  # -inf counts as 0 where the group has others
        of_others = jnp.where(jnp.isneginf(best), 0, best).sum(axis=-1)
        sums = jnp.where(jnp.isneginf(best[..., 0]), -jnp.inf, of_others)
    _, chosen = jax.lax.top_k(sums, num_topk_groups)
    every = jnp.arange(num_groups, dtype=chosen.dtype)
    is_chosen = (chosen[:, :, None] == every[None, None, :]).any(axis=1)
    return jnp.where(is_chosen[:, :, None], groups, -jnp.inf).reshape(ranked.shape)


# --- arguments -----------------------------------------------------------------------------------


def _check_experts(num_experts: int, num_topk: Any, bias: ArrayLike | None) -> None:
    if not is_int(num_topk, maximum=num_experts):
        raise ValueError(
            f"num_topk is {num_topk!r}; allowed: an int from 1 to {num_experts}, the number of "
            "experts in logits"
        )
    if bias is not None and jnp.shape(bias) != (num_experts,):
        raise ValueError(f"bias has shape {jnp.shape(bias)}; allowed: None or ({num_experts},)")


def _as_expert_mask(expert_mask: ArrayLike, num_experts: int) -> jax.Array:
    mask = jnp.asarray(expert_mask)
    if mask.shape != (num_experts,) or mask.dtype != np.dtype(bool):
        raise ValueError(f"expert_mask is {show(mask)}; allowed: None, or bool[{num_experts}]")
    return jax.lax.stop_gradient(mask)


def _check_groups(
    num_experts: int,
    num_topk: int,
    num_groups: int | None,
    num_topk_groups: int | None,
    group_score: Any,
) -> None:
    if group_score not in ("top2", "max"):
        raise ValueError(f"group_score is {group_score!r}; allowed: 'top2', 'max'")
    if num_groups is None and num_topk_groups is None:
        return
    if (
        num_groups is None
        or not is_int(num_groups, maximum=num_experts)
        or num_experts % num_groups
    ):
        raise ValueError(
            f"num_groups is {num_groups!r} and num_topk_groups is {num_topk_groups!r}; allowed: "
            f"both None, or num_groups a divisor of the number of experts, {num_experts}"
        )
    if num_topk_groups is None or not is_int(num_topk_groups, maximum=num_groups):
        raise ValueError(
            f"num_topk_groups is {num_topk_groups!r}; allowed: an int from 1 to num_groups, "
            f"{num_groups}"
        )
    max_topk = num_topk_groups * (num_experts // num_groups)
    if num_topk > max_topk:
        raise ValueError(
            f"num_topk is {num_topk}; allowed: at most {max_topk}, the experts in "
            f"num_topk_groups = {num_topk_groups} of num_groups = {num_groups} groups of "
            f"{num_experts} experts"
        )


def _as_epsilon(epsilon: Any) -> float:
    is_number = isinstance(epsilon, numbers.Real) and not isinstance(epsilon, (bool, np.bool_))
    # False for NaN.
    if not is_number or not 0 <= float(epsilon) <= float(jnp.finfo(jnp.float32).max):
        raise ValueError(f"epsilon is {epsilon!r}; allowed: a number of at least 0, in float32")
    return float(epsilon) if float(epsilon) >= LEAST_NORMAL else 0.0
