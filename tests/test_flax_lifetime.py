# SPDX-License-Identifier: Apache-2.0
"""How long what layers compile lives: as long as their group is open, and once for those alike.

Copies of layers, which have the same group.
"""

import copy
import gc
import weakref

import jax
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import jax_ep
from ep_testing.flax_layers import FFN, HIDDEN, make_group, make_nnx, run_linen, to_linen
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
        # A group that is closed does not wait for programs whose results nobody holds.
        jax.block_until_ready(first(x))
        once = len(traced)
        assert once
        jax.block_until_ready(second(x))
        linen = ep_linen.MoE(group, FFN, activation=activation)
        jax.block_until_ready(linen.apply(to_linen(first), x))
        assert len(traced) == once
        # Another layer, and one of another group, are not.
        jax.block_until_ready(make_nnx(group, activation=activation, scale=2.0)(x))
        assert len(traced) == 2 * once
    with make_group() as other:
        jax.block_until_ready(make_nnx(other, activation=activation)(x))
    assert len(traced) == 3 * once


# --- copies --------------------------------------------------------------------------------------

COPIES = {"copy": copy.copy, "deepcopy": copy.deepcopy}


class NnxModel(nnx.Module):
    def __init__(self, group):
        self.group = group
        self.layers = nnx.List([make_nnx(group, seed, selection_bias=True) for seed in range(2)])

    def __call__(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


class LinenModel(nn.Module):
    group: jax_ep.EpGroup
    layers: tuple[nn.Module, ...]

    def __call__(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


def _run_nnx(model, x):
    return nnx.jit(lambda model, x: model(x))(model, x)


@pytest.mark.parametrize("how", [*COPIES, "clone"])
def test_a_copy_of_an_nnx_model_has_the_same_group(how, x):
    with make_group() as group:
        model = NnxModel(group)
        want = np.asarray(_run_nnx(model, x))
        other = {**COPIES, "clone": nnx.clone}[how](model)
        assert other is not model
        assert other.group is group
        assert [layer.spec.group for layer in other.layers] == [group, group]
        np.testing.assert_array_equal(_run_nnx(other, x), want)
        if how == "copy":
            return  # its layers are the model's
        # The copy's variables are its own.
        kernel = other.layers[0].w_down
        kernel.set_value(kernel[...] * 0)
        assert not np.array_equal(_run_nnx(other, x), want)
        np.testing.assert_array_equal(_run_nnx(model, x), want)
    with pytest.raises(jax_ep.EpGroupClosed):
        other(x)


@pytest.mark.parametrize("how", [*COPIES, "clone"])
def test_a_copy_of_a_linen_model_has_the_same_group(how, x):
    with make_group() as group:
        layers = tuple(ep_linen.MoE(group, FFN, name=f"layer{i}") for i in range(2))
        model = LinenModel(group, layers)
        variables = jax.jit(model.init)(jax.random.key(0), x)
        want = np.asarray(jax.jit(model.apply)(variables, x))
        other = {**COPIES, "clone": LinenModel.clone}[how](model)
        assert other is not model
        assert other.group is group
        assert [layer.group for layer in other.layers] == [group, group]
        np.testing.assert_array_equal(jax.jit(other.apply)(variables, x), want)
    with pytest.raises(jax_ep.EpGroupClosed):
        other.apply(variables, x)
