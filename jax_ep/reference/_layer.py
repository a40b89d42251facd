# SPDX-License-Identifier: Apache-2.0
"""Routing, its losses, and the expert layer, in float64."""

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from jax_ep.reference._exchange import combine, dispatch


def silu(x: np.ndarray) -> np.ndarray:
    """`x * sigmoid(x)`."""
    return x * _sigmoid(x)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    # Neither branch can overflow.
    small = np.exp(-np.abs(x))
    return np.where(x >= 0, 1.0 / (1.0 + small), small / (1.0 + small))


def _log_sigmoid(x: np.ndarray) -> np.ndarray:
    return -np.logaddexp(0.0, -x)


def _softmax(x: np.ndarray) -> np.ndarray:
    """0 everywhere in a row of -inf, where the quotient would be 0 / 0."""
    largest = x.max(axis=-1, keepdims=True, initial=-np.inf)
    powers = np.exp(x - np.where(largest == -np.inf, 0.0, largest))
    return powers / np.where(largest == -np.inf, 1.0, powers.sum(axis=-1, keepdims=True))


def _is_used(logits: np.ndarray, topk_idx: ArrayLike | None) -> np.ndarray:
    """Which rows count in a loss: those with a selection, unless all of their logits are -inf."""
    is_used = ~(logits == -np.inf).all(axis=-1)
    if topk_idx is not None:
        topk_idx = np.asarray(topk_idx)
        is_used &= (topk_idx >= 0).any(axis=-1).reshape(-1)
    return is_used


Score = str | Callable[[np.ndarray], np.ndarray]


def _scores(logits: np.ndarray, score: Score) -> np.ndarray:
    """0 for an expert whose logit is -inf, whatever a function says."""
    if not callable(score):
        return {"softmax": _softmax, "sigmoid": _sigmoid}[score](logits)
    may_go = ~(logits == -np.inf).all(axis=-1)
    scores = np.zeros_like(logits)
    scores[may_go] = score(logits[may_go])
    return np.where(logits == -np.inf, 0.0, scores)


def _shares(logits: np.ndarray, score: Score) -> np.ndarray:
    """Scores over the token's sum of scores; 0 where that is 0."""
    if callable(score):
        scores = _scores(logits, score)
        total = scores.sum(axis=-1, keepdims=True)
        return scores / np.where(total == 0, 1.0, total)
    # Sigmoids divided by their sum are the softmax of their logarithms, which does not underflow.
    return _softmax({"softmax": lambda x: x, "sigmoid": _log_sigmoid}[score](logits))


def _largest(values: np.ndarray, count: int) -> list[int]:
    """Indices of the `count` largest values, largest first; of equals, the lower index first."""
    return sorted(range(len(values)), key=lambda i: (-values[i], i))[:count]


def route(
    logits: ArrayLike,
    *,
    num_topk: int,
    score: Score = "softmax",
    bias: ArrayLike | None = None,
    num_groups: int | None = None,
    num_topk_groups: int | None = None,
    group_score: str = "top2",
    normalize: bool = True,
    epsilon: float = 1e-20,
    scale: float = 1.0,
    expert_mask: ArrayLike | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Chooses every token's experts and their weights.

    Args:
        logits: `[T, E]`.
        num_topk: `K`.
        score: "softmax" over the experts, "sigmoid" of each, or a function of float64 logits to
            scores.
        bias: `[E]`, added to the scores when experts are chosen, not when they are weighed.
        num_groups: experts are in this many equal groups, of which a token may use only
        num_topk_groups: those with the largest sum of their two largest biased scores, or with
            the largest biased score, as
        group_score: says, "top2" or "max".
        normalize: divide a token's weights by their sum plus
        epsilon: unless both are 0.
        scale: then multiply them by this.
        expert_mask: `[E]` bool, the experts that may be chosen; the logits of the others are -inf,
            and in the score of a group they count as 0. Where there are fewer than `K`, the rest
            are -1, with weights of 0.

    Returns:
        `topk_idx [T, K]` int32, largest biased score first, and `topk_weights [T, K]` float64.
    """
    logits = np.asarray(logits).astype(np.float64)
    may_be = np.ones(logits.shape[1], bool) if expert_mask is None else np.asarray(expert_mask)
    logits = np.where(may_be, logits, -np.inf)
    scores = _scores(logits, score)
    num_tokens, num_experts = scores.shape
    topk_idx = np.zeros((num_tokens, num_topk), np.int32)
    topk_weights = np.zeros((num_tokens, num_topk))
    for token in range(num_tokens):
        ranked = scores[token].copy()
        if bias is not None:
            ranked += np.asarray(bias).astype(np.float64)
        ranked[~may_be] = -np.inf
        if num_groups is not None:
            groups = ranked.reshape(num_groups, num_experts // num_groups)
            counted = {"top2": 2, "max": 1}[group_score]
            group_scores = np.array([_group_score(group, counted) for group in groups])
            for group in _largest(group_scores, num_groups)[num_topk_groups:]:
                groups[group] = -np.inf
        chosen = np.array(_largest(ranked, num_topk))
        is_one = ranked[chosen] > -np.inf if expert_mask is not None else chosen >= 0
        topk_idx[token] = np.where(is_one, chosen, -1)
        weights = np.where(is_one, scores[token, chosen], 0.0)
        if normalize:
            weights = weights / ((weights.sum() + epsilon) or 1.0)
        topk_weights[token] = weights * scale
    return topk_idx, topk_weights


def _group_score(ranked: np.ndarray, counted: int) -> float:
    """The sum of the largest; -inf for a group of which no expert may be chosen."""
    largest = np.sort(ranked)[-counted:]
    if (largest == -np.inf).all():
        return -np.inf
    return float(largest[largest > -np.inf].sum())


def route_expert_choice(logits: ArrayLike, *, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Every expert chooses the `capacity` tokens of all ranks with its largest softmax scores.

    Of equals, the lower (rank, token) first; never one whose logit for it is -inf.

    Args:
        logits: `[R, T, E]`.
        capacity: tokens of an expert, or all that there are.

    Returns:
        `topk_idx [R, T, E]` int32, `e` or -1 in column `e`, and `topk_weights [R, T, E]` float64.
    """
    logits = np.asarray(logits).astype(np.float64)
    num_experts = logits.shape[-1]
    scores = _softmax(logits)
    topk_idx = np.full(logits.shape, -1, np.int32)
    for expert in range(num_experts):
        may_take = np.argwhere(logits[:, :, expert] > -np.inf).tolist()  # by rank, then token
        values = np.array([scores[rank, token, expert] for rank, token in may_take])
        for at in _largest(values, capacity):
            rank, token = may_take[at]
            topk_idx[rank, token, expert] = expert
    return topk_idx, np.where(topk_idx >= 0, scores, 0.0)


def load_balance_loss(
    logits: ArrayLike,
    topk_idx: ArrayLike,
    *,
    score: Score = "softmax",
    segment_ids: ArrayLike | None = None,
    num_segments: int | None = None,
) -> float:
    """`E * sum_e f_e P_e`: 1 where all experts are equally popular.

    `f_e` is the share of expert `e` in all selections, `P_e` the mean over tokens of its score
    divided by the token's sum of scores. Tokens without a selection do not count, nor do those
    whose logits are all -inf.

    Args:
        logits: `[..., E]`; any leading axes, all of them together are one batch.
        topk_idx: `[..., K]`, -1 where nothing is selected.
        score: as in `route`.
        segment_ids: `[...]`, the sequence of each token; then it is the mean of the losses of
        num_segments: sequences, of those that have a token that counts.
    """
    num_experts = np.shape(logits)[-1]
    logits = np.asarray(logits).astype(np.float64).reshape(-1, num_experts)
    if segment_ids is not None:
        topk_idx = np.asarray(topk_idx).reshape(len(logits), np.shape(topk_idx)[-1])
        rows = [np.ravel(segment_ids) == number for number in range(num_segments or 0)]
        losses = [
            load_balance_loss(logits[row], topk_idx[row], score=score)
            for row in rows
            if _is_used(logits[row], topk_idx[row]).any()
        ]
        return float(np.mean(losses)) if losses else 0.0
    is_used = _is_used(logits, topk_idx)
    if not is_used.any():
        return 0.0
    topk_idx = np.asarray(topk_idx).reshape(len(logits), -1)[is_used]
    probabilities = _shares(logits[is_used], score)
    counts = np.array([(topk_idx == expert).sum() for expert in range(num_experts)])
    fractions = counts / counts.sum()
    return float(num_experts * (fractions * probabilities.mean(axis=0)).sum())


def router_z_loss(logits: ArrayLike, topk_idx: ArrayLike | None = None) -> float:
    """The mean over tokens of `log(sum_e exp(logit_e))` squared.

    Args:
        logits: `[..., E]`.
        topk_idx: `[..., K]`; if given, tokens without a selection do not count. Those whose
            logits are all -inf never do.
    """
    logits = np.asarray(logits).astype(np.float64)
    logits = logits.reshape(-1, logits.shape[-1])
    logits = logits[_is_used(logits, topk_idx)]
    if not len(logits):
        return 0.0
    largest = logits.max(axis=-1)
    log_z = largest + np.log(np.exp(logits - largest[:, None]).sum(axis=-1))
    return float((log_z**2).mean())


def update_bias(bias: ArrayLike, tokens_per_expert: ArrayLike, *, rate: float) -> np.ndarray:
    """Raises the bias of experts with less than the mean load by `rate`, lowers the others'."""
    load = [int(n) for n in np.asarray(tokens_per_expert)]
    # In whole numbers, so that an expert with exactly the mean load keeps its bias.
    signs = [np.sign(sum(load) - len(load) * n) for n in load]
    return np.asarray(bias).astype(np.float64) + rate * np.array(signs, np.float64)


def moe(
    x: ArrayLike,
    topk_idx: ArrayLike,
    topk_weights: ArrayLike,
    w_gate: ArrayLike,
    w_up: ArrayLike,
    w_down: ArrayLike,
    *,
    activation: Callable[[np.ndarray], np.ndarray] = silu,
    wire_dtype: DTypeLike | None = None,
    layout: str = "expert",
    recv_capacity: int | None = None,
    capacity_factor: float | None = None,
    expert_alignment: int = 1,
    rank_mask: ArrayLike | None = None,
    renormalize: bool = False,
) -> np.ndarray:
    """Dispatch, gated FFN of every row, combine; with the drops that the capacity causes.

    Args:
        x: `[R, T, H]`.
        topk_idx: `[R, T, K]`.
        topk_weights: `[R, T, K]`.
        w_gate: `[E, H, F]`, of all experts.
        w_up: `[E, H, F]`.
        w_down: `[E, F, H]`.
        activation: of the gate.
        wire_dtype: see `dispatch`.
        layout: see `plan`.
        recv_capacity: see `plan`.
        capacity_factor: see `plan`.
        expert_alignment: see `plan`.
        rank_mask: see `plan`.
        renormalize: with a `rank_mask`: multiply a token's remaining weights by the sum of all of
            its selections' over that of the remaining ones.

    Returns:
        `[R, T, H]` float64.
    """
    topk_weights, w_gate, w_up, w_down = (
        np.asarray(a).astype(np.float64) for a in (topk_weights, w_gate, w_up, w_down)
    )
    recv = dispatch(
        x,
        topk_idx,
        num_experts=len(w_gate),
        dtype=np.float64,
        wire_dtype=wire_dtype,
        layout=layout,
        recv_capacity=recv_capacity,
        capacity_factor=capacity_factor,
        expert_alignment=expert_alignment,
        rank_mask=rank_mask,
    )
    if renormalize:
        topk_weights = _renormalized(topk_weights, np.asarray(topk_idx), recv.plan.topk_idx)
    rows = recv.x
    assert isinstance(rows, np.ndarray)  # as `dtype` says, which no `recv_dtype` overrides here
    y = np.zeros_like(rows)
    for source, token, k in np.argwhere(recv.plan.slot >= 0):
        expert = recv.plan.topk_idx[source, token, k]
        at = expert // recv.plan.num_local_experts, recv.plan.slot[source, token, k]
        gate = activation(rows[at] @ w_gate[expert])
        value = (gate * (rows[at] @ w_up[expert])) @ w_down[expert]
        # Weighted here, because in layout "rank" a row can be for several experts.
        y[at] += topk_weights[source, token, k] * value
    return combine(y, recv.plan, exact_bits=False)


def _renormalized(weights: np.ndarray, asked: np.ndarray, remaining: np.ndarray) -> np.ndarray:
    """Weights of what remains of the selections that were asked for."""
    of_all = np.where(asked >= 0, weights, 0.0).sum(axis=-1, keepdims=True)
    of_rest = np.where(remaining >= 0, weights, 0.0).sum(axis=-1, keepdims=True)
    return weights * np.where(of_rest == 0, 1.0, of_all / np.where(of_rest == 0, 1.0, of_rest))


def moe_dense(
    x: ArrayLike,
    topk_idx: ArrayLike,
    topk_weights: ArrayLike,
    w_gate: ArrayLike,
    w_up: ArrayLike,
    w_down: ArrayLike,
    *,
    activation: Callable[[np.ndarray], np.ndarray] = silu,
) -> np.ndarray:
    """What `moe` computes without drops and FP8, by applying every expert to every token.

    Args:
        x: `[..., T, H]`.
        topk_idx: `[..., T, K]`.
        topk_weights: `[..., T, K]`.
        w_gate: `[E, H, F]`.
        w_up: `[E, H, F]`.
        w_down: `[E, F, H]`.
        activation: of the gate.

    Returns:
        `[..., T, H]` float64.
    """
    x, topk_weights, w_gate, w_up, w_down = (
        np.asarray(a).astype(np.float64) for a in (x, topk_weights, w_gate, w_up, w_down)
    )
    out = np.zeros_like(x)
    for e in range(len(w_gate)):
        weight = np.where(np.asarray(topk_idx) == e, topk_weights, 0.0).sum(axis=-1)
        value = (activation(x @ w_gate[e]) * (x @ w_up[e])) @ w_down[e]
        out += weight[..., None] * value
    return out
