// SPDX-License-Identifier: Apache-2.0
// Conversions between float32 and the 16-bit and 8-bit formats of token rows: IEEE round to
// nearest even, with subnormals, infinities and NaNs (a NaN stays a NaN, quiet, of its sign).
//
// They are plain integer arithmetic with selects instead of branches, so that a compiler turns
// a loop over them into vector code on any target, and none depends on the thread's
// flush-to-zero mode: no float operation here takes or yields a subnormal float32 that matters.
#ifndef JAX_EP_CSRC_CORE_FLOAT_FORMATS_H_
#define JAX_EP_CSRC_CORE_FLOAT_FORMATS_H_

#include <bit>
#include <cstdint>

#include "csrc/core/dtype.h"

namespace jax_ep {

namespace float32_bits {
inline constexpr uint32_t kSign = 0x8000'0000;
inline constexpr uint32_t kInfinity = 0x7F80'0000;
inline constexpr uint32_t kQuiet = 0x0040'0000;
// The bits of 2^exponent.
constexpr uint32_t pow2(int exponent) { return static_cast<uint32_t>(127 + exponent) << 23; }
}  // namespace float32_bits

constexpr float bfloat16_to_float(uint16_t value) {
  return std::bit_cast<float>(static_cast<uint32_t>(value) << 16);
}

constexpr uint16_t float_to_bfloat16(float value) {
  const auto bits = std::bit_cast<uint32_t>(value);
  const uint32_t rounded = bits + 0x7FFF + ((bits >> 16) & 1);
  const bool is_nan = (bits & ~float32_bits::kSign) > float32_bits::kInfinity;
  return static_cast<uint16_t>((is_nan ? bits | float32_bits::kQuiet : rounded) >> 16);
}

constexpr float float16_to_float(uint16_t value) {
  const uint32_t sign = static_cast<uint32_t>(value & 0x8000) << 16;
  const uint32_t magnitude = value & 0x7FFF;
  constexpr uint32_t kRebias = (127 - 15) << 23;
  const uint32_t normal = (magnitude << 13) + kRebias;
  const uint32_t special = normal + kRebias;  // exponent 31 becomes 255
  const auto subnormal =
      std::bit_cast<uint32_t>(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24F);
  const uint32_t finite = magnitude < 0x0400 ? subnormal : normal;
  return std::bit_cast<float>(sign | (magnitude >= 0x7C00 ? special : finite));
}

constexpr uint16_t float_to_float16(float value) {
  const auto bits = std::bit_cast<uint32_t>(value);
  const uint32_t sign = (bits & float32_bits::kSign) >> 16;
  const uint32_t magnitude = bits & ~float32_bits::kSign;
  // Rebias the exponent and round; a carry out of the largest float16 lands on infinity.
  const uint32_t normal = (magnitude - ((127 - 15) << 23) + 0x0FFF + ((magnitude >> 13) & 1)) >> 13;
  // In [0.5, 1) a float32 has steps of 2^-24, those of the float16 subnormals: the addition
  // rounds, and the low bits of the sum are the result.
  const uint32_t subnormal =
      std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5F) - float32_bits::pow2(-1);
  const uint32_t special =
      magnitude > float32_bits::kInfinity ? 0x7E00 | ((magnitude >> 13) & 0x03FF) : 0x7C00;
  const uint32_t finite = magnitude < float32_bits::pow2(-14) ? subnormal : normal;
  return static_cast<uint16_t>(sign | (magnitude >= float32_bits::pow2(16) ? special : finite));
}

constexpr float float8_e4m3fn_to_float(uint8_t value) {
  const uint32_t sign = static_cast<uint32_t>(value & 0x80) << 24;
  const uint32_t magnitude = value & 0x7F;
  const uint32_t normal = (magnitude << 20) + ((127 - 7) << 23);
  const auto subnormal =
      std::bit_cast<uint32_t>(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-9F);
  const uint32_t finite = magnitude < 0x08 ? subnormal : normal;
  constexpr uint32_t kNan = float32_bits::kInfinity | float32_bits::kQuiet;
  return std::bit_cast<float>(sign | (magnitude == 0x7F ? kNan : finite));
}

// The format has no infinity: what would round past its largest value, 448, becomes NaN.
constexpr uint8_t float_to_float8_e4m3fn(float value) {
  const auto bits = std::bit_cast<uint32_t>(value);
  const uint32_t sign = (bits & float32_bits::kSign) >> 24;
  const uint32_t magnitude = bits & ~float32_bits::kSign;
  const uint32_t normal = (magnitude - ((127 - 7) << 23) + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20;
  // As for float16: float32 has steps of 2^-9, the subnormals', in [2^14, 2^15).
  const uint32_t subnormal =
      std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0x1p14F) - float32_bits::pow2(14);
  constexpr auto kLastThatRoundsTo448 = std::bit_cast<uint32_t>(464.0F);
  const uint32_t finite = magnitude < float32_bits::pow2(-6) ? subnormal : normal;
  return static_cast<uint8_t>(sign | (magnitude > kLastThatRoundsTo448 ? 0x7F : finite));
}

// The value nearest to a float32 that the 16-bit formats hold, as a float32: what a conversion
// there and back gives, without leaving 32 bits, which vector code pays for. A NaN stays as it is.
constexpr float round_to_bfloat16(float value) {
  const auto bits = std::bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF'0000;
  return value != value ? value : std::bit_cast<float>(rounded);
}

constexpr float round_to_float16(float value) {
  const auto bits = std::bit_cast<uint32_t>(value);
  const uint32_t sign = bits & float32_bits::kSign;
  const uint32_t magnitude = bits ^ sign;
  const uint32_t normal = (magnitude + 0x0FFF + ((magnitude >> 13) & 1)) & ~uint32_t{0x1FFF};
  const uint32_t in_range = normal < float32_bits::pow2(16) ? normal : float32_bits::kInfinity;
  const auto subnormal = std::bit_cast<uint32_t>((std::bit_cast<float>(magnitude) + 0.5F) - 0.5F);
  const uint32_t number = magnitude < float32_bits::pow2(-14) ? subnormal : in_range;
  return value != value ? value : std::bit_cast<float>(sign | number);
}

// One type per DType, for templates over the element type of rows.
struct Float32 {
  using Storage = float;
  static constexpr DType kDType = DType::kFloat32;
  static constexpr float to_float(Storage value) { return value; }
  static constexpr Storage from_float(float value) { return value; }
  static constexpr float round(float value) { return value; }
};

struct BFloat16 {
  using Storage = uint16_t;
  static constexpr DType kDType = DType::kBFloat16;
  static constexpr float to_float(Storage value) { return bfloat16_to_float(value); }
  static constexpr Storage from_float(float value) { return float_to_bfloat16(value); }
  static constexpr float round(float value) { return round_to_bfloat16(value); }
};

struct Float16 {
  using Storage = uint16_t;
  static constexpr DType kDType = DType::kFloat16;
  static constexpr float to_float(Storage value) { return float16_to_float(value); }
  static constexpr Storage from_float(float value) { return float_to_float16(value); }
  static constexpr float round(float value) { return round_to_float16(value); }
};

}  // namespace jax_ep

#endif  // JAX_EP_CSRC_CORE_FLOAT_FORMATS_H_
