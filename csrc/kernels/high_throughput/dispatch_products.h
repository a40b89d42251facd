// SPDX-License-Identifier: Apache-2.0
// The products of the backward of a weighted combine: where a row arrives, it is multiplied by the
// row's weight, and its dot product with the same row of y is taken. So y is read once, and the row
// is written once.
//
// Of each 256 elements a lane has eight neighboring ones, in all dtypes: those of eight of the sums
// that define a dot product (kDotSums).
#ifndef JAX_EP_CSRC_KERNELS_HIGH_THROUGHPUT_DISPATCH_PRODUCTS_H_
#define JAX_EP_CSRC_KERNELS_HIGH_THROUGHPUT_DISPATCH_PRODUCTS_H_

#include "csrc/device/convert.h"
#include "csrc/kernels/high_throughput/dispatch_context.h"

namespace jax_ep::dev {

template <typename Config, typename RowType>
class RowProducts {
 public:
  using Element = typename RowType::Element;

  JAX_EP_DEVICE explicit RowProducts(const DispatchContext<Config, RowType>& context)
      : c_(context) {}

  // Brings y's rows for a token, one of each lane, into the L2 cache.
  JAX_EP_DEVICE void prefetch(i32 row) const {
    if (!c_.with_dots() || row < 0) return;
    bulk_prefetch(as<const std::byte>(y_row(row)),
                  static_cast<u32>(c_.hidden * static_cast<i64>(sizeof(Element))));
  }

  // All lanes, segment after segment of a token: multiplies the one in `stage`, for each row that
  // holds the token. Where rows are multiplied by weights, it also writes them.
  JAX_EP_DEVICE void take_segment(i32 row, i32 segment, Ptr<u32> stage) {
    const i64 first = c_.segments.first(segment);
    if (segment == 0) dot_ = 0.0F;
    for (u32 holders = warp_ballot(row >= 0); holders != 0; holders &= holders - 1) {
      const u32 lane = lowest_bit(holders);
      const auto to = static_cast<i32>(warp_shfl(static_cast<u32>(row), lane));
      const float dot = multiply_segment(as<const Vec16>(stage),
                                         as<const Vec16>(y_row(to) + first),
                                         as<Vec16>(out_row(to) + first),
                                         c_.segments.size(segment, c_.hidden) / kPerVector,
                                         weight_of(to),
                                         dot_);
      if (lane_id() == lane) dot_ = dot;
    }
    if (c_.with_dots() && row >= 0 && segment + 1 == c_.segments.count) write_dot(row, dot_);
  }

  // All lanes: the same of a whole row, of any number of elements.
  JAX_EP_DEVICE void take_elements(i32 row, Ptr<const Element> from) const {
    for (u32 holders = warp_ballot(row >= 0); holders != 0; holders &= holders - 1) {
      const auto to = static_cast<i32>(warp_shfl(static_cast<u32>(row), lowest_bit(holders)));
      float dot = 0.0F;
      for (i64 block = 0; block < c_.hidden; block += kDotBlock) {
        dot += multiply_elements(from, to, block);
      }
      if (c_.with_dots() && lane_id() == 0) write_dot(to, dot);
    }
  }

 private:
  static constexpr i32 kPerLane = static_cast<i32>(kDotSums) / static_cast<i32>(kWarpSize);
  static constexpr i32 kPerVector = 4 * RowType::kPerWord;
  static constexpr i32 kVectors = kPerLane / kPerVector;  // of a lane, neighbors
  static constexpr i32 kSteps = static_cast<i32>(kDotBlock / kDotSums);
  static constexpr i32 kBlockVectors = static_cast<i32>(kDotBlock) / kPerVector;
  static_assert(kPerLane == 8, "sums are added three times in a lane");

  JAX_EP_DEVICE Ptr<const Element> y_row(i64 row) const {
    return Ptr<const Element>{static_cast<const Element*>(c_.op.y)} + row * c_.hidden;
  }
  JAX_EP_DEVICE Ptr<Element> out_row(i64 row) const { return as<Element>(c_.out_row(row)); }
  JAX_EP_DEVICE float weight_of(i64 row) const {
    return c_.weighted() ? ld(Ptr<const float>{c_.op.row_weights} + row) : 1.0F;
  }
  JAX_EP_DEVICE void write_dot(i64 row, float dot) const {
    st(Ptr<float>{c_.op.row_dots} + row, dot);
  }

  // Adds neighbors until one sum is left, which all lanes get.
  JAX_EP_DEVICE static float add_neighbors(const float (&sums)[kPerLane]) {
    float sum =
        ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
    for (u32 distance = 1; distance < kWarpSize; distance *= 2) {
      sum += as_float(warp_shfl(as_bits(sum), lane_id() ^ distance));
    }
    return sum;
  }

  // Returns the dot product with what is added to it.
  JAX_EP_DEVICE float multiply_segment(Ptr<const Vec16> from,
                                       Ptr<const Vec16> y,
                                       Ptr<Vec16> out,
                                       i32 num_vectors,
                                       float weight,
                                       float dot) const {
    JAX_EP_NO_UNROLL
    for (i32 first = 0; first < num_vectors; first += kBlockVectors) {
      dot += multiply_block(from + first, y + first, out + first, num_vectors - first, weight);
    }
    return dot;
  }

  // Of a lane's vectors in a block, the i-th.
  JAX_EP_DEVICE static i32 vector_of(i32 i) {
    return i / kVectors * (static_cast<i32>(kDotSums) / kPerVector) +
           static_cast<i32>(lane_id()) * kVectors + i % kVectors;
  }

  // Returns the block's dot product; 0 if none is taken.
  JAX_EP_DEVICE float multiply_block(Ptr<const Vec16> from,
                                     Ptr<const Vec16> y,
                                     Ptr<Vec16> out,
                                     i32 num_vectors,
                                     float weight) const {
    constexpr i32 kLoads = kSteps * kVectors;
    constexpr i32 kAtOnce = 4;  // as many as registers allow: they come from memory
    static_assert(kLoads % kAtOnce == 0 && kAtOnce % kVectors == 0);
    float sums[kPerLane] = {};
    JAX_EP_NO_UNROLL
    for (i32 first = 0; first < kLoads; first += kAtOnce) {
      Vec16 factors[kAtOnce] = {};
      JAX_EP_UNROLL
      for (i32 i = 0; i < kAtOnce; ++i) {
        const i32 at = vector_of(first + i);
        if (c_.with_dots() && at < num_vectors) factors[i] = ld(y + at);
      }
      JAX_EP_UNROLL
      for (i32 i = 0; i < kAtOnce; ++i) {
        const i32 at = vector_of(first + i);
        if (at >= num_vectors) continue;
        float values[kPerVector];
        unpack(ld(from + at), values);
        if (c_.with_dots()) add_products(values, factors[i], sums + i % kVectors * kPerVector);
        if (c_.weighted()) st(out + at, scaled(values, weight));
      }
    }
    return c_.with_dots() ? add_neighbors(sums) : 0.0F;
  }

  JAX_EP_DEVICE static void add_products(const float (&values)[kPerVector],
                                         const Vec16& others,
                                         float* sums) {
    float factors[kPerVector];
    unpack(others, factors);
    for (i32 c = 0; c < kPerVector; ++c) {
      sums[c] = fused_multiply_add(values[c], factors[c], sums[c]);
    }
  }
  JAX_EP_DEVICE static void unpack(const Vec16& vector, float (&values)[kPerVector]) {
    for (int w = 0; w < 4; ++w) RowType::unpack(vector.word[w], values + w * RowType::kPerWord);
  }
  JAX_EP_DEVICE static Vec16 scaled(const float (&values)[kPerVector], float weight) {
    float products[kPerVector];
    for (i32 c = 0; c < kPerVector; ++c) products[c] = weight * values[c];
    Vec16 vector;
    for (int w = 0; w < 4; ++w) vector.word[w] = RowType::pack(products + w * RowType::kPerWord);
    return vector;
  }

  JAX_EP_DEVICE float multiply_elements(Ptr<const Element> from, i64 row, i64 block) const {
    const float weight = weight_of(row);
    float sums[kPerLane] = {};
    JAX_EP_NO_UNROLL
    for (i32 step = 0; step < kSteps; ++step) {
      for (i32 c = 0; c < kPerLane; ++c) {
        const i64 h = block + step * kDotSums + lane_id() * kPerLane + c;
        if (h >= c_.hidden) continue;
        const float value = RowType::to_float(ld(from + h));
        if (c_.with_dots()) {
          sums[c] = fused_multiply_add(value, RowType::to_float(ld(y_row(row) + h)), sums[c]);
        }
        if (c_.weighted()) st(out_row(row) + h, RowType::from_float(weight * value));
      }
    }
    return c_.with_dots() ? add_neighbors(sums) : 0.0F;
  }

  const DispatchContext<Config, RowType>& c_;
  float dot_ = 0.0F;  // of this lane's row, as far as its segments have come
};

}  // namespace jax_ep::dev

#endif  // JAX_EP_CSRC_KERNELS_HIGH_THROUGHPUT_DISPATCH_PRODUCTS_H_
