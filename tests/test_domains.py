# SPDX-License-Identifier: Apache-2.0
"""Sums over domains of ranks: `EpConfig.domain_size`."""

import functools
import re

import jax
import numpy as np
import pytest

import jax_ep
from ep_testing import assertions
from ep_testing.halves import in_halves
from ep_testing.oracle_checks import assert_matches_oracle
from ep_testing.problems import EpProblem
from ep_testing.programs import exchange, make_group, make_mesh, over_ranks
from jax_ep import reference

# Of each token eight rows, so that most have several in each domain.
EIGHT = EpProblem(
    name="eight", num_ranks=8, num_tokens=6, hidden=40, num_topk=8, num_experts=16, seed=3
)
SIX = EIGHT.replace(num_ranks=6, num_experts=12, recv_capacity=17, routing="masked_half")
BACKENDS = pytest.mark.parametrize("backend", ["ffi", "xla"])
DTYPES = pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])


def _combined(problem: EpProblem, domain_size: int | None) -> np.ndarray:
    """The oracle's unweighted sums."""
    return reference.combine(
        problem.expert_outputs(), problem.plan, dtype=problem.np_dtype, domain_size=domain_size
    )


@BACKENDS
@DTYPES
@pytest.mark.parametrize("layout", ["expert", "rank"])
@pytest.mark.parametrize(("base", "domain_size"), [(EIGHT, 2), (EIGHT, 4), (SIX, 3), (SIX, 2)])
def test_a_backend_gives_the_oracles_bits(base, domain_size, layout, dtype, backend):
    problem = base.replace(dtype=dtype, layout=layout, domain_size=domain_size)
    assert_matches_oracle(problem, exchange(problem, backend), backend)


@BACKENDS
@DTYPES
def test_domains_of_one_rank_and_of_all_change_no_bit(dtype, backend):
    problem = EIGHT.replace(dtype=dtype)
    want = exchange(problem, backend)
    for domain_size in (1, 8):
        got = exchange(problem.replace(domain_size=domain_size), backend)
        assertions.assert_sums_equal(got.weighted, want.weighted, problem)
        assertions.assert_sums_equal(got.unweighted, want.unweighted, problem)


@DTYPES
def test_the_oracles_bits_are_those_of_one_level_for_one_rank_and_for_all(dtype):
    problem = EIGHT.replace(dtype=dtype)
    bits = {size: assertions.bits(_combined(problem, size)) for size in (None, 1, 2, 4, 8)}
    for domain_size in (1, 8):
        np.testing.assert_array_equal(bits[domain_size], bits[None])
    for domain_size in (2, 4):
        assert (bits[domain_size] != bits[None]).any(), "else the tests here see nothing"
    assert (bits[2] != bits[4]).any()


def test_the_definition_by_hand():
    """Four ranks, one row each: 256 and 1 are lost in one level, and not in two of bfloat16."""
    rows = np.array([256.0, 1.0, 1.0, 1.0], np.float32)
    plan = reference.plan(np.arange(4).reshape(1, 1, 4).repeat(4, 0), num_experts=4)
    y = np.zeros((4, plan.row_source.shape[1], 1), np.float32)
    y[:, :] = rows[:, None, None]
    bfloat16 = jax.numpy.bfloat16

    def combined(domain_size):
        out = reference.combine(y, plan, dtype=bfloat16, domain_size=domain_size)
        return float(out[0, 0, 0])

    # float32 holds 256 + 1 + 1 + 1 = 259, which bfloat16 rounds to 260.
    assert combined(None) == combined(1) == combined(4) == 260
    # bfloat16(257) + bfloat16(2) = 256 + 2
    assert combined(2) == 258


@BACKENDS
@pytest.mark.parametrize("layout", ["expert", "rank"])
def test_the_gradient_of_dispatch_is_summed_over_domains(layout, backend):
    problem = EIGHT.replace(dtype="bfloat16", layout=layout, domain_size=2)
    rows_bar = problem.expert_outputs()
    with make_group(problem, backend) as group:

        def on_rank(x, idx, bar):
            _, vjp = jax.vjp(lambda x: jax_ep.dispatch(x, idx, group=group).x, x)
            return vjp(bar)[0]

        got = np.asarray(over_ranks(group, on_rank)(problem.x, problem.topk_idx, rows_bar))
    assertions.assert_sums_equal(got, _combined(problem, 2), problem)
    assert (assertions.bits(got) != assertions.bits(_combined(problem, None))).any()


@pytest.mark.parametrize(
    ("dtype", "kept"),
    [("bfloat16", "stablehlo.reduce_precision"), ("float16", "stablehlo.optimization_barrier")],
)
def test_xla_is_told_to_round(dtype, kept):
    """It may drop a conversion and back, as it does on GPUs; on CPU no result would show it."""
    problem = EIGHT.replace(dtype=dtype, domain_size=4)
    with make_group(problem, "xla") as group:

        def on_rank(x, idx):
            received = jax_ep.dispatch(x, idx, group=group)
            return jax_ep.combine(received.x, received.handle, group=group)

        spec = jax.sharding.PartitionSpec("expert")
        mapped = jax.shard_map(on_rank, mesh=group.mesh, in_specs=spec, out_specs=spec)
        args = [a.reshape(-1, a.shape[-1]) for a in (problem.x, problem.topk_idx)]
        text = jax.jit(mapped).lower(*args).as_text()
    assert text.count(kept) == 2, "once for each domain"


def test_halves_sum_over_domains_too():
    problem = EIGHT.replace(dtype="bfloat16", domain_size=4)
    with make_group(problem, "ffi") as group:
        run = functools.partial(in_halves, group, problem)
        _, got = over_ranks(group, run)(problem.x, problem.topk_idx, problem.topk_weights)
    want = reference.combine(
        problem.dispatched.x, problem.plan, problem.dispatched.weights, dtype=problem.np_dtype,
        domain_size=4,
    )  # fmt: skip
    assertions.assert_sums_equal(np.asarray(got), want, problem)


@pytest.mark.parametrize("base", [EIGHT, SIX])
@DTYPES
def test_bits_stay_within_the_bound_of_the_float64_value(base, dtype):
    problem = base.replace(dtype=dtype)
    y, plan, weights = problem.expert_outputs(), problem.plan, problem.dispatched.weights
    value = reference.combine(y, plan, weights, exact_bits=False)
    for domain_size in (1, 2):
        sums = {"dtype": problem.np_dtype, "domain_size": domain_size}
        got = reference.combine(y, plan, weights, **sums).astype(np.float64)
        bound = reference.combine_error_bound(y, plan, weights, **sums)
        assert (np.abs(got - value) <= bound).all()


# --- what it may be ------------------------------------------------------------------------------


@pytest.mark.parametrize("domain_size", [0, -2, 2.0, True, "2"])
def test_a_bad_domain_size_is_named(domain_size):
    message = re.escape(f"EpConfig.domain_size is {domain_size!r}; allowed: None or an int from 1")
    with pytest.raises(ValueError, match=message):
        make_group(EIGHT.replace(domain_size=domain_size), "ffi")


@BACKENDS
@pytest.mark.parametrize("domain_size", [3, 16])
def test_domains_are_of_equal_sizes(domain_size, backend):
    message = (
        f"EpConfig.domain_size is {domain_size}; it must divide the group's 8 ranks "
        r"\(axis 'expert' of the mesh\)"
    )
    with pytest.raises(ValueError, match=message):
        make_group(EIGHT.replace(domain_size=domain_size), backend)
    with pytest.raises(ValueError, match=f"domain_size is {domain_size}; it must divide the 8"):
        _combined(EIGHT, domain_size)


@pytest.mark.parametrize(("domain_size", "became"), [(None, 4), (1, 1), (2, 2), (4, 4)])
def test_a_group_says_what_it_became(domain_size, became):
    mesh = make_mesh((2, 4), ("data", "expert"))
    problem = EIGHT.replace(num_ranks=4, domain_size=domain_size)
    with make_group(problem, "ffi", mesh=mesh) as group:
        assert group.domain_size == became
