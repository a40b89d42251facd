// SPDX-License-Identifier: Apache-2.0
// The FP8 wire: a warp quantizes and restores a segment of a row in place, in shared memory, or a
// row element by element. Values and scales are those of docs/guide/numerics.md.
#ifndef JAX_EP_CSRC_DEVICE_QUANTIZE_H_
#define JAX_EP_CSRC_DEVICE_QUANTIZE_H_

#include <type_traits>

#include "csrc/device/convert.h"
#include "csrc/device/heap.h"

namespace jax_ep::dev {

// The largest of `kLanes` neighboring lanes' magnitudes, given as bits; NaN if one of them is.
template <u32 kLanes>
JAX_EP_DEVICE float largest_of_lanes(u32 magnitude) {
  for (u32 distance = kLanes / 2; distance > 0; distance /= 2) {
    magnitude = larger_magnitude(magnitude, warp_shfl(magnitude, lane_id() ^ distance));
  }
  return as_float(magnitude);
}

// A segment on the FP8 wire: a byte for each element, then the scales of its blocks, filled up to a
// multiple of four.
JAX_EP_DEVICE u32 num_staged_scales(i32 num_elements) {
  return static_cast<u32>(align_up(ceil_div(num_elements, kScaleBlock), 4));
}
JAX_EP_DEVICE Ptr<float> scales_in(Ptr<u32> stage, i32 num_elements) {
  return as<float>(stage + num_elements / 4);
}

// All lanes: lane b puts down the scale of block b. Then the segment may be bulk stored by any of
// them, as may what they stored before.
JAX_EP_DEVICE void complete_segment(Ptr<u32> stage, i32 num_elements, float scale) {
  if (lane_id() < num_staged_scales(num_elements))
    st(scales_in(stage, num_elements) + lane_id(), scale);
  fence_proxy_async_shared();  // the copy engines see what the lanes wrote
  warp_sync();
}

// How many elements of a row 16 bytes hold, in the rows' own dtype.
template <typename RowType>
inline constexpr int kPerVector = 4 * RowType::kPerWord;
// What they are in FP8.
template <typename RowType>
using Fp8Vector = std::conditional_t<kPerVector<RowType> == 8, u64, u32>;

template <typename RowType>
JAX_EP_DEVICE Fp8Vector<RowType> to_fp8(const Vec16& vector, const Divider& scaled) {
  float values[kPerVector<RowType>];
  for (int w = 0; w < 4; ++w) RowType::unpack(vector.word[w], values + w * RowType::kPerWord);
  Fp8Vector<RowType> out = 0;
  for (int c = 0; c < kPerVector<RowType>; c += 2) {
    const u32 pair = to_fp8_pair(scaled(values[c]), scaled(values[c + 1]));
    out |= static_cast<Fp8Vector<RowType>>(pair) << 8 * c;
  }
  return out;
}

// Quantizes `num_elements` elements, a multiple of 16, in place. All lanes.
//
// Eight lanes share a block of elements with one scale, 16 elements each: that takes half the
// shuffles and divisions of 16 lanes with eight. A loop that is not unrolled: each rank's process
// has a copy of the code, and ranks that share a GPU share its instruction caches.
template <typename RowType>
JAX_EP_DEVICE void quantize_segment(Ptr<u32> stage, i32 num_elements) {
  constexpr u32 kLanesPerBlock = 8;
  constexpr u32 kVectorsPerBlock = kScaleBlock / kPerVector<RowType>;
  constexpr u32 kVectors = kVectorsPerBlock / kLanesPerBlock;  // of a lane
  constexpr u32 kBlocks = kWarpSize / kLanesPerBlock;          // at a time
  const u32 lane = lane_id();
  const u32 num_vectors = static_cast<u32>(num_elements) / kPerVector<RowType>;
  float scale_of_lane = 0;
  // A lane's vectors lie kLanesPerBlock apart: neighboring lanes access neighboring vectors.
  const u32 first_of_lane = lane / kLanesPerBlock * kVectorsPerBlock + lane % kLanesPerBlock;
  Vec16 ahead[kVectors];
  const auto load = [&](u32 first) {
    JAX_EP_UNROLL
    for (u32 i = 0; i < kVectors; ++i) {
      const u32 v = first + first_of_lane + i * kLanesPerBlock;
      ahead[i] = v < num_vectors ? ld(as<Vec16>(stage) + v) : Vec16{};
    }
  };
  load(0);
  JAX_EP_NO_UNROLL
  for (u32 first = 0; first < num_vectors; first += kBlocks * kVectorsPerBlock) {
    Vec16 vector[kVectors];
    u32 largest = 0;
    JAX_EP_UNROLL
    for (u32 i = 0; i < kVectors; ++i) {
      vector[i] = ahead[i];
      for (int w = 0; w < 4; ++w) largest = RowType::larger_magnitudes(vector[i].word[w], largest);
    }
    load(first + kBlocks * kVectorsPerBlock);
    warp_sync();  // what is overwritten has been read, for it does not lie behind what is read
    const float scale =
        fp8_scale(largest_of_lanes<kLanesPerBlock>(RowType::largest_magnitude(largest)));
    const float block_scale = as_float(warp_shfl(as_bits(scale), lane % kBlocks * kLanesPerBlock));
    if (lane / kBlocks == first / (kBlocks * kVectorsPerBlock)) scale_of_lane = block_scale;
    const Divider scaled(scale);
    JAX_EP_UNROLL
    for (u32 i = 0; i < kVectors; ++i) {
      const u32 v = first + first_of_lane + i * kLanesPerBlock;
      if (v < num_vectors) {
        st(as<Fp8Vector<RowType>>(stage) + v, to_fp8<RowType>(vector[i], scaled));
      }
    }
  }
  complete_segment(stage, num_elements, scale_of_lane);
}

// The inverse, in place, from the end to the beginning.
template <typename RowType>
JAX_EP_DEVICE void restore_segment(Ptr<u32> stage, i32 num_elements) {
  constexpr u32 kLanesPerBlock = kScaleBlock / kPerVector<RowType>;
  const u32 lane = lane_id();
  const u32 num_vectors = static_cast<u32>(num_elements) / kPerVector<RowType>;
  const auto load = [stage, num_vectors](u32 v) {
    return v < num_vectors ? ld(as<Fp8Vector<RowType>>(stage) + v) : 0;
  };
  const float scale_of_lane =
      lane < num_staged_scales(num_elements) ? ld(scales_in(stage, num_elements) + lane) : 0.0F;
  auto end = static_cast<u32>(align_up(num_vectors, kWarpSize));
  Fp8Vector<RowType> ahead = load(end - kWarpSize + lane);
  JAX_EP_NO_UNROLL
  for (; end > 0; end -= kWarpSize) {
    const u32 v = end - kWarpSize + lane;
    const Fp8Vector<RowType> vector = ahead;
    if (end > kWarpSize) ahead = load(v - kWarpSize);
    const float scale = as_float(warp_shfl(as_bits(scale_of_lane), v / kLanesPerBlock % kWarpSize));
    warp_sync();  // what is overwritten has been read, for it does not lie before what is read
    if (v >= num_vectors) continue;
    float values[kPerVector<RowType>];
    for (int c = 0; c < kPerVector<RowType>; c += 2) {
      from_fp8_pair(static_cast<u32>(vector >> 8 * c) & 0xFFFF, values + c);
    }
    for (float& value : values) value *= scale;
    Vec16 out;
    for (int w = 0; w < 4; ++w) out.word[w] = RowType::pack(values + w * RowType::kPerWord);
    st(as<Vec16>(stage) + v, out);
  }
  fence_proxy_async_shared();
  warp_sync();
}

// Block `block` of a row of any size, element by element: lane l holds elements l, l + 32, ...
template <typename RowType>
struct BlockOfElements {
  static constexpr int kPerLane = kScaleBlock / kWarpSize;
  float value[kPerLane];
  float scale;

  JAX_EP_DEVICE static i64 element(i64 block, int i) {
    return block * kScaleBlock + i * i64{kWarpSize} + lane_id();
  }
  // All lanes.
  JAX_EP_DEVICE BlockOfElements(Ptr<const typename RowType::Element> row, i64 block, i64 hidden) {
    u32 largest = 0;
    for (int i = 0; i < kPerLane; ++i) {
      const i64 c = element(block, i);
      value[i] = c < hidden ? RowType::to_float(ld(row + c)) : 0.0F;
      largest = larger_magnitude(as_bits(value[i]) & 0x7FFF'FFFF, largest);
    }
    scale = fp8_scale(largest_of_lanes<kWarpSize>(largest));
  }
};

}  // namespace jax_ep::dev

#endif  // JAX_EP_CSRC_DEVICE_QUANTIZE_H_
