// SPDX-License-Identifier: Apache-2.0
// A warp sums rows: acc = fma(weight, row, acc) in float32, in the order of the terms, starting
// from 0, rounded once.
#ifndef JAX_EP_CSRC_DEVICE_ROW_SUM_H_
#define JAX_EP_CSRC_DEVICE_ROW_SUM_H_

#include "csrc/device/convert.h"
#include "csrc/device/heap.h"

namespace jax_ep::dev {

// The terms of a sum, in shared memory, one list per warp.
struct SumTerms {
  Shared<i32> row[kMaxTopk];  // what `row_of` of sum_rows takes
  Shared<float> weight[kMaxTopk];
};

// What a sum's elements are moved by: `kVectors` times 16 bytes in flight per lane and row, or with
// 0 one element at a time.
template <typename RowType, int kVectors>
inline constexpr int kElementsPerMove = kVectors == 0 ? 1 : 4 * RowType::kPerWord;

// Writes moves [first, last) of the sum of `count` terms' rows. `row_of(i32)` is the address of a
// row. All lanes.
template <typename RowType, int kVectors, typename RowOf>
JAX_EP_DEVICE void sum_rows(
    SumTerms& terms, i32 count, i64 first, i64 last, const RowOf& row_of, Ptr<std::byte> out) {
  using Element = typename RowType::Element;
  if constexpr (kVectors == 0) {
    for (i64 c = first + lane_id(); c < last; c += kWarpSize) {
      float sum = 0;
      for (i32 i = 0; i < count; ++i) {
        const Ptr<const std::byte> row = row_of(terms.row[i]);
        const float value = RowType::to_float(ld(as<const Element>(row) + c));
        sum = fused_multiply_add(terms.weight[i], value, sum);
      }
      st(as<Element>(out) + c, RowType::from_float(sum));
    }
  } else {
    constexpr int kPerVector = kElementsPerMove<RowType, kVectors>;
    for (i64 base = first + lane_id(); base < last; base += i64{kWarpSize} * kVectors) {
      float sum[kVectors][kPerVector] = {};
      for (i32 i = 0; i < count; ++i) {
        const Ptr<const std::byte> row = row_of(terms.row[i]);
        const float weight = terms.weight[i];
        Vec16 value[kVectors];
        JAX_EP_UNROLL
        for (int v = 0; v < kVectors; ++v) {
          const i64 at = base + v * i64{kWarpSize};
          value[v] = at < last ? ld(as<const Vec16>(row) + at) : Vec16{};
        }
        JAX_EP_UNROLL
        for (int v = 0; v < kVectors; ++v) {
          float values[kPerVector];
          for (int w = 0; w < 4; ++w)
            RowType::unpack(value[v].word[w], values + w * RowType::kPerWord);
          for (int c = 0; c < kPerVector; ++c) {
            sum[v][c] = fused_multiply_add(weight, values[c], sum[v][c]);
          }
        }
      }
      JAX_EP_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        const i64 at = base + v * i64{kWarpSize};
        Vec16 result;
        for (int w = 0; w < 4; ++w) result.word[w] = RowType::pack(sum[v] + w * RowType::kPerWord);
        if (at < last) st(as<Vec16>(out) + at, result);
      }
    }
  }
}

}  // namespace jax_ep::dev

#endif  // JAX_EP_CSRC_DEVICE_ROW_SUM_H_
