// SPDX-License-Identifier: Apache-2.0
// The arithmetic over the elements of rows, compiled for several instruction sets.
#ifndef JAX_EP_CSRC_CPU_ROW_ARITHMETIC_H_
#define JAX_EP_CSRC_CPU_ROW_ARITHMETIC_H_

#include <cstdint>
#include <span>
#include <string_view>

#include "csrc/core/dtype.h"

namespace jax_ep {

// A row that a token's sum takes in.
struct Term {
  const void* row;  // [H]
  float weight;
  bool ends_rank;            // the last of its destination rank
  bool ends_domain = false;  // the last of a domain, if sums are taken over domains
};

// For rows of one dtype.
struct RowArithmetic {
  // out [H] = the sum, over ranks, of the ranks' partial sums, or, where a term ends a domain, over
  // domains, of their sums over ranks; see run_combine. No terms: zeros.
  // Meanwhile the rows of `next`, of which a call will be made next, are fetched into the cache.
  void (*sum_terms)(std::span<const Term> terms,
                    std::span<const Term> next,
                    int64_t hidden,
                    void* out);
  // out [H] = weight * x [H], in float32, rounded.
  void (*scale)(const void* x, float weight, int64_t hidden, void* out);
  // The dot product of x [H] and y [H], see kDotSums.
  float (*dot)(const void* x, const void* y, int64_t hidden);
  // x [H] as it travels over the FP8 wire: float8_e4m3fn values [H], scales [ceil(H / 128)].
  void (*quantize)(const void* x, int64_t hidden, uint8_t* values, float* scales);
  // out [H] = what those stand for.
  void (*restore)(const uint8_t* values, const float* scales, int64_t hidden, void* out);
  // out [H] = what arrives of x [H] over the FP8 wire: quantized, and restored.
  void (*round_to_fp8)(const void* x, int64_t hidden, void* out);
};

// Instruction sets that the kernels were compiled for. The results' bits are the same.
enum class Isa { kBaseline, kAvx2, kAvx512 };

constexpr std::string_view name(Isa isa) {
  switch (isa) {
    case Isa::kBaseline: return "baseline";
    case Isa::kAvx2: return "avx2";
    case Isa::kAvx512: return "avx512";
  }
  return "unknown";
}

// Whether this processor can run them.
bool is_supported(Isa isa);

// Those for the best instruction set of this processor.
const RowArithmetic& row_arithmetic(DType dtype);
const RowArithmetic& row_arithmetic(DType dtype, Isa isa);

}  // namespace jax_ep

#endif  // JAX_EP_CSRC_CPU_ROW_ARITHMETIC_H_
