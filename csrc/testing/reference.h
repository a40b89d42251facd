// SPDX-License-Identifier: Apache-2.0
// The definitions of the operations, written for reading and not for speed, in double and
// without the library's code: what the tests hold the library against.
#ifndef JAX_EP_CSRC_TESTING_REFERENCE_H_
#define JAX_EP_CSRC_TESTING_REFERENCE_H_

#include <cstdint>
#include <vector>

#include "csrc/core/dtype.h"
#include "csrc/core/ep_shape.h"

namespace jax_ep::reference {

// A binary floating-point format of at most 32 bits.
struct Format {
  int exponent_bits;
  int mantissa_bits;
  bool has_infinity;  // else only the largest code is special: NaN

  [[nodiscard]] int bias() const { return (1 << (exponent_bits - 1)) - 1; }
  [[nodiscard]] double max_finite() const;
};

inline constexpr Format kFloat32{8, 23, true};
inline constexpr Format kBFloat16{8, 7, true};
inline constexpr Format kFloat16{5, 10, true};
inline constexpr Format kFloat8E4M3{4, 3, false};

Format format_of(DType dtype);

// The value of a code.
double decode(const Format& format, uint32_t code);
// The format's value nearest to `value`, ties to the even code; past the range infinity or NaN.
double round_to(const Format& format, double value);
// a * b + c of float32 values, rounded once, to float32.
float fused_multiply_add(float a, float b, float c);

// One matrix per rank: [rank][row * columns + column].
template <typename T>
using PerRank = std::vector<std::vector<T>>;

struct Plan {
  PerRank<int32_t> slot;
  PerRank<int32_t> row_source;
  PerRank<int32_t> row_topk_idx;
  PerRank<int32_t> group_sizes;
  PerRank<int32_t> tokens_per_expert;
  std::vector<int32_t> num_dropped;
};

Plan plan(const EpShape& shape, const PerRank<int32_t>& topk_idx);

// A row on the FP8 wire: codes of float8_e4m3fn, and a scale for each 128 of them.
struct QuantizedRow {
  std::vector<uint8_t> values;
  std::vector<float> scales;
};

QuantizedRow fp8_quantize(const std::vector<float>& x);
std::vector<float> fp8_restore(const QuantizedRow& row, DType dtype);
// What a row of float32 values becomes over the FP8 wire and back in `dtype`.
std::vector<float> fp8_wire(const std::vector<float>& x, DType dtype);

// Rows at their destinations, those without a token NaN so that nobody compares them unawares.
PerRank<float> dispatch_rows(const EpShape& shape,
                             const PerRank<int32_t>& topk_idx,
                             const Plan& plan,
                             const PerRank<float>& x,
                             int64_t hidden);
// What a dispatch makes of rows and weights of one rank, rows first: `weight * row`, rounded.
std::vector<float> scale_rows(const std::vector<float>& rows,
                              const std::vector<float>& row_weights,
                              int64_t hidden,
                              DType dtype);
// The dot products of the rows of one rank with those of `y`, see kDotSums in csrc/core/ops.h; 0
// where `row_source` says that there is no token.
std::vector<float> row_dots(const std::vector<float>& rows,
                            const std::vector<float>& y,
                            const std::vector<int32_t>& row_source,
                            int64_t hidden);
PerRank<float> dispatch_scalars(const EpShape& shape,
                                const PerRank<int32_t>& topk_idx,
                                const Plan& plan,
                                const PerRank<float>& token_scalars);
// `weights` is empty for none.
PerRank<float> combine_rows(const EpShape& shape,
                            const PerRank<int32_t>& topk_idx,
                            const Plan& plan,
                            const PerRank<float>& y,
                            const PerRank<float>& weights,
                            int64_t hidden,
                            DType dtype,
                            int32_t domain_size = 0);
PerRank<float> combine_scalars(const EpShape& shape,
                               const PerRank<int32_t>& topk_idx,
                               const Plan& plan,
                               const PerRank<float>& row_scalars);

}  // namespace jax_ep::reference

#endif  // JAX_EP_CSRC_TESTING_REFERENCE_H_
