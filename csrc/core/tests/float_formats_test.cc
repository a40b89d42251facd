// SPDX-License-Identifier: Apache-2.0
#include "csrc/core/float_formats.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "csrc/testing/reference.h"

namespace jax_ep {
namespace {

using reference::Format;

// A conversion pair under one face.
struct Codec {
  const char* name;
  Format format;
  uint32_t num_codes;
  float (*to_float)(uint32_t);
  uint32_t (*from_float)(float);
};

const Codec kCodecs[] = {
    {"bfloat16",
     reference::kBFloat16,
     1U << 16,
     [](uint32_t code) { return bfloat16_to_float(static_cast<uint16_t>(code)); },
     [](float value) -> uint32_t { return float_to_bfloat16(value); }},
    {"float16",
     reference::kFloat16,
     1U << 16,
     [](uint32_t code) { return float16_to_float(static_cast<uint16_t>(code)); },
     [](float value) -> uint32_t { return float_to_float16(value); }},
    {"float8_e4m3fn",
     reference::kFloat8E4M3,
     1U << 8,
     [](uint32_t code) { return float8_e4m3fn_to_float(static_cast<uint8_t>(code)); },
     [](float value) -> uint32_t { return float_to_float8_e4m3fn(value); }},
};

class FloatFormats : public testing::TestWithParam<Codec> {
 protected:
  // from_float(value) must be the code nearest to it, by the reference's arithmetic in double.
  static void expect_nearest(float value) {
    const Codec& codec = GetParam();
    const uint32_t code = codec.from_float(value);
    const double rounded = reference::round_to(codec.format, value);
    const double got = reference::decode(codec.format, code);
    if (std::isnan(rounded)) {
      EXPECT_TRUE(std::isnan(got)) << value << " became " << got;
      return;
    }
    EXPECT_EQ(got, rounded) << "of " << std::hexfloat << value;
    EXPECT_EQ(std::signbit(got), std::signbit(value)) << "of " << std::hexfloat << value;
  }

  static void expect_nearest_of_both_signs(float value) {
    expect_nearest(value);
    expect_nearest(-value);
  }
};

TEST_P(FloatFormats, EveryCodeHasItsValue) {
  const Codec& codec = GetParam();
  for (uint32_t code = 0; code < codec.num_codes; ++code) {
    const double expected = reference::decode(codec.format, code);
    const float got = codec.to_float(code);
    if (std::isnan(expected)) {
      EXPECT_TRUE(std::isnan(got)) << code;
    } else {
      EXPECT_EQ(got, expected) << code;
      EXPECT_EQ(std::signbit(got), std::signbit(expected)) << code;
    }
  }
}

TEST_P(FloatFormats, EveryCodeSurvivesTheRoundTrip) {
  const Codec& codec = GetParam();
  for (uint32_t code = 0; code < codec.num_codes; ++code) {
    const float value = codec.to_float(code);
    const uint32_t back = codec.from_float(value);
    if (std::isnan(value)) {
      EXPECT_TRUE(std::isnan(codec.to_float(back))) << code;
    } else {
      EXPECT_EQ(back, code);
    }
  }
}

// Between two neighbors lie the tie, which goes to the even code, and values on both its sides.
TEST_P(FloatFormats, RoundsTiesToEvenAndAllElseToTheNearest) {
  const Codec& codec = GetParam();
  for (uint32_t code = 0; code + 1 < codec.num_codes / 2; ++code) {
    const double low = reference::decode(codec.format, code);
    const double high = reference::decode(codec.format, code + 1);
    if (!std::isfinite(low) || !std::isfinite(high)) continue;
    const auto tie = static_cast<float>((low + high) / 2);
    ASSERT_EQ(tie, (low + high) / 2) << "a tie that float32 cannot hold";
    EXPECT_EQ(codec.from_float(tie), code % 2 == 0 ? code : code + 1) << "tie above " << code;
    EXPECT_EQ(codec.from_float(std::nextafter(tie, 0.0F)), code) << "below the tie";
    EXPECT_EQ(codec.from_float(std::nextafter(tie, INFINITY)), code + 1) << "above the tie";
    EXPECT_EQ(codec.from_float(-tie), codec.from_float(tie) | codec.num_codes / 2);
  }
}

TEST_P(FloatFormats, RoundsEveryMagnitude) {
  std::mt19937 random(7);
  for (uint32_t exponent = 0; exponent < 255; ++exponent) {
    for (int i = 0; i < 400; ++i) {
      const auto mantissa = static_cast<uint32_t>(random()) & 0x7F'FFFF;
      expect_nearest_of_both_signs(std::bit_cast<float>(exponent << 23 | mantissa));
    }
    for (const uint32_t mantissa : {0U, 1U, 0x40'0000U, 0x7F'FFFFU}) {
      expect_nearest_of_both_signs(std::bit_cast<float>(exponent << 23 | mantissa));
    }
  }
}

TEST_P(FloatFormats, RoundsAroundTheLargestValue) {
  const Codec& codec = GetParam();
  const double max = codec.format.max_finite();
  const double half_step = std::ldexp(0.5, std::ilogb(max) - codec.format.mantissa_bits);
  const auto first_past = static_cast<float>(max + half_step);
  for (float value = static_cast<float>(max); value <= first_past;
       value = std::nextafter(value, INFINITY)) {
    // Every float32 in a small range, the ends of a large one.
    expect_nearest_of_both_signs(value);
    if (value == static_cast<float>(max) + 0x1p-10F * static_cast<float>(half_step)) break;
  }
  expect_nearest_of_both_signs(std::nextafter(first_past, 0.0F));
  expect_nearest_of_both_signs(first_past);
  expect_nearest_of_both_signs(std::nextafter(first_past, INFINITY));
}

TEST_P(FloatFormats, KeepsNansAndInfinities) {
  const Codec& codec = GetParam();
  expect_nearest_of_both_signs(INFINITY);
  for (const uint32_t payload : {1U, 0x1FFFU, 0xFFFFU, 0x40'0000U, 0x7F'FFFFU}) {
    for (const uint32_t sign : {0U, 0x8000'0000U}) {
      const auto nan = std::bit_cast<float>(sign | 0x7F80'0000U | payload);
      EXPECT_TRUE(std::isnan(reference::decode(codec.format, codec.from_float(nan)))) << payload;
    }
  }
}

// round(value) is the conversion there and back, for values of every exponent.
template <typename F>
void expect_round_is_there_and_back(float value) {
  const float there_and_back = F::to_float(F::from_float(value));
  const float rounded = F::round(value);
  if (std::isnan(value)) {
    EXPECT_TRUE(std::isnan(rounded)) << std::hexfloat << value;
  } else {
    EXPECT_EQ(std::bit_cast<uint32_t>(rounded), std::bit_cast<uint32_t>(there_and_back))
        << std::hexfloat << value;
  }
}

TEST(Round, IsTheConversionThereAndBack) {
  std::mt19937 random(5);
  for (uint32_t top = 0; top < 1U << 16; ++top) {  // sign, exponent and the bits that stay
    for (const uint32_t low : {0U,
                               1U,
                               0x0FFFU,
                               0x1000U,
                               0x1001U,
                               0x7FFFU,
                               0x8000U,
                               0x8001U,
                               0xF000U,
                               0xFFFFU,
                               static_cast<uint32_t>(random()) & 0xFFFF}) {
      const auto value = std::bit_cast<float>(top << 16 | low);
      expect_round_is_there_and_back<Float32>(value);
      expect_round_is_there_and_back<BFloat16>(value);
      expect_round_is_there_and_back<Float16>(value);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(All, FloatFormats, testing::ValuesIn(kCodecs), [](const auto& info) {
  return std::string(info.param.name);
});

TEST(Float8E4M3, SaturatesToNanPast464) {
  EXPECT_EQ(float_to_float8_e4m3fn(448.0F), 0x7E);
  EXPECT_EQ(float_to_float8_e4m3fn(464.0F), 0x7E);
  EXPECT_EQ(float_to_float8_e4m3fn(std::nextafter(464.0F, INFINITY)), 0x7F);
  EXPECT_EQ(float_to_float8_e4m3fn(-INFINITY), 0xFF);
}

TEST(Float16, OverflowsToInfinityFrom65520) {
  EXPECT_EQ(float_to_float16(65504.0F), 0x7BFF);
  EXPECT_EQ(float_to_float16(std::nextafter(65520.0F, 0.0F)), 0x7BFF);
  EXPECT_EQ(float_to_float16(65520.0F), 0x7C00);
}

// The reference that the operations are tested with must itself be right.
TEST(Reference, FusesLikeStdFma) {
  std::mt19937 random(11);
  const auto number = [&random] {  // in [1, 2), of either sign
    return std::bit_cast<float>((static_cast<uint32_t>(random()) & 0x807F'FFFF) | 0x3F80'0000);
  };
  for (int i = 0; i < 200'000; ++i) {
    const float a = number();
    const float b = number();
    // From far below the product to far above: where the double rounding of a naive sum shows.
    const float c = std::ldexp(number(), static_cast<int>(random() % 64) - 32);
    ASSERT_EQ(reference::fused_multiply_add(a, b, c), std::fma(a, b, c));
  }
}

}  // namespace
}  // namespace jax_ep
