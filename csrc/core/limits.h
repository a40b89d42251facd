// SPDX-License-Identifier: Apache-2.0
// The largest sizes that are supported, and arithmetic on sizes.
#ifndef JAX_EP_CSRC_CORE_LIMITS_H_
#define JAX_EP_CSRC_CORE_LIMITS_H_

#include <cstdint>

namespace jax_ep {

// Ranks of a group, of all its domains, and the largest sizes that the kernels are written for.
inline constexpr int32_t kMaxRanks = 64;
inline constexpr int32_t kMaxTopk = 32;  // a warp's lanes hold the selections of a token
inline constexpr int32_t kMaxExperts = 4096;
inline constexpr int64_t kMaxTokens = int64_t{1} << 20;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t align_up(int64_t value, int64_t alignment) {
  return ceil_div(value, alignment) * alignment;
}

}  // namespace jax_ep

#endif  // JAX_EP_CSRC_CORE_LIMITS_H_
