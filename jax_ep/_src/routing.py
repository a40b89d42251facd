# SPDX-License-Identifier: Apache-2.0
"""Choosing every token's experts, and keeping the experts evenly loaded.

Everything here is computed in float32, whatever the dtype of the logits, and is about the tokens
of one rank; what is about all ranks takes `axis_name`.
"""

import warnings
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jax_ep._src.compat import as_varying, varying_axes
from jax_ep._src.limits import is_int

Score = Literal["softmax", "sigmoid"]
AxisName = str | Sequence[str] | None

# Keeps the sum of a token's weights from being 0; DeepSeek-V3's constant.
_NORMALIZE_EPSILON = 1e-20
_NO_GRADIENT = (
    "num_topk is 1 and normalize is True: every token's weight is 1 (times scale), so the router "
    "gets no gradient from the output and learns from auxiliary losses only. With normalize=False, "
    "as in Switch Transformer, a token's weight is its expert's score"
)


def route(
    logits: ArrayLike,
    *,
    num_topk: int,
    score: Score = "softmax",
    bias: ArrayLike | None = None,
    num_groups: int | None = None,
    num_topk_groups: int | None = None,
    normalize: bool = True,
    scale: float = 1.0,
) -> tuple[jax.Array, jax.Array]:
    """Chooses every token's experts and their weights.

    With `score="softmax"` and no more, this is plain top-k gating (Shazeer et al. 2017,
    arXiv:1701.06538, with the softmax first). `score="sigmoid"` with `bias`, `num_groups` and
    `num_topk_groups` is the gating of DeepSeek-V3 (DeepSeek-AI 2024, arXiv:2412.19437, section
    2.1.2): the bias decides who is chosen and has no part in the weights; a group of experts
    scores the sum of its two largest biased scores, and a token's experts come from its best
    groups only.

    Gradients reach `logits` through the weights; the choice and the bias have none. Of equal
    float32 scores, that of the lower index counts as the larger one, for experts and for groups.

    Some of a token's experts may be masked by adding -1e9 or -inf to their logits: their weights
    and gradients are then 0. A token whose logits are all -inf has weights and gradients of 0. If
    there is a NaN or +inf among a token's logits, its experts are distinct, but which ones they are
    is undefined, and its weights and gradients may be NaN.

    Args:
        logits: `[T, E]`, floating point.
        num_topk: `K`, experts per token, from 1 to `E`.
        score: "softmax" over the experts, or "sigmoid" of each logit.
        bias: `[E]`, added to the scores for the choice only; see `update_bias`.
        num_groups: the experts form this many groups of neighbors, equal in size.
        num_topk_groups: groups that a token may use. Needs `num_groups`, and is needed by it.
        normalize: whether a token's weights are divided by their sum. With `num_topk=1` that
            makes each of them 1, whatever the logits are, so that no gradient reaches `logits`:
            pass False there, as Switch Transformer does.
        scale: what the weights are multiplied by at the end.

    Returns:
        `topk_idx [T, K]` int32, the largest biased score first, and `topk_weights [T, K]` float32.

    Raises:
        ValueError: an argument has a value that is not allowed; the message names it, the value
            and what is allowed.

    Warns:
        UserWarning: `num_topk` is 1 and `normalize` is True.
    """
    logits = _as_logits(logits)
    _check_route(logits, num_topk, bias, num_groups, num_topk_groups)
    num_topk = int(num_topk)  # NumPy's integers are taken as well
    if num_topk == 1 and normalize and logits.shape[1] > 1:
        # Python shows it once for each place that calls; that of all layers is one.
        warnings.warn(_NO_GRADIENT, stacklevel=2)
    scores = _scores(logits, score)
    ranked = jax.lax.stop_gradient(scores)
    if bias is not None:
        ranked = ranked + jax.lax.stop_gradient(jnp.asarray(bias).astype(jnp.float32))[None, :]
    if num_groups is not None and num_topk_groups is not None:
        ranked = _only_best_groups(ranked, int(num_groups), int(num_topk_groups))
    # Stable: of equal values, top_k puts the lower index first.
    _, topk_idx = jax.lax.top_k(ranked, num_topk)
    topk_weights = jnp.take_along_axis(scores, topk_idx, axis=-1, mode="promise_in_bounds")
    if normalize:
        topk_weights = _normalized(topk_weights)
    return topk_idx.astype(jnp.int32), topk_weights * jnp.asarray(scale, jnp.float32)


def load_balance_loss(
    logits: ArrayLike,
    topk_idx: ArrayLike,
    *,
    score: Score = "softmax",
    axis_name: AxisName = None,
) -> jax.Array:
    """The auxiliary loss that pulls routing toward an even load: `E * sum_e f_e * P_e`.

    `f_e` is the share of expert `e` in all selections, `P_e` the mean over tokens of the expert's
    share in the token's scores. It is 1 where both are even, and up to `E` where all tokens go to
    one expert. Gradients flow through `P_e` only. A token without any selection does not count,
    whatever its logits are, NaN included: its gradient is 0. Nor does one whose logits are all
    -inf. Sigmoids too small for float32 count with the ratios that they have.

    For `K = 1` it is equation 4 of Fedus et al. 2021 (Switch Transformer, arXiv:2101.03961)
    without its factor alpha (`route` is to have `normalize=False` there); the idea is from Shazeer
    et al. 2017 (arXiv:1701.06538) and Lepikhin et al. 2020 (GShard, arXiv:2006.16668). For larger
    `K`, `f_e` is divided by `K`, and sigmoid scores by their sum, as in DeepSeek-V3
    (arXiv:2412.19437, equations 17 to 20; those are of one sequence, this is of all tokens given).

    Args:
        logits: `[T, E]` as given to `route`.
        topk_idx: `[T, K]` integers, -1 where nothing is selected.
        score: as given to `route`.
        axis_name: axes of an enclosing `shard_map` or `vmap`: the loss is then that of all their
            tokens together, the same on each of them.

    Returns:
        float32 scalar; 0 if no token counts.

    Raises:
        ValueError: as `route` does.
    """
    logits = _as_logits(logits)
    topk_idx = _as_topk_idx(topk_idx, logits)
    logits, is_used = _used(logits, topk_idx)
    topk_idx = jnp.where(is_used[:, None], topk_idx, -1)
    # Sigmoids over their sum, without a sum that can be 0.
    shares = jax.nn.softmax(_log_scores(logits, score), axis=-1)
    experts = jnp.arange(logits.shape[-1], dtype=topk_idx.dtype)
    # A fused compare and sum: a scatter-add would be serial on CPU and contended on GPU.
    selections = (topk_idx[:, :, None] == experts[None, None, :]).sum((0, 1), dtype=jnp.int32)
    selections, share_sum, num_used = _sum_over(
        axis_name,
        selections,
        jnp.where(is_used[:, None], shares, 0.0).sum(axis=0),
        is_used.sum(dtype=jnp.int32),
    )
    fractions = selections.astype(jnp.float32) / _at_least_one(selections.sum())
    return logits.shape[-1] * (fractions * (share_sum / _at_least_one(num_used))).sum()


def router_z_loss(
    logits: ArrayLike, topk_idx: ArrayLike | None = None, *, axis_name: AxisName = None
) -> jax.Array:
    """The mean over tokens of `logsumexp(logits)` squared, which keeps router logits small.

    Equation 5 of Zoph et al. 2022 (ST-MoE, arXiv:2202.08906), without its coefficient.

    Args:
        logits: `[T, E]` as given to `route`.
        topk_idx: `[T, K]` integers; if given, a token without any selection does not count.
            One whose logits are all -inf does not count either way.
        axis_name: as in `load_balance_loss`.

    Returns:
        float32 scalar; 0 if no token counts.

    Raises:
        ValueError: as `route` does.
    """
    logits = _as_logits(logits)
    topk_idx = None if topk_idx is None else _as_topk_idx(topk_idx, logits)
    logits, is_used = _used(logits, topk_idx)
    squares = jnp.square(jax.nn.logsumexp(logits, axis=-1))
    total, num_used = _sum_over(
        axis_name, jnp.where(is_used, squares, 0.0).sum(), is_used.sum(dtype=jnp.int32)
    )
    return total / _at_least_one(num_used)


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
        raise ValueError(f"bias is {_show(bias)}; allowed: [E], floating point")
    if load.shape != bias.shape or not jnp.issubdtype(load.dtype, jnp.integer):
        raise ValueError(
            f"tokens_per_expert is {_show(load)}; allowed: [{bias.shape[0]}] as bias, integers"
        )
    # In integers, because a rounded mean would move experts that have exactly the mean load.
    mean, remainder = jnp.divmod(load.sum(dtype=load.dtype), bias.shape[0])
    is_above = load > mean
    is_below = (load < mean) | (~is_above & (remainder > 0))
    sign = is_below.astype(bias.dtype) - is_above.astype(bias.dtype)
    return bias + jnp.asarray(rate, bias.dtype) * sign


def _scores(logits: jax.Array, score: str) -> jax.Array:
    if score == "softmax":
        is_masked = _is_masked(logits)[:, None]
        scores = jax.nn.softmax(jnp.where(is_masked, 0.0, logits), axis=-1)
        return jnp.where(is_masked, 0.0, scores)
    if score == "sigmoid":
        return jax.nn.sigmoid(logits)
    raise _bad_score(score)


def _log_scores(logits: jax.Array, score: str) -> jax.Array:
    """Logarithms of the scores, up to what is the same for all experts of a token."""
    if score == "softmax":
        return logits
    if score == "sigmoid":
        return jax.nn.log_sigmoid(logits)
    raise _bad_score(score)


def _bad_score(score: object) -> ValueError:
    return ValueError(f"score is {score!r}; allowed: 'softmax', 'sigmoid'")


def _normalized(weights: jax.Array) -> jax.Array:
    """`weights / (their sum + epsilon)`, token by token.

    In units of a token's largest weight: the derivative of a division squares the divisor, and
    the square of a sum below 1e-19 is 0 in float32.
    """
    unit = jax.lax.stop_gradient(weights.max(axis=-1, keepdims=True)) + _NORMALIZE_EPSILON
    weights = weights / unit
    return weights / (weights.sum(axis=-1, keepdims=True) + _NORMALIZE_EPSILON / unit)


def _is_masked(logits: jax.Array) -> jax.Array:
    """`[T]` bool: whether a token may go to no expert."""
    return jnp.isneginf(logits).all(axis=-1)


def _used(logits: jax.Array, topk_idx: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Logits, and `[T]` bool: whether a token counts in a loss. Logits are 0 where it does not.

    Before anything is computed of them: what is thrown away afterwards still has a gradient, and
    0 times a gradient that is not finite is NaN.
    """
    is_used = ~_is_masked(logits)
    if topk_idx is not None:
        is_used &= (topk_idx >= 0).any(axis=-1)
    return jnp.where(is_used[:, None], logits, 0.0), is_used


def _only_best_groups(ranked: jax.Array, num_groups: int, num_topk_groups: int) -> jax.Array:
    """Minus infinity for the experts outside of a token's best groups."""
    num_tokens, num_experts = ranked.shape
    groups = ranked.reshape(num_tokens, num_groups, num_experts // num_groups)
    best_two, _ = jax.lax.top_k(groups, min(2, groups.shape[-1]))
    _, chosen = jax.lax.top_k(best_two.sum(axis=-1), num_topk_groups)
    every = jnp.arange(num_groups, dtype=chosen.dtype)
    is_chosen = (chosen[:, :, None] == every[None, None, :]).any(axis=1)
    return jnp.where(is_chosen[:, :, None], groups, -jnp.inf).reshape(ranked.shape)


def _sum_over(axis_name: AxisName, *values: jax.Array) -> tuple[jax.Array, ...]:
    if axis_name is None:
        return values
    axes = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)
    return tuple(jax.lax.psum(_varying_over_all_or_none(value, axes), axes) for value in values)


def _varying_over_all_or_none(value: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """For psum: it refuses what varies over some axes only, like tokens with copies along one."""
    if varying_axes(value) & frozenset(axes):
        (value,) = as_varying(frozenset(axes), value)
    return value


def _at_least_one(count: jax.Array) -> jax.Array:
    return jnp.maximum(count, 1).astype(jnp.float32)


def _show(array: jax.Array) -> str:
    return f"{array.dtype} of shape {array.shape}"


def _as_logits(logits: ArrayLike) -> jax.Array:
    logits = jnp.asarray(logits)
    if logits.ndim != 2 or not logits.shape[1] or not jnp.issubdtype(logits.dtype, jnp.floating):
        raise ValueError(
            f"logits is {_show(logits)}; allowed: [T, E], floating point, E at least 1"
        )
    return logits.astype(jnp.float32)


def _as_topk_idx(topk_idx: ArrayLike, logits: jax.Array) -> jax.Array:
    topk_idx = jnp.asarray(topk_idx)
    is_right = topk_idx.ndim == 2 and topk_idx.shape[0] == logits.shape[0]
    if not is_right or not jnp.issubdtype(topk_idx.dtype, jnp.signedinteger):
        raise ValueError(
            f"topk_idx is {_show(topk_idx)}; allowed: [{logits.shape[0]}, K] as logits "
            f"{logits.shape}, signed integers"
        )
    return topk_idx


def _check_route(
    logits: jax.Array,
    num_topk: Any,
    bias: ArrayLike | None,
    num_groups: int | None,
    num_topk_groups: int | None,
) -> None:
    num_experts = logits.shape[1]
    if not is_int(num_topk, maximum=num_experts):
        raise ValueError(
            f"num_topk is {num_topk!r}; allowed: an int from 1 to {num_experts}, the number of "
            "experts in logits"
        )
    if bias is not None and jnp.shape(bias) != (num_experts,):
        raise ValueError(f"bias has shape {jnp.shape(bias)}; allowed: None or ({num_experts},)")
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
