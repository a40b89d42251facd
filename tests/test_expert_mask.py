# SPDX-License-Identifier: Apache-2.0
"""`route(expert_mask=)`: experts that nobody may choose, by hand and against the oracle."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_ep import reference
from jax_ep import route as route_eagerly

SIZES = ("num_topk", "num_groups", "num_topk_groups")
OPTIONS = ("score", "group_score", "normalize", "epsilon", "scale")
route = jax.jit(route_eagerly, static_argnames=SIZES + OPTIONS)

CASES = {
    "softmax": {"num_topk": 3},
    "not_normalized": {"num_topk": 3, "normalize": False, "scale": 2.0},
    "sigmoid": {"num_topk": 4, "score": "sigmoid"},
    "groups": {"num_topk": 3, "score": "sigmoid", "num_groups": 4, "num_topk_groups": 2},
    "best_of_group": {
        "num_topk": 2, "num_groups": 4, "num_topk_groups": 1, "group_score": "max",
    },
}  # fmt: skip


def logits_of(num_tokens, num_experts, seed):
    rng = np.random.default_rng(seed)
    ranks = np.stack([rng.permutation(num_experts) for _ in range(num_tokens)])
    return (ranks * (4.0 / num_experts) - 2.0).astype(np.float32)


def test_masked_experts_are_not_chosen_and_weigh_nothing():
    logits = np.log([[1.0, 2.0, 4.0, 8.0]]).astype(np.float32)
    mask = np.array([True, True, True, False])
    idx, weights = route(logits, num_topk=2, expert_mask=mask)
    assert idx.tolist() == [[2, 1]]
    np.testing.assert_allclose(weights, [[2 / 3, 1 / 3]], rtol=1e-6)
    # Scores are shares of those that may be chosen.
    _, weights = route(logits, num_topk=2, normalize=False, expert_mask=mask)
    np.testing.assert_allclose(weights, [[4 / 7, 2 / 7]], rtol=1e-6)


def test_fewer_than_k_experts():
    logits = np.log([[1.0, 2.0, 4.0, 8.0]]).astype(np.float32)
    mask = np.array([False, True, False, False])
    idx, weights = route(logits, num_topk=3, expert_mask=mask)
    assert (idx.tolist(), weights.tolist()) == ([[1, -1, -1]], [[1.0, 0.0, 0.0]])
    idx, weights = route(logits, num_topk=3, expert_mask=np.zeros(4, bool))
    assert (idx.tolist(), weights.tolist()) == ([[-1, -1, -1]], [[0.0, 0.0, 0.0]])


def test_no_bias_brings_a_masked_expert_back():
    logits, bias = np.zeros((1, 4), np.float32), np.array([9, 0, 1, 0], np.float32)
    mask = np.array([False, True, True, True])
    idx, _ = route(logits, num_topk=2, score="sigmoid", bias=bias, expert_mask=mask)
    assert idx.tolist() == [[2, 1]]


def test_a_group_of_which_one_expert_is_left_may_be_the_best():
    logits = np.array([[3.0, 2.0, 0.1, 0.2]], np.float32)
    kwargs = {"num_topk": 1, "num_groups": 2, "num_topk_groups": 1, "normalize": False}
    mask = np.array([False, True, True, False])
    assert route(logits, **kwargs, expert_mask=mask)[0].tolist() == [[1]]
    # A group of masked ones is the last, though a bias is below 0.
    bias = np.array([0, 0, -5, -5], np.float32)
    mask = np.array([False, False, True, True])
    assert route(logits, **kwargs, bias=bias, expert_mask=mask)[0].tolist() == [[3]]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", range(6))
def test_against_the_oracle(case, seed):
    rng = np.random.default_rng(seed)
    logits = logits_of(12, 16, seed)
    mask = rng.random(16) < rng.choice([0.1, 0.5, 0.9])
    bias = rng.normal(size=16).astype(np.float32) if seed % 2 else None
    got = route(logits, **CASES[case], bias=bias, expert_mask=mask)
    want = reference.route(logits, **CASES[case], bias=bias, expert_mask=mask)
    assert got[0].tolist() == want[0].tolist()
    np.testing.assert_allclose(got[1], want[1], rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("case", CASES)
def test_a_mask_of_all_experts_changes_no_bit(case):
    logits = logits_of(8, 16, seed=3)
    plain = route(logits, **CASES[case])
    masked = route(logits, **CASES[case], expert_mask=np.ones(16, bool))
    for got, want in zip(masked, plain, strict=True):
        np.testing.assert_array_equal(got, want)


def test_gradients_are_finite_and_none_reaches_a_masked_expert():
    logits, mask = logits_of(4, 8, seed=1), np.array([True] * 3 + [False] * 5)

    def loss(logits):
        _, weights = route(logits, num_topk=4, normalize=False, expert_mask=mask)
        return (weights * jnp.arange(1.0, 5.0)[None, :]).sum()

    gradient = jax.grad(loss)(logits)
    assert np.isfinite(gradient).all()
    assert (np.asarray(gradient)[:, 3:] == 0).all()
    assert (np.asarray(gradient)[:, :3] != 0).any()


@pytest.mark.parametrize("mask", [np.ones(3, bool), np.ones(4, np.int32), np.ones((1, 4), bool)])
def test_what_is_no_mask_is_refused(mask):
    came = f"expert_mask is {mask.dtype} of shape {mask.shape}"
    with pytest.raises(ValueError, match=re.escape(f"{came}; allowed: None, or bool[4]")):
        route(np.zeros((2, 4), np.float32), num_topk=2, expert_mask=mask)
