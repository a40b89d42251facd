// SPDX-License-Identifier: Apache-2.0
// The kernels' division by a scale, as the simulator runs it, against an IEEE division.
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#include "csrc/core/float_formats.h"
#include "csrc/device/convert.h"

namespace jax_ep::dev {
namespace {

void expect_same(float value, float scale) {
  const uint8_t expected = float_to_float8_e4m3fn(value / scale);
  const uint8_t got = float_to_float8_e4m3fn(Divider(scale)(value));
  const bool is_nan = (expected & 0x7F) == 0x7F;
  ASSERT_TRUE(is_nan ? (got & 0x7F) == 0x7F : got == expected)
      << std::hexfloat << value << " / " << scale << " became " << int{got} << ", not "
      << int{expected};
}

// FP8 sees a quotient's last bit only next to the middle between two of its numbers, which has five
// significant bits. A quotient depends on the mantissas alone: with every eleventh of all, and each
// of those next to a power of two's sixteenths, where quotients come closest to being misrounded.
TEST(Divider, AgreesWhereRoundingToFp8CouldTell) {
  const auto try_scale = [](uint32_t mantissa) {
    const auto scale = std::bit_cast<float>(0x3F80'0000 | mantissa);
    for (int sixteenths = 16; sixteenths <= 32; ++sixteenths) {
      const float middle = static_cast<float>(sixteenths) / 16;
      const auto nearest = std::bit_cast<uint32_t>(middle * scale);
      for (uint32_t value = nearest - 2; value <= nearest + 2; ++value) {
        const auto x = std::bit_cast<float>(value);
        const float got = Divider(scale)(x);
        // Not ASSERT_EQ, which takes longer than the division, millions of times.
        if (got != x / scale) FAIL() << std::hexfloat << x << " / " << scale << " became " << got;
      }
    }
  };
  constexpr uint32_t kMantissas = 1U << 23;
  for (uint32_t mantissa = 0; mantissa < kMantissas; mantissa += 11) try_scale(mantissa);
  for (uint32_t start = 0; start < kMantissas; start += kMantissas / 16) {
    for (uint32_t mantissa = start; mantissa < start + 64; ++mantissa) try_scale(mantissa);
    for (uint32_t mantissa = start + kMantissas / 16 - 64; mantissa < start + kMantissas / 16;
         ++mantissa) {
      try_scale(mantissa);
    }
  }
}

TEST(Divider, AgreesAtTheEndsOfTheRange) {
  using Limits = std::numeric_limits<float>;
  const float values[] = {0.0F,
                          1e-45F,
                          Limits::min(),
                          1e-30F,
                          2.3e-7F,
                          1e-4F,
                          1.0F,
                          448.0F,
                          6.5e4F,
                          3e38F,
                          Limits::max(),
                          Limits::infinity(),
                          Limits::quiet_NaN()};
  for (const float amax : values) {
    const float scale = fp8_scale(amax);
    for (const float value : values) {
      if (value > amax) continue;
      expect_same(value, scale);
      expect_same(-value, scale);
    }
  }
}

}  // namespace
}  // namespace jax_ep::dev
