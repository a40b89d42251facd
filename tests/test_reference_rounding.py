# SPDX-License-Identifier: Apache-2.0
"""The oracle's fma and FP8 blocks against exact arithmetic and cases worked out by hand."""

import math
from fractions import Fraction

import hypothesis
import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import pytest

from jax_ep import reference

E4M3 = ml_dtypes.float8_e4m3fn
BFLOAT16 = ml_dtypes.bfloat16


def nearest_float32(value: Fraction) -> float:
    """The float32 nearest to an exact value, ties to even, by integer arithmetic."""
    if value == 0:
        return 0.0
    size = abs(value)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    if Fraction(2) ** exponent > size:
        exponent -= 1
    ulp = Fraction(2) ** (max(exponent, -126) - 23)
    units = round(size / ulp)  # of a Fraction: half to even
    if units * ulp >= Fraction(2) ** 128:
        return math.copysign(math.inf, value)
    return math.copysign(float(units * ulp), value)


floats32 = st.floats(width=32, allow_nan=False, allow_infinity=False)
# Numbers that cancel each other and end in ties are rare among the former.
close_floats32 = st.builds(
    lambda n, e: math.ldexp(n, e), st.integers(-(2**24), 2**24), st.integers(-40, 2)
)


@hypothesis.given(*[floats32 | close_floats32] * 3)
@hypothesis.settings(max_examples=1000)
def test_fma32_rounds_the_exact_value_once(a, b, c):
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    want = nearest_float32(exact)
    got = float(reference.fma32(a, b, c))
    assert got == want
    if exact:
        assert math.copysign(1, got) == math.copysign(1, want)


def test_fma32_does_not_round_twice():
    # a * b + c = 1 + 2^-24 + 2^-60. float64 makes 1 + 2^-24 of it, a tie that float32 would round
    # down to 1; the true value is above the tie.
    a, b, c = (1 + 2.0**-12) * 2.0**-24, 1 - 2.0**-12 + 2.0**-24, 1.0
    assert float(np.float32(np.float64(a) * b + c)) == 1
    assert float(reference.fma32(a, b, c)) == 1 + 2.0**-23
    assert float(reference.fma32(-a, b, -c)) == -1 - 2.0**-23
    assert float(reference.fma32(-a, b, c)) == 1 - 2.0**-24


def test_fma32_of_what_is_not_finite():
    big = np.float32(2.0**127)
    assert float(reference.fma32(big, 4, 0)) == math.inf
    assert float(reference.fma32(big, -4, 0)) == -math.inf
    assert float(reference.fma32(big, 4, -big)) == math.inf
    assert math.isnan(reference.fma32(math.inf, 0, 0))
    assert math.isnan(reference.fma32(math.inf, 1, -math.inf))
    assert math.isnan(reference.fma32(math.nan, 1, 1))
    assert float(reference.fma32(2.0**-149, 0.5, 0)) == 0  # a tie, to even
    assert float(reference.fma32(2.0**-149, 0.75, 0)) == 2.0**-149


def test_round_to_starts_from_float32():
    with pytest.raises(TypeError, match="x is float64; rounding to bfloat16 starts from float32"):
        reference.round_to(np.ones(1), BFLOAT16)
    assert float(reference.round_to(np.float32(1e6), np.float16)) == math.inf


def test_fp8_by_hand_with_scale_1():
    # The largest value is 448, so the scale is 1. Between 16 and 32 the step is 2.
    x = np.array([448, 17, 19, -17, 21, 18.9, 2.0**-10, 3 * 2.0**-10, -(2.0**-10), 0, -0.0])
    q, scale = reference.quantize_fp8(x.astype(np.float32))
    assert scale.tolist() == [1]
    # Ties go to the even one of 16, 18, 20, 22; 2^-9 is the smallest positive number.
    want = [448, 16, 20, -16, 20, 18, 0, 2.0**-8, -0.0, 0, -0.0]
    assert q.astype(np.float32).tolist() == want
    assert np.signbit(q.astype(np.float32)).tolist() == np.signbit(want).tolist()
    assert q.dtype == E4M3
    assert scale.dtype == np.float32


def test_fp8_by_hand_with_another_scale():
    x = np.array([3.0, 1.0, -0.1], np.float32)
    q, scale = reference.quantize_fp8(x)
    assert scale.tolist() == [np.float32(3) / np.float32(448)]
    # 448; 149.33, step 16: 144; 14.933, step 1: 15.
    assert q.astype(np.float32).tolist() == [448, 144, -15]
    got = reference.dequantize_fp8(q, scale, np.float32)
    assert got.tolist() == [np.float32(v) * scale[0] for v in (448, 144, -15)]
    # 0.9642857 lies between the bfloat16 numbers 0.9609375 and 0.96484375.
    assert reference.dequantize_fp8(q, scale, BFLOAT16)[1].item() == 0.96484375


def test_fp8_scales_have_a_floor():
    floor = np.float32(1e-4) / np.float32(448)
    q, scale = reference.quantize_fp8(np.zeros(3, np.float32))
    assert scale.tolist() == [floor]
    assert q.astype(np.float32).tolist() == [0, 0, 0]
    q, scale = reference.quantize_fp8(np.array([5e-5, 0, 0], np.float32))
    assert scale.tolist() == [floor]
    assert q.astype(np.float32).tolist() == [224, 0, 0]


def test_fp8_blocks_are_128_channels_and_the_last_may_be_shorter():
    x = np.concatenate([np.full(128, 448.0), np.full(2, 896.0)]).astype(np.float32)
    q, scale = reference.quantize_fp8(np.stack([x, 2 * x]))
    assert scale.tolist() == [[1, 2], [2, 4]]
    assert np.array_equal(reference.dequantize_fp8(q, scale, np.float32), np.stack([x, 2 * x]))
    assert reference.quantize_fp8(np.ones((3, 1), np.float32))[1].shape == (3, 1)


def test_fp8_nan_and_infinity_spoil_their_block_only():
    x = np.ones((2, 256), np.float32)
    x[0, 5], x[1, 200] = np.nan, np.inf
    got = reference.dequantize_fp8(*reference.quantize_fp8(x), np.float32)
    assert np.isnan(got[0, :128]).all()
    assert (got[0, 128:] == 1).all()
    assert (got[1, :128] == 1).all()
    assert np.isnan(got[1, 128:]).all()


@hypothesis.given(st.floats(-448, 448, width=32))
@hypothesis.settings(max_examples=500)
def test_fp8_takes_the_nearest_number_and_of_two_the_even_one(value):
    all_codes = np.arange(256, dtype=np.uint8).view(E4M3).astype(np.float64)
    q, scale = reference.quantize_fp8(np.array([448, value], np.float32))
    assert scale.tolist() == [1]
    distance = np.where(np.isnan(all_codes), np.inf, np.abs(all_codes - value))
    nearest = np.flatnonzero(distance == distance.min())
    values = {abs(float(all_codes[code])) for code in nearest}
    if len(values) > 1:  # a tie; the code of an even number ends in 0
        nearest = nearest[nearest % 2 == 0]
    assert q[1:].view(np.uint8).item() in nearest
    assert np.signbit(q[1].astype(np.float32)) == np.signbit(np.float32(value))


@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16, np.float16])
def test_fp8_error_is_at_most_one_sixteenth_of_normal_values(dtype):
    x = np.random.default_rng(0).standard_normal((50, 300)).astype(dtype)
    got = reference.dequantize_fp8(*reference.quantize_fp8(x), dtype).astype(np.float64)
    amax = np.abs(x.astype(np.float64)).max()
    # 3 bits of mantissa, and a little for the two roundings around; small numbers are subnormal.
    bound = np.abs(x.astype(np.float64)) * (2.0**-4 + 2.0**-8) + amax / 448 * 2.0**-10 * 1.01
    assert (np.abs(got - x.astype(np.float64)) <= bound).all()
