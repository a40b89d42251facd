// SPDX-License-Identifier: Apache-2.0
#ifndef JAX_EP_CSRC_CORE_DTYPE_H_
#define JAX_EP_CSRC_CORE_DTYPE_H_

#include <cstdint>
#include <string_view>

namespace jax_ep {

// Element types of token rows.
enum class DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// How a row travels from its source rank to its destination rank.
enum class Wire : int32_t {
  kSame = 0,        // in the rows' own dtype
  kFloat8E4M3 = 1,  // float8_e4m3fn with one float32 scale per kScaleBlock elements
};

// The FP8 wire: elements that share one scale, of which a row's last block may have fewer; the
// largest float8_e4m3fn; and the least magnitude that a block is scaled for. A block's scale is its
// largest magnitude, at least kMinAmax, over kMaxFloat8.
inline constexpr int64_t kScaleBlock = 128;
inline constexpr float kMaxFloat8 = 448.0F;
inline constexpr float kMinAmax = 1e-4F;

constexpr int64_t size_bytes(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

constexpr std::string_view name(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return "float32";
    case DType::kBFloat16: return "bfloat16";
    case DType::kFloat16: return "float16";
  }
  return "unknown";
}

constexpr std::string_view name(Wire wire) {
  return wire == Wire::kSame ? "same" : "float8_e4m3fn";
}

}  // namespace jax_ep

#endif  // JAX_EP_CSRC_CORE_DTYPE_H_
