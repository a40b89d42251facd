# SPDX-License-Identifier: Apache-2.0
"""route: by hand, against the oracle, in transforms, and what it says of bad arguments."""

import re
import warnings

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jax_ep import load_balance_loss, reference, router_z_loss
from jax_ep import route as route_eagerly

SIZES = ("num_topk", "num_groups", "num_topk_groups")
OPTIONS = ("score", "group_score", "normalize", "epsilon", "scale")
route = jax.jit(route_eagerly, static_argnames=SIZES + OPTIONS)


def logit(p):
    return (np.log(p) - np.log1p(-np.asarray(p))).astype(np.float32)


def spread_logits(num_tokens, num_experts, seed=0):
    """Random logits that are far enough apart for float32 and float64 to agree on their order."""
    rng = np.random.default_rng(seed)
    ranks = np.stack([rng.permutation(num_experts) for _ in range(num_tokens)])
    return (ranks * (4.0 / num_experts) - 2.0).astype(np.float32).reshape(num_tokens, num_experts)


# Sigmoid scores of 8 experts in 4 groups of 2. Sums: 1.0, 1.1, 1.05, 0.95.
SCORES = [[0.9, 0.1, 0.6, 0.5, 0.4, 0.65, 0.15, 0.8]]
DEEPSEEK = {"num_topk": 3, "score": "sigmoid", "num_groups": 4, "num_topk_groups": 2}


def test_softmax_top_2_by_hand():
    logits = np.log([[1.0, 2.0, 4.0, 8.0], [8.0, 1.0, 4.0, 2.0]]).astype(np.float32)
    idx, weights = route(logits, num_topk=2)
    assert idx.tolist() == [[3, 2], [0, 2]]
    assert (idx.dtype, weights.dtype) == (jnp.int32, jnp.float32)
    np.testing.assert_allclose(weights, [[2 / 3, 1 / 3], [2 / 3, 1 / 3]], rtol=1e-6)
    _, weights = route(logits, num_topk=2, normalize=False, scale=3.0)
    np.testing.assert_allclose(weights, [[1.6, 0.8], [1.6, 0.8]], rtol=1e-6)


def test_deepseek_v3_gating_by_hand():
    # The best expert of all, 0, is in a group that is not among the best two.
    idx, weights = route(logit(SCORES), **DEEPSEEK, scale=2.5)
    assert idx.tolist() == [[5, 2, 3]]
    np.testing.assert_allclose(weights, 2.5 * np.array([[0.65, 0.6, 0.5]]) / 1.75, rtol=1e-6)
    # A bias on its weaker expert lifts group 0 to 1.2; the weights stay without bias.
    bias = np.array([0, 0.2, 0, 0, 0, 0, 0, 0], np.float32)
    idx, weights = route(logit(SCORES), **DEEPSEEK, bias=bias, normalize=False)
    assert idx.tolist() == [[0, 2, 3]]
    np.testing.assert_allclose(weights, [[0.9, 0.6, 0.5]], rtol=1e-6)


def test_a_group_scores_its_two_best_experts_only():
    scores = [[0.5, 0.5, 0.5, 0.8, 0.3, 0.1]]
    kwargs = {"num_topk": 1, "score": "sigmoid", "num_topk_groups": 1, "normalize": False}
    assert route(logit(scores), num_groups=2, **kwargs)[0].tolist() == [[3]]
    # Groups of one expert score that expert.
    assert route(logit(scores), num_groups=6, **kwargs)[0].tolist() == [[3]]


def test_deepseek_v2_gating_by_hand():
    # Shares of 20. The best of the groups have 6, 4, 2 and 1, their two best sum to 6, 7, 4 and 2.
    logits = np.log([[6.0, 0.001, 4.0, 3.0, 2.0, 1.9, 1.0, 1.0]]).astype(np.float32)
    kwargs = {"num_topk": 2, "num_groups": 4, "num_topk_groups": 1, "normalize": False}
    idx, weights = route(logits, **kwargs, group_score="max", scale=16.0)
    assert idx.tolist() == [[0, 1]]
    np.testing.assert_allclose(weights, 16 * np.array([[6.0, 0.001]]) / 18.901, rtol=1e-6)
    assert route(logits, **kwargs)[0].tolist() == [[2, 3]]
    # A bias counts for groups, too, and has no part in the weights.
    bias = np.array([0, 0, 0, 0, 0, 0.5, 0, 0], np.float32)
    idx, weights = route(logits, **kwargs, group_score="max", bias=bias)
    assert idx.tolist() == [[5, 4]]
    np.testing.assert_allclose(weights, np.array([[1.9, 2.0]]) / 18.901, rtol=1e-6)


def test_normalized_softmax_is_the_softmax_after_top_k():
    logits = spread_logits(7, 12)
    idx, weights = route(logits, num_topk=3)
    largest = -np.sort(-logits.astype(np.float64), axis=1)[:, :3]
    want = np.exp(largest) / np.exp(largest).sum(axis=1, keepdims=True)
    np.testing.assert_array_equal(np.take_along_axis(logits, np.asarray(idx), axis=1), largest)
    np.testing.assert_allclose(weights, want, rtol=1e-6)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("epsilon", [0, 0.0, 1e-45, 1e-6, 0.25, np.float32(3.0)])
def test_epsilon_is_added_to_the_sum(epsilon, score):
    logits = spread_logits(9, 8)
    kwargs = {"num_topk": 3, "score": score, "epsilon": epsilon}
    cotangent = jnp.asarray(np.random.default_rng(2).standard_normal((9, 3)), jnp.float32)
    weights = lambda v: route(v, **kwargs)[1]  # noqa: E731
    np.testing.assert_allclose(
        weights(logits), reference.route(logits, **kwargs)[1], rtol=32 * 2.0**-24
    )
    loss = lambda v: (weights(v) * cotangent).sum()  # noqa: E731
    check_grads(loss, (jnp.asarray(logits),), order=1, modes=("rev",), atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("epsilon", [0.0, 1e-45, 1e-38, 1e-20, 1.0])
def test_a_sum_of_0_gives_weights_of_0(epsilon):
    nowhere = jnp.full((2, 4), -jnp.inf).at[1].set(-200.0)  # sigmoids of -200 are 0 in float32
    weigh = lambda v: route(v, num_topk=2, score="sigmoid", epsilon=epsilon)[1]  # noqa: E731
    assert weigh(nowhere).tolist() == [[0.0, 0.0]] * 2
    assert not jax.grad(lambda v: weigh(v)[:, 0].sum())(nowhere).any()


def test_experts_outside_of_the_chosen_groups_lose_to_negative_biased_scores():
    bias = jnp.full((8,), -5.0)
    idx, _ = route(logit(SCORES), **{**DEEPSEEK, "num_topk": 4}, bias=bias)
    assert idx.tolist() == [[5, 2, 3, 4]]


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_equal_scores_go_to_the_lower_index(score):
    logits = jnp.zeros((2, 12))
    idx, weights = route(logits, num_topk=5, score=score)
    assert idx.tolist() == [[0, 1, 2, 3, 4]] * 2
    np.testing.assert_allclose(weights, np.full((2, 5), 0.2), rtol=1e-6)
    idx, _ = route(logits, num_topk=5, score=score, num_groups=4, num_topk_groups=2)
    assert idx.tolist() == [[0, 1, 2, 3, 4]] * 2
    idx, _ = route(logits.at[:, 7].set(1.0), num_topk=3, score=score)
    assert idx.tolist() == [[7, 0, 1]] * 2


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("groups", [None, (4, 2), (8, 5), (16, 16), (1, 1)])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("group_score", ["top2", "max"])
def test_agrees_with_the_oracle(score, normalize, groups, with_bias, group_score):
    logits = spread_logits(20, 16)
    # Multiples of 1/32 of which no sum of scores comes within float32's rounding of another.
    bias = np.random.default_rng(1).integers(-8, 9, 16).astype(np.float32) / 32
    kwargs = {
        "num_topk": 5,
        "score": score,
        "bias": bias if with_bias else None,
        "num_groups": groups and groups[0],
        "num_topk_groups": groups and groups[1],
        "group_score": group_score,
        "normalize": normalize,
        "scale": 1.5,
    }
    idx, weights = route(logits, **kwargs)
    want_idx, want_weights = reference.route(logits, **kwargs)
    assert idx.tolist() == want_idx.tolist()
    # exp, a sum of 16, two divisions and a product: a few roundings of 2^-24 each.
    np.testing.assert_allclose(weights, want_weights, rtol=32 * 2.0**-24)


@pytest.mark.parametrize("integer", [np.int64, np.int32, np.uint8])
def test_integers_of_numpy_are_integers(integer):
    logits = spread_logits(5, 8)
    sizes = {"num_topk": 3, "num_groups": 4, "num_topk_groups": 2}
    want = route_eagerly(logits, **sizes)
    got = route_eagerly(logits, **{name: integer(size) for name, size in sizes.items()})
    jax.tree.map(np.testing.assert_array_equal, got, want)
    with pytest.raises(ValueError, match=r"num_topk is .*9.*; allowed: an int from 1 to 8"):
        route_eagerly(logits, num_topk=integer(9))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_logits_are_routed_in_float32(dtype):
    logits = jnp.asarray(spread_logits(9, 8)).astype(dtype)
    got = route(logits, num_topk=3)
    want = route(logits.astype(jnp.float32), num_topk=3)
    assert got[0].tolist() == want[0].tolist()
    assert got[1].dtype == jnp.float32
    assert got[1].tolist() == want[1].tolist()
    losses = load_balance_loss(logits, got[0]), router_z_loss(logits)
    assert [loss.dtype for loss in losses] == [jnp.float32, jnp.float32]
    grad = jax.grad(lambda v: route(v, num_topk=3)[1][:, 0].sum())(logits)
    assert grad.dtype == dtype


def test_large_logits_stay_finite():
    logits = jnp.array([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4]])
    for score in ("softmax", "sigmoid"):
        _, weights = route(logits, num_topk=2, score=score)
        assert jnp.isfinite(weights).all()
        assert jnp.isfinite(load_balance_loss(logits, jnp.zeros((2, 1), jnp.int32)))
    # All sigmoids are 0: the epsilon keeps the weights from being NaN.
    assert route(logits[1:], num_topk=2, score="sigmoid")[1].tolist() == [[0.0, 0.0]]


def test_no_tokens():
    idx, weights = route(jnp.zeros((0, 4)), num_topk=2, num_groups=2, num_topk_groups=1)
    assert idx.shape == weights.shape == (0, 2)
    assert load_balance_loss(jnp.zeros((0, 4)), idx) == 0
    assert router_z_loss(jnp.zeros((0, 4))) == 0


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("normalize", [True, False])
def test_gradients_flow_through_the_weights(score, normalize):
    logits = jnp.asarray(spread_logits(3, 8))
    cotangent = jnp.asarray(np.random.default_rng(2).standard_normal((3, 3)), jnp.float32)

    def weigh(logits):
        kwargs = {"score": score, "num_groups": 4, "num_topk_groups": 3, "normalize": normalize}
        _, weights = route(logits, num_topk=3, bias=jnp.linspace(0, 0.01, 8), **kwargs)
        return (weights * cotangent).sum()

    check_grads(jax.jit(weigh), (logits,), order=1, modes=("rev", "fwd"), atol=1e-2, rtol=1e-2)
    # And against central differences of the oracle, which has no rounding to speak of.
    kwargs = {"num_topk": 3, "score": score, "num_groups": 4, "num_topk_groups": 3}
    grad = jax.grad(weigh)(logits)
    for at in np.ndindex(logits.shape):
        sides = []
        for step in (1e-5, -1e-5):
            moved = np.asarray(logits, np.float64)
            moved[at] += step
            routed = reference.route(
                moved, bias=np.linspace(0, 0.01, 8), normalize=normalize, **kwargs
            )
            sides.append((routed[1] * np.asarray(cotangent)).sum())
        np.testing.assert_allclose(grad[at], (sides[0] - sides[1]) / 2e-5, atol=2e-6)


def test_the_bias_has_no_gradient():
    logits = jnp.asarray(spread_logits(3, 8))
    grad = jax.grad(lambda bias: route(logits, num_topk=2, bias=bias)[1].sum())(jnp.ones(8))
    assert not grad.any()


NO_GRADIENT = "num_topk is 1 and normalize is True: .* the router gets no gradient"


def test_one_expert_a_token_normalized_warns_that_the_router_gets_no_gradient():
    logits = jnp.asarray(spread_logits(3, 8))

    def gradient(**options):
        return jax.grad(lambda v: route_eagerly(v, num_topk=1, **options)[1].sum())(logits)

    with pytest.warns(UserWarning, match=NO_GRADIENT):
        assert not gradient().any()
    assert gradient(normalize=False).any()
    # Nothing to learn, and nothing wrong.
    assert route_eagerly(logits[:, :1], num_topk=1)[1].tolist() == [[1.0]] * 3


def test_the_warning_is_shown_once_for_each_place_and_names_it():
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("default")
        for size in range(2, 5):
            route_eagerly(jnp.zeros((1, size)), num_topk=1)
    assert [warning.filename for warning in shown] == [__file__]


def test_jit_and_vmap_give_the_same():
    logits = jnp.asarray(spread_logits(12, 8)).reshape(3, 4, 8)

    def chosen(logits):
        idx, weights = route(logits, num_topk=2, num_groups=4, num_topk_groups=2)
        return idx, weights, load_balance_loss(logits, idx), router_z_loss(logits, idx)

    one_by_one = [jax.jit(chosen)(part) for part in logits]
    for batch in (jax.vmap(chosen)(logits), jax.jit(jax.vmap(chosen))(logits)):
        assert batch[0].tolist() == [one[0].tolist() for one in one_by_one]
        for got, *want in zip(batch[1:], *[one[1:] for one in one_by_one], strict=True):
            np.testing.assert_allclose(got, np.stack(want), rtol=1e-6)


@hypothesis.given(st.data())
def test_every_token_selects_distinct_experts_of_its_best_groups(data):
    # Few sizes, because each compiles anew.
    sizes = st.sampled_from([(1, 1, 1, 1), (3, 1, 2, 2), (4, 2, 2, 3), (2, 3, 1, 3), (4, 3, 3, 7)])
    num_groups, size, num_topk_groups, num_topk = data.draw(sizes)
    # Whole numbers, so that equal scores are common.
    row = st.lists(st.integers(-3, 3), min_size=num_groups * size, max_size=num_groups * size)
    logits = np.array(data.draw(st.lists(row, min_size=3, max_size=3)), np.float32)
    kwargs = {"num_topk": num_topk, "score": "sigmoid", "num_groups": num_groups}
    idx, weights = route(logits, num_topk_groups=num_topk_groups, **kwargs)
    want, _ = reference.route(logits, num_topk_groups=num_topk_groups, **kwargs)
    assert idx.tolist() == want.tolist()
    for chosen in idx.tolist():
        assert len(set(chosen)) == num_topk
        assert len({expert // size for expert in chosen}) <= num_topk_groups
    np.testing.assert_allclose(weights.sum(axis=-1), np.ones(len(logits)), rtol=1e-5)


GROUPS_TEXT = "allowed: both None, or num_groups a divisor of the number of experts, 8"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"logits": jnp.zeros(8)},
            "logits is float32 of shape (8,); allowed: [T, E], floating point, E at least 1",
        ),
        (
            {"logits": jnp.zeros((2, 0))},
            "logits is float32 of shape (2, 0); allowed: [T, E], floating point, E at least 1",
        ),
        (
            {"logits": jnp.zeros((2, 8), jnp.int32)},
            "logits is int32 of shape (2, 8); allowed: [T, E], floating point, E at least 1",
        ),
        *[
            (
                {"num_topk": value},
                f"num_topk is {value!r}; allowed: an int from 1 to 8, the number of experts in "
                "logits",
            )
            for value in (0, 9, 2.0, True, None)
        ],
        ({"score": "relu"}, "score is 'relu'; allowed: 'softmax', 'sigmoid'"),
        (
            {"group_score": "sum"},
            "group_score is 'sum'; allowed: 'top2', 'max'",
        ),
        *[
            ({"epsilon": value}, f"epsilon is {value!r}; allowed: a number of at least 0")
            for value in (-1e-20, np.nan, np.inf, 1e39, None, True, "0")
        ],
        ({"bias": jnp.zeros(7)}, "bias has shape (7,); allowed: None or (8,)"),
        ({"bias": 0.0}, "bias has shape (); allowed: None or (8,)"),
        *[
            (
                {"num_groups": groups, "num_topk_groups": chosen},
                f"num_groups is {groups!r} and num_topk_groups is {chosen!r}; {GROUPS_TEXT}",
            )
            for groups, chosen in ((None, 2), (3, 2), (0, 1), (16, 1), (2.0, 1))
        ],
        *[
            (
                {"num_groups": 4, "num_topk_groups": value},
                f"num_topk_groups is {value!r}; allowed: an int from 1 to num_groups, 4",
            )
            for value in (None, 0, 5, 1.0)
        ],
        (
            {"num_topk": 3, "num_groups": 4, "num_topk_groups": 1},
            "num_topk is 3; allowed: at most 2, the experts in num_topk_groups = 1 of num_groups "
            "= 4 groups of 8 experts",
        ),
    ],
)
def test_route_names_bad_arguments_when_traced(changes, message):
    arguments = {"logits": jnp.zeros((2, 8)), "num_topk": 2, **changes}
    logits = arguments.pop("logits")
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        jax.eval_shape(lambda v: route_eagerly(v, **arguments), logits)
