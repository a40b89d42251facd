# SPDX-License-Identifier: Apache-2.0
"""Auxiliary losses: of an uneven load, and of large logits."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jax_ep._src.compat import as_varying, varying_axes
from jax_ep._src.limits import is_int
from jax_ep._src.public import set_module
from jax_ep._src.scores import Score, as_logits, is_masked, shares_of, show

AxisName = str | Sequence[str] | None


@set_module("jax_ep")
def load_balance_loss(
    logits: ArrayLike,
    topk_idx: ArrayLike,
    *,
    score: Score = "softmax",
    axis_name: AxisName = None,
    segment_ids: ArrayLike | None = None,
    num_segments: int | None = None,
) -> jax.Array:
    """The auxiliary loss that pulls routing toward an even load: `E * sum_e f_e * P_e`.

    `f_e` is the share of expert `e` in all selections, `P_e` the mean over tokens of the expert's
    share in the token's scores. It is 1 where both are even, and up to `E` where all tokens go to
    one expert. Gradients flow through `P_e` only. A token without any selection does not count,
    whatever its logits are, NaN included: its gradient is 0. Nor does one whose logits are all
    -inf. Sigmoids too small for float32 count with the ratios that they have; a token of which a
    function `score` makes zeros only has shares of 0.

    With `segment_ids` it is the mean over sequences of each sequence's own loss, in which a
    sequence without a token that counts has no part. That costs a product of `[num_segments, T]`
    and `[T, E]`, and of its gradient, and with `axis_name` sums over the axes of
    `[num_segments, E]` instead of `[E]`.

    For `K = 1` it is equation 4 of Fedus et al. 2021 (Switch Transformer, arXiv:2101.03961)
    without its factor alpha (`route` is to have `normalize=False` there); the idea is from Shazeer
    et al. 2017 (arXiv:1701.06538) and Lepikhin et al. 2020 (GShard, arXiv:2006.16668). For larger
    `K`, `f_e` is divided by `K`, and sigmoid scores by their sum, as in DeepSeek-V3
    (arXiv:2412.19437, equations 17 to 20; those are of one sequence: see `segment_ids`).

    A coefficient from elsewhere is to be multiplied with what that recipe's loss is to this one:

    | recipe | its loss, without its coefficient |
    |---|---|
    | Switch Transformer, the paper | this, with `K = 1` |
    | Megatron-LM `aux_loss`, DeepSeek-V2 without `seq_aux` | this |
    | DeepSeek-V3, DeepSeek-V2 with `seq_aux`, Megatron-LM `seq_aux_loss` | this, by sequence |
    | MaxText | `K` times this, by sequence |
    | Hugging Face: Mixtral, Qwen-MoE, OLMoE, gpt-oss ... | `K` times this, of all layers' tokens |
    | Hugging Face: Switch Transformers | this with `K = 1`, by sequence, of all layers' tokens |

    "By sequence": with `segment_ids`. "Of all layers' tokens": once for the whole model, with the
    `logits` and `topk_idx` of all layers concatenated along `T` (and `segment_ids` repeated). The
    sum over `n` layers of each layer's loss is near `n` times that, and not the same.

    Args:
        logits: `[T, E]` as given to `route`.
        topk_idx: `[T, K]` integers, -1 where nothing is selected.
        score: as given to `route`.
        axis_name: axes of an enclosing `shard_map` or `vmap`: the loss is then that of all their
            tokens together, the same on each of them.
        segment_ids: `[T]` integers, the sequence of each token, from 0 to `num_segments - 1`; a
            token with another number, such as -1, is of none and does not count. With
            `axis_name`, numbers are those of all ranks: two ranks that use the same one have
            parts of the same sequence.
        num_segments: the number of sequences, static. Needs `segment_ids`, and is needed by it.

    Returns:
        float32 scalar; 0 if no token counts.

    Raises:
        ValueError: as `route` does.
    """
    logits = as_logits(logits)
    topk_idx = _as_topk_idx(topk_idx, logits)
    segments = _as_segments(segment_ids, num_segments, logits)
    logits, is_used = _used(logits, topk_idx, segments)
    topk_idx = jnp.where(is_used[:, None], topk_idx, -1)
    shares = jnp.where(is_used[:, None], shares_of(logits, score), 0.0)
    experts = jnp.arange(logits.shape[-1], dtype=topk_idx.dtype)
    # A fused compare and sum: a scatter-add would be serial on CPU and contended on GPU.
    is_selected = topk_idx[:, :, None] == experts[None, None, :]
    if segments is not None:
        selections = is_selected.sum(1, dtype=jnp.int32)
        return _mean_over_segments(axis_name, segments, selections, shares, is_used)
    selections, share_sum, num_used = _sum_over(
        axis_name,
        is_selected.sum((0, 1), dtype=jnp.int32),
        shares.sum(axis=0),
        is_used.sum(dtype=jnp.int32),
    )
    fractions = selections.astype(jnp.float32) / _at_least_one(selections.sum())
    return logits.shape[-1] * (fractions * (share_sum / _at_least_one(num_used))).sum()


@set_module("jax_ep")
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
    logits = as_logits(logits)
    topk_idx = None if topk_idx is None else _as_topk_idx(topk_idx, logits)
    logits, is_used = _used(logits, topk_idx)
    squares = jnp.square(jax.nn.logsumexp(logits, axis=-1))
    total, num_used = _sum_over(
        axis_name, jnp.where(is_used, squares, 0.0).sum(), is_used.sum(dtype=jnp.int32)
    )
    return total / _at_least_one(num_used)


def _used(
    logits: jax.Array, topk_idx: jax.Array | None, segments: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Logits, and `[T]` bool: whether a token counts in a loss. Logits are 0 where it does not.

    Before anything is computed of them: what is thrown away afterwards still has a gradient, and
    0 times a gradient that is not finite is NaN.
    """
    is_used = ~is_masked(logits)
    if topk_idx is not None:
        is_used &= (topk_idx >= 0).any(axis=-1)
    if segments is not None:
        is_used &= segments.any(axis=0)
    return jnp.where(is_used[:, None], logits, 0.0), is_used


def _mean_over_segments(
    axis_name: AxisName,
    segments: jax.Array,
    selections: jax.Array,
    shares: jax.Array,
    is_used: jax.Array,
) -> jax.Array:
    """The mean loss of the sequences that have a token that counts.

    Args:
        axis_name: as in `load_balance_loss`.
        segments: `[S, T]` bool, of which sequence each token is.
        selections: `[T, E]` int32, those of each token that counts.
        shares: `[T, E]` float32, 0 for a token that does not count.
        is_used: `[T]` bool.
    """

    def by_segment(of_tokens: jax.Array) -> jax.Array:
        # A product, which sums in a fixed order, which a scatter-add on GPUs does not.
        ones = segments.astype(jnp.float32)
        return jnp.matmul(ones, of_tokens, precision=jax.lax.Precision.HIGHEST)

    # Counts are exact in float32, as long as a sequence has fewer than 2 ** 24 tokens on a rank.
    selections, share_sums, num_used = _sum_over(
        axis_name,
        by_segment(selections.astype(jnp.float32)).astype(jnp.int32),
        by_segment(shares),
        (segments & is_used[None, :]).sum(1, dtype=jnp.int32),
    )
    num_selections = selections.sum(axis=1, keepdims=True)
    fractions = selections.astype(jnp.float32) / _at_least_one(num_selections)
    means = share_sums / _at_least_one(num_used)[:, None]
    losses = shares.shape[-1] * (fractions * means).sum(axis=1)
    return losses.sum() / _at_least_one((num_used > 0).sum(dtype=jnp.int32))


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


# --- arguments -----------------------------------------------------------------------------------


def _as_topk_idx(topk_idx: ArrayLike, logits: jax.Array) -> jax.Array:
    topk_idx = jnp.asarray(topk_idx)
    is_right = topk_idx.ndim == 2 and topk_idx.shape[0] == logits.shape[0]
    if not is_right or not jnp.issubdtype(topk_idx.dtype, jnp.signedinteger):
        raise ValueError(
            f"topk_idx is {show(topk_idx)}; allowed: [{logits.shape[0]}, K] as logits "
            f"{logits.shape}, signed integers"
        )
    return topk_idx


def _as_segments(
    segment_ids: ArrayLike | None, num_segments: Any, logits: jax.Array
) -> jax.Array | None:
    """`[S, T]` bool: of which sequence each token is; None if nothing is said of sequences."""
    if segment_ids is None and num_segments is None:
        return None
    if segment_ids is None or not is_int(num_segments):
        came = None if segment_ids is None else "an array"
        raise ValueError(
            f"segment_ids is {came} and num_segments is {num_segments!r}; allowed: both None, or "
            "an array and an int, at least 1"
        )
    segment_ids = jnp.asarray(segment_ids)
    is_right = segment_ids.shape == logits.shape[:1]
    if not is_right or not jnp.issubdtype(segment_ids.dtype, jnp.integer):
        raise ValueError(
            f"segment_ids is {show(segment_ids)}; allowed: [{logits.shape[0]}] as logits "
            f"{logits.shape}, integers"
        )
    every = jnp.arange(int(num_segments), dtype=jnp.int32)
    return segment_ids.astype(jnp.int32)[None, :] == every[:, None]
