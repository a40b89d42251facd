// SPDX-License-Identifier: Apache-2.0
// The FP8 wire: a warp quantizes and restores a segment of a row in place, in shared memory, or a
// row element by element. Values and scales are those of docs/numerics.md.
#ifndef JAX_EP_CSRC_DEVICE_QUANTIZE_H_
#define JAX_EP_CSRC_DEVICE_QUANTIZE_H_

#include "csrc/device/convert.h"
#include "csrc/device/segment_ring.h"

namespace jax_ep::dev {

// The largest of `kLanes` neighboring lanes' magnitudes, given as bits; NaN if one of them is.
template <u32 kLanes>
JAX_EP_DEVICE float largest_of_lanes(u32 magnitude) {
  for (u32 distance = kLanes / 2; distance > 0; distance /= 2) {
    magnitude = larger_magnitude(magnitude, warp_shfl(magnitude, lane_id() ^ distance));
  }
  return as_float(magnitude);
}

// Quantizes `channels` elements, a multiple of 16, in place. Lane b gets the scale of block b of
// the segment. All lanes; the result may be bulk stored by any of them.
template <typename Rows, typename Stages>
JAX_EP_DEVICE float quantize_segment(Ptr<u32> stage, i32 channels) {
  constexpr int kVectors = Stages::kSegmentBytes / 16 / 32;
  constexpr int kPerVector = 4 * Rows::kPerWord;
  constexpr u32 kLanesPerBlock = kScaleBlock / kPerVector;
  constexpr u32 kBlocksPerVector = kWarpSize / kLanesPerBlock;
  const u32 lane = lane_id();
  const i32 num_vectors = channels / kPerVector;
  Vec16 held[kVectors];
  for (int i = 0; i < kVectors; ++i) {
    const i32 v = static_cast<i32>(lane) + 32 * i;
    held[i] = v < num_vectors ? ld(as<Vec16>(stage) + v) : Vec16{};
  }
  warp_sync();  // everybody has read before anybody writes
  float scale_of_lane = 0;
  for (int i = 0; i < kVectors; ++i) {
    u32 largest = 0;
    for (int w = 0; w < 4; ++w) largest = Rows::larger_magnitudes(held[i].word[w], largest);
    const float scale =
        fp8_scale(largest_of_lanes<kLanesPerBlock>(Rows::largest_magnitude(largest)));
    const u32 block_lane = lane % kBlocksPerVector * kLanesPerBlock;
    const float block_scale = as_float(warp_shfl(as_bits(scale), block_lane));
    if (lane / kBlocksPerVector == static_cast<u32>(i)) scale_of_lane = block_scale;
    const i32 v = static_cast<i32>(lane) + 32 * i;
    if (v >= num_vectors) continue;
    float values[kPerVector];
    for (int w = 0; w < 4; ++w) Rows::unpack(held[i].word[w], values + w * Rows::kPerWord);
    const Divider scaled(scale);
    for (int w = 0; w < Rows::kPerWord; ++w) {
      const float* const four = values + 4 * w;
      const u32 low = to_fp8_pair(scaled(four[0]), scaled(four[1]));
      const u32 high = to_fp8_pair(scaled(four[2]), scaled(four[3]));
      st(stage + (v * Rows::kPerWord + w), low | high << 16);
    }
  }
  fence_proxy_async();  // the copy engines see what the lanes wrote
  warp_sync();
  return scale_of_lane;
}

// The inverse, in place. The stage also holds the scales of the segment's blocks.
template <typename Rows, typename Stages>
JAX_EP_DEVICE void restore_segment(Ptr<u32> stage, i32 channels) {
  const Ptr<u32> scales = stage + Stages::kScalesAt;
  constexpr int kChannels = Stages::kSegmentBytes / 4 * Rows::kPerWord;
  constexpr int kVectors = (kChannels / 16 + 31) / 32;
  const i32 num_vectors = channels / 16;
  Vec16 held[kVectors];
  float scale[kVectors] = {};
  for (int i = 0; i < kVectors; ++i) {
    const i32 v = static_cast<i32>(lane_id()) + 32 * i;
    if (v >= num_vectors) continue;
    held[i] = ld(as<Vec16>(stage) + v);
    scale[i] = as_float(ld(scales + v * 16 / kScaleBlock));
  }
  warp_sync();
  for (int i = 0; i < kVectors; ++i) {
    const i32 v = static_cast<i32>(lane_id()) + 32 * i;
    if (v >= num_vectors) continue;
    float values[16];
    for (int pair = 0; pair < 8; ++pair) {
      from_fp8_pair(held[i].word[pair / 2] >> pair % 2 * 16 & 0xFFFF, values + 2 * pair);
    }
    for (float& value : values) value *= scale[i];
    for (int part = 0; part < 4 / Rows::kPerWord; ++part) {
      Vec16 out;
      for (int w = 0; w < 4; ++w) {
        out.word[w] = Rows::pack(values + (part * 4 + w) * Rows::kPerWord);
      }
      st(as<Vec16>(stage) + (v * (4 / Rows::kPerWord) + part), out);
    }
  }
  fence_proxy_async();
  warp_sync();
}

// Block `block` of a row of any size, element by element: lane l holds channels l, l + 32, ...
template <typename Rows>
struct BlockOfElements {
  static constexpr int kPerLane = kScaleBlock / kWarpSize;
  float value[kPerLane];
  float scale;

  JAX_EP_DEVICE static i64 channel(i64 block, int i) {
    return block * kScaleBlock + i * i64{kWarpSize} + lane_id();
  }
  // All lanes.
  JAX_EP_DEVICE BlockOfElements(Ptr<const typename Rows::Element> row, i64 block, i64 hidden) {
    u32 largest = 0;
    for (int i = 0; i < kPerLane; ++i) {
      const i64 c = channel(block, i);
      value[i] = c < hidden ? Rows::to_float(ld(row + c)) : 0.0F;
      largest = larger_magnitude(as_bits(value[i]) & 0x7FFF'FFFF, largest);
    }
    scale = fp8_scale(largest_of_lanes<kWarpSize>(largest));
  }
};

}  // namespace jax_ep::dev

#endif  // JAX_EP_CSRC_DEVICE_QUANTIZE_H_
