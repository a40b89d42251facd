# SPDX-License-Identifier: Apache-2.0
"""The balancing loss by sequence: by hand, by the oracle, over ranks, other recipes' values."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from ep_testing.programs import make_mesh
from jax_ep import load_balance_loss, reference, route

TOKENS, EXPERTS, TOPK, SEGMENTS = 40, 8, 3, 5


def _problem(seed=0):
    """Sequences in any order, of any length; one without tokens, one whose tokens do not count."""
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((TOKENS, EXPERTS)).astype(np.float32)
    idx = np.array(route(logits, num_topk=TOPK)[0])
    ids = rng.integers(-1, SEGMENTS, TOKENS)
    ids[ids == 2] = 1
    idx[rng.random(idx.shape) < 0.3] = -1
    idx[ids == 3] = -1
    ids[:2] = SEGMENTS, -7  # no sequences either
    logits[5] = -np.inf
    return logits, idx, ids.astype(np.int32)


def _central_differences(f, logits, step=1e-4):
    logits = logits.astype(np.float64)
    grad = np.zeros_like(logits)
    for at in np.ndindex(logits.shape):
        up, down = logits.copy(), logits.copy()
        up[at], down[at] = logits[at] + step, logits[at] - step
        grad[at] = (f(up) - f(down)) / (2 * step)
    return grad


@pytest.mark.parametrize("loss", [load_balance_loss, reference.load_balance_loss])
def test_by_hand(loss):
    logits = np.log([[1.0, 3.0], [3.0, 1.0], [1.0, 1.0], [3.0, 1.0]]).astype(np.float32)
    idx = np.array([[1], [0], [0], [0]])
    # Sequence 0 is even. Of sequence 2 are tokens 2 and 3: f = (1, 0), P_0 = (1/2 + 3/4) / 2.
    by_sequence = loss(logits, idx, segment_ids=np.array([0, 0, 2, 2]), num_segments=3)
    np.testing.assert_allclose(by_sequence, (1.0 + 1.25) / 2, rtol=1e-6)
    # Only token 3 is of a sequence.
    alone = loss(logits, idx, segment_ids=np.array([-1, -1, -1, 0]), num_segments=1)
    np.testing.assert_allclose(alone, 1.5, rtol=1e-6)


@pytest.mark.parametrize(
    "score", ["softmax", "sigmoid", pytest.param(jax.nn.relu, id="a function")]
)
def test_values_and_gradients_are_the_oracles(score):
    logits, idx, ids = _problem()
    kwargs = {"segment_ids": ids, "num_segments": SEGMENTS}
    of_oracle = (lambda v: np.maximum(v, 0.0)) if callable(score) else score
    oracle = lambda v: reference.load_balance_loss(v, idx, score=of_oracle, **kwargs)  # noqa: E731
    loss = jax.jit(lambda v: load_balance_loss(v, idx, score=score, **kwargs))
    value, grad = jax.value_and_grad(loss)(logits)
    np.testing.assert_allclose(value, oracle(logits), rtol=1e-6)
    finite = np.where(np.isneginf(logits), 0, logits)  # for differences; that token does not count
    idx[5] = -1
    np.testing.assert_allclose(grad, _central_differences(oracle, finite), rtol=1e-4, atol=1e-6)
    counts = (idx >= 0).any(axis=1) & (ids >= 0) & (ids < SEGMENTS)
    assert 0 < counts.sum() < TOKENS
    assert not grad[~counts].any()


def test_one_sequence_of_all_tokens_is_the_loss_of_the_batch():
    logits, idx, _ = _problem()
    together = {"segment_ids": np.zeros(TOKENS, np.int32), "num_segments": 1}
    got = jax.value_and_grad(lambda v: load_balance_loss(v, idx, **together))(logits)
    want = jax.value_and_grad(lambda v: load_balance_loss(v, idx))(logits)
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-8), got, want)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.uint32])
def test_any_integers_are_numbers_of_sequences(dtype):
    logits, idx, ids = _problem()
    of_all = {"num_segments": 300, "segment_ids": np.abs(ids).astype(dtype)}  # more than 8 bits say
    want = reference.load_balance_loss(logits, idx, **of_all)
    np.testing.assert_allclose(load_balance_loss(logits, idx, **of_all), want, rtol=1e-6)


@pytest.mark.parametrize("garbage", [np.nan, np.inf, -1e9])
def test_a_token_of_no_sequence_reaches_nothing(garbage):
    logits, idx, ids = _problem()
    dirty = logits.copy()
    dirty[ids < 0] = garbage
    dirty[ids == 3, 0] = garbage  # without a selection
    loss = jax.value_and_grad(
        lambda v: load_balance_loss(v, idx, segment_ids=ids, num_segments=SEGMENTS)
    )
    jax.tree.map(np.testing.assert_array_equal, loss(dirty), loss(logits))
    dirty[np.flatnonzero(ids == 1)[-1]] = np.nan
    assert np.isnan(loss(dirty)[0])  # one that counts is not hidden


@pytest.mark.parametrize("num_tokens", [0, 3])
def test_0_if_no_token_counts(num_tokens):
    logits, idx = jnp.ones((num_tokens, 4)), jnp.zeros((num_tokens, 2), jnp.int32)
    nowhere = {"segment_ids": jnp.full((num_tokens,), -1), "num_segments": 2}
    value, grad = jax.value_and_grad(lambda v: load_balance_loss(v, idx, **nowhere))(logits)
    assert value == 0
    assert not grad.any()
    assert reference.load_balance_loss(logits, idx, **nowhere) == 0


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize(
    ("axis_name", "spec"),
    [
        ("expert", P("expert")),
        (("data", "expert"), P(("data", "expert"))),
        (["data", "expert"], P("expert")),  # with copies along "data"
    ],
)
def test_sequences_may_be_spread_over_ranks(axis_name, spec, check_vma):
    mesh = make_mesh((2, 4), ("data", "expert"))
    logits, idx, ids = _problem()
    logits[5] = 0  # jacrev of copies

    def loss(logits, idx, ids, axis_name=None):
        options = {"segment_ids": ids, "num_segments": SEGMENTS}
        return load_balance_loss(logits, idx, axis_name=axis_name, **options)

    over_ranks = jax.shard_map(
        lambda *args: loss(*args, axis_name=axis_name),
        mesh=mesh,
        in_specs=(spec,) * 3,
        out_specs=P(),
        check_vma=check_vma,
    )
    value, grad = jax.jit(jax.value_and_grad(over_ranks))(logits, idx, ids)
    want = reference.load_balance_loss(logits, idx, segment_ids=ids, num_segments=SEGMENTS)
    np.testing.assert_allclose(value, want, rtol=1e-5)
    np.testing.assert_allclose(grad, jax.grad(loss)(logits, idx, ids), atol=1e-7)


# --- the values of other recipes, as the table of the docstring has them -------------------------


def _shapes(seed=1, num_layers=2, batch=3, length=6):
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((num_layers, batch, length, EXPERTS)).astype(np.float32)
    flat = logits.reshape(-1, EXPERTS)
    idx = np.array(route(flat, num_topk=TOPK)[0]).reshape(num_layers, batch, length, TOPK)
    scores = np.exp(logits.astype(np.float64))
    one_hot = (idx[..., None] == np.arange(EXPERTS)).astype(np.float64)
    return logits, idx, scores / scores.sum(axis=-1, keepdims=True), one_hot


def _ids(num_layers, batch, length):
    return np.broadcast_to(np.arange(batch)[:, None], (num_layers, batch, length)).reshape(-1)


def test_mixtral_of_hugging_face_is_k_times_the_loss_of_all_layers_tokens():
    logits, idx, probs, one_hot = _shapes()
    # [K, E], the mean over all layers' tokens; times [E]; all of it is summed.
    selected = one_hot.reshape(-1, TOPK, EXPERTS).mean(axis=0)
    theirs = EXPERTS * (selected * probs.reshape(-1, EXPERTS).mean(axis=0)[None]).sum()
    ours = load_balance_loss(logits.reshape(-1, EXPERTS), idx.reshape(-1, TOPK))
    np.testing.assert_allclose(TOPK * ours, theirs, rtol=1e-6)


def test_deepseek_by_sequence_is_the_loss_by_sequence():
    logits, idx, probs, one_hot = _shapes(num_layers=1)
    _, batch, length, _ = logits.shape
    # Equations 17 to 20: f has the factor E / (K T) in it.
    f = one_hot.sum(axis=(2, 3)) * EXPERTS / (TOPK * length)
    theirs = (f * probs.mean(axis=2)).sum(axis=-1).mean()
    ours = load_balance_loss(
        logits.reshape(-1, EXPERTS),
        idx.reshape(-1, TOPK),
        segment_ids=_ids(1, batch, length),
        num_segments=batch,
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    # And MaxText's: the mean over sequences and experts, times E squared.
    maxtext = (one_hot.sum(axis=3).mean(axis=2) * probs.mean(axis=2)).mean() * EXPERTS**2
    np.testing.assert_allclose(TOPK * ours, maxtext, rtol=1e-6)


def test_switch_of_hugging_face_is_the_loss_by_sequence_of_all_layers_tokens():
    logits, idx, probs, one_hot = _shapes()
    num_layers, batch, length, _ = logits.shape
    # Layers are concatenated along the tokens of a sequence; one expert each.
    selected = one_hot[..., 0, :].mean(axis=(0, 2))
    theirs = (selected * probs.mean(axis=(0, 2))).mean() * EXPERTS**2
    ours = load_balance_loss(
        logits.reshape(-1, EXPERTS),
        idx[..., :1].reshape(-1, 1),
        segment_ids=_ids(num_layers, batch, length),
        num_segments=batch,
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


# --- arguments -----------------------------------------------------------------------------------

PAIR = "; allowed: both None, or an array and an int, at least 1"
IDS = "; allowed: [2] as logits (2, 8), integers"


@pytest.mark.parametrize(
    ("ids", "num_segments", "message"),
    [
        (None, 3, f"segment_ids is None and num_segments is 3{PAIR}"),
        *[
            (np.zeros(2, np.int32), n, f"segment_ids is an array and num_segments is {n!r}{PAIR}")
            for n in (None, 0, -1, 2.0, True)
        ],
        (np.zeros(3, np.int32), 2, f"segment_ids is int32 of shape (3,){IDS}"),
        (np.zeros((2, 1), np.int32), 2, f"segment_ids is int32 of shape (2, 1){IDS}"),
        (np.zeros(2, np.float32), 2, f"segment_ids is float32 of shape (2,){IDS}"),
        (np.zeros(2, bool), 2, f"segment_ids is bool of shape (2,){IDS}"),
    ],
)
def test_bad_arguments_are_named_when_traced(ids, num_segments, message):
    idx = jnp.zeros((2, 1), jnp.int32)
    loss = lambda v: load_balance_loss(v, idx, segment_ids=ids, num_segments=num_segments)  # noqa: E731
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        jax.eval_shape(loss, jnp.zeros((2, 8)))
