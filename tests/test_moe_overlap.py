# SPDX-License-Identifier: Apache-2.0
"""`moe(..., overlap=f)`: the sum of both, with `f` between dispatch's halves."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_ep
from ep_testing.halves import PROBLEM, arguments, assert_same_bits, compiled_text, num_open
from ep_testing.problems import PROBLEMS
from ep_testing.programs import make_group, over_ranks

BACKENDS = pytest.mark.parametrize("backend", ["ffi", "xla"])


def _weights(problem, ffn=6):
    num_local = problem.num_experts // problem.num_ranks
    shapes = [(num_local, problem.hidden, ffn)] * 2 + [(num_local, ffn, problem.hidden)]
    return [
        np.stack([problem.random(shape, salt=10 * i + r) for r in range(problem.num_ranks)])
        for i, shape in enumerate(shapes)
    ]


def _shared(x):
    x = x.dequantize(jnp.bfloat16) if isinstance(x, jax_ep.QuantizedRows) else x
    return jnp.tanh(x @ jnp.ones((x.shape[-1], x.shape[-1]), x.dtype))


@BACKENDS
@pytest.mark.parametrize("name", ["masked_half", "bfloat16", "fp8", "fp8_rows", "no_tokens"])
def test_moe_with_something_to_overlap_is_the_sum(backend, name):
    problem = PROBLEMS[name]

    def moe(x, idx, w, *weights, overlap):
        run = functools.partial(jax_ep.moe, group=group, with_stats=True)
        if overlap:
            return run(x, idx, w, *weights, overlap=_shared)
        out, stats = run(x, idx, w, *weights)
        return out + _shared(x), stats

    def of(overlap):
        f = functools.partial(moe, overlap=overlap)

        def loss(x, w, weights, idx):
            return jnp.sum(jnp.sin(f(x, idx, w, *weights)[0].astype(jnp.float32)))

        def outs(x, idx, w, *weights):
            return f(x, idx, w, *weights), jax.grad(loss, argnums=(0, 1, 2))(x, w, weights, idx)

        return over_ranks(group, outs)(*arguments(problem), *_weights(problem))

    with make_group(problem, backend) as group:
        assert_same_bits(of(overlap=True), of(overlap=False))


def test_moe_overlaps_with_rows_that_are_quantized():
    problem = PROBLEMS["fp8_rows"]

    def f(x, *rest, overlap):
        x = jax_ep.quantize(x)
        if overlap:
            return jax_ep.moe(x, *rest, group=group, overlap=_shared)
        return jax_ep.moe(x, *rest, group=group) + _shared(x)

    with make_group(problem, "ffi") as group:
        got, want = (
            over_ranks(group, functools.partial(f, overlap=overlap))(
                *arguments(problem), *_weights(problem)
            )
            for overlap in (True, False)
        )
    assert_same_bits(got, want)


def test_what_moe_overlaps_is_between_the_halves():
    def f(x, idx, w):
        weights = [jnp.ones(v.shape[1:], v.dtype) for v in _weights(PROBLEM)]
        return jax_ep.moe(
            x, idx, w, *weights, group=group, overlap=lambda x: jnp.real(jnp.fft.fft(x))
        )

    with make_group(PROBLEM, "ffi") as group:
        text = compiled_text(group, f, *arguments(PROBLEM))
    targets = re.findall(r'custom_call_target="(jax_ep_\w+)"', text)
    assert sorted(targets) == ["jax_ep_combine", "jax_ep_dispatch_done", "jax_ep_dispatch_start"]
    (start,) = re.findall(r'custom-call\((.*?)\), custom_call_target="jax_ep_dispatch_start"', text)
    assert "fft" not in start


def test_layers_that_do_not_depend_on_each_other():
    """More of them between the halves than flights may be open: XLA orders them as it likes."""

    def layers(x, idx, w, *weights, overlap):
        big, outs = jnp.ones((96, 96)), []
        for i in range(6):
            for _ in range(i % 3):  # so that they get to the exchanges at different times
                big = jnp.sin(big @ big)
            mine = x * (i + 1) + 0 * big[0, 0]
            if overlap:
                out = jax_ep.moe(mine, idx, w, *weights, group=group, overlap=_shared)
            else:
                out = jax_ep.moe(mine, idx, w, *weights, group=group) + _shared(mine)
            outs.append(out)
        return outs

    with make_group(PROBLEM, "ffi", timeout=25.0) as group:
        programs = [
            over_ranks(group, functools.partial(layers, overlap=overlap))
            for overlap in (True, False)
        ]
        args = (*arguments(PROBLEM), *_weights(PROBLEM))
        want = programs[1](*args)
        for _ in range(20):
            assert_same_bits(programs[0](*args), want)
        assert num_open(group) == 0


@pytest.mark.parametrize(
    ("overlap", "message"),
    [
        (3, "overlap is a int; allowed: None, or a function of x"),
        (lambda x: x[1:], r"overlap\(x\) is float32\[2, 8\]; allowed: float32\[3, 8\]"),
        (lambda x: x.astype(jnp.bfloat16), r"overlap\(x\) is bfloat16\[3, 8\]; allowed: float32"),
    ],
)
def test_moe_names_what_does_not_overlap(overlap, message):
    with make_group(PROBLEM, "ffi") as group, pytest.raises(ValueError, match=message):
        over_ranks(group, functools.partial(jax_ep.moe, group=group, overlap=overlap))(
            *arguments(PROBLEM), *_weights(PROBLEM)
        )
