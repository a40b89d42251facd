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

// Writes the sum of `count` terms' rows of `hidden` elements. `row_of(i32)` is the address of a
// row. With `kVectors` > 0 rows are moved 16 bytes at a time, that many in flight per lane and
// row; with 0, element by element. All lanes.
template <typename Rows, int kVectors, typename RowOf>
JAX_EP_DEVICE void sum_rows(
    SumTerms& terms, i32 count, i64 hidden, const RowOf& row_of, Ptr<std::byte> out) {
  using Element = typename Rows::Element;
  if constexpr (kVectors == 0) {
    for (i64 c = lane_id(); c < hidden; c += kWarpSize) {
      float sum = 0;
      for (i32 i = 0; i < count; ++i) {
        const Ptr<const std::byte> row = row_of(terms.row[i]);
        const float value = Rows::to_float(ld(as<const Element>(row) + c));
        sum = fused_multiply_add(terms.weight[i], value, sum);
      }
      st(as<Element>(out) + c, Rows::from_float(sum));
    }
  } else {
    constexpr int kPerVector = 4 * Rows::kPerWord;
    const i64 num_vectors = hidden / kPerVector;
    for (i64 first = lane_id(); first < num_vectors; first += i64{kWarpSize} * kVectors) {
      float sum[kVectors][kPerVector] = {};
      for (i32 i = 0; i < count; ++i) {
        const Ptr<const std::byte> row = row_of(terms.row[i]);
        const float weight = terms.weight[i];
        Vec16 value[kVectors];
        JAX_EP_UNROLL
        for (int v = 0; v < kVectors; ++v) {
          const i64 at = first + v * i64{kWarpSize};
          value[v] = at < num_vectors ? ld(as<const Vec16>(row) + at) : Vec16{};
        }
        JAX_EP_UNROLL
        for (int v = 0; v < kVectors; ++v) {
          float values[kPerVector];
          for (int w = 0; w < 4; ++w) Rows::unpack(value[v].word[w], values + w * Rows::kPerWord);
          for (int c = 0; c < kPerVector; ++c) {
            sum[v][c] = fused_multiply_add(weight, values[c], sum[v][c]);
          }
        }
      }
      JAX_EP_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        const i64 at = first + v * i64{kWarpSize};
        Vec16 result;
        for (int w = 0; w < 4; ++w) result.word[w] = Rows::pack(sum[v] + w * Rows::kPerWord);
        if (at < num_vectors) st(as<Vec16>(out) + at, result);
      }
    }
  }
}

}  // namespace jax_ep::dev

#endif  // JAX_EP_CSRC_DEVICE_ROW_SUM_H_
