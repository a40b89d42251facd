# SPDX-License-Identifier: Apache-2.0
"""How long what layers compile lives: as long as their group is open, and once for those alike."""

import gc
import weakref

import jax
import pytest

from flax_layers import FFN, HIDDEN, make_group, make_nnx, run_linen, to_linen
from jax_ep.flax import linen as ep_linen


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(7), (8, 6, HIDDEN))


def _nnx(group, x):
    return make_nnx(group)(x)


def _linen(group, x):
    return ep_linen.MoE(group, FFN).apply(to_linen(make_nnx(group)), x)


def _linen_in_jit(group, x):
    return run_linen(ep_linen.MoE(group, FFN), to_linen(make_nnx(group)), x)


def _gradient(group, x):
    moe = make_nnx(group)
    return jax.jit(jax.grad(lambda x: moe.with_stats(x)[0].sum()))(x)


def _with_padding(group, x):
    return make_nnx(group)(x[:5, 0])


def _with_an_error(group, x):
    with pytest.raises(ValueError, match="x is float32"):
        make_nnx(group)(x[..., :-1])
    return x


USES = [_nnx, _linen, _linen_in_jit, _gradient, _with_padding, _with_an_error]


@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__.strip("_"))
def test_closed_groups_of_layers_are_freed(use, backend, x):
    """What was compiled for a group goes with it: test suites and sweeps make many."""
    groups = []
    for _ in range(2):
        with make_group(backend=backend) as group:
            jax.block_until_ready(use(group, x))
        groups.append(weakref.ref(group))
        del group
    gc.collect()
    assert [ref() for ref in groups] == [None, None]


def test_layers_of_a_group_that_are_alike_are_traced_once(x):
    traced = []

    def activation(a):
        traced.append(a.shape)
        return jax.nn.silu(a)

    with make_group() as group:
        first, second = (make_nnx(group, seed, activation=activation) for seed in range(2))
        first(x)
        once = len(traced)
        assert once
        second(x)
        ep_linen.MoE(group, FFN, activation=activation).apply(to_linen(first), x)
        assert len(traced) == once
        # Another layer, and one of another group, are not.
        make_nnx(group, activation=activation, scale=2.0)(x)
        assert len(traced) == 2 * once
    with make_group() as other:
        make_nnx(other, activation=activation)(x)
    assert len(traced) == 3 * once
