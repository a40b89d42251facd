// SPDX-License-Identifier: Apache-2.0
// Prefix sums and groups over the lanes of a warp. All lanes take part.
#ifndef JAX_EP_CSRC_DEVICE_WARP_SCAN_H_
#define JAX_EP_CSRC_DEVICE_WARP_SCAN_H_

#include <bit>

#include "csrc/device/primitives.h"

namespace jax_ep::dev {

// Lane l gets the sum of lanes 0 to l; `add(u32, u32)` is associative.
template <typename Add>
JAX_EP_DEVICE u32 inclusive_sum(u32 value, const Add& add) {
  const u32 lane = lane_id();
  for (u32 distance = 1; distance < kWarpSize; distance *= 2) {
    const u32 before = warp_shfl(value, lane >= distance ? lane - distance : lane);
    if (lane >= distance) value = add(before, value);
  }
  return value;
}
JAX_EP_DEVICE u32 inclusive_sum(u32 value) {
  return inclusive_sum(value, [](u32 a, u32 b) { return a + b; });
}

// Lane l gets what lane l - 1 has: of an inclusive sum, the exclusive one. Lane 0 gets 0.
JAX_EP_DEVICE u32 from_lane_before(u32 value) {
  const u32 before = warp_shfl(value, lane_id() > 0 ? lane_id() - 1 : 0);
  return lane_id() > 0 ? before : 0;
}

// The bits that it takes to write a number.
JAX_EP_DEVICE u32 num_bits(u32 number) {
#ifdef __CUDACC__
  return 32 - static_cast<u32>(__clz(static_cast<int>(number)));
#else
  return static_cast<u32>(std::bit_width(number));
#endif
}

// The lanes, as bits, whose value is this lane's; values have at most `bits` bits. A ballot per bit
// is much faster than the instruction for it (match.any), whose unit an SM's warps share.
JAX_EP_DEVICE u32 lanes_alike(u32 value, u32 bits) {
  u32 alike = ~0U;
  for (u32 bit = 0; bit < bits; ++bit) {
    const bool set = (value >> bit & 1) != 0;
    const u32 lanes = warp_ballot(set);
    alike &= set ? lanes : ~lanes;
  }
  return alike;
}

}  // namespace jax_ep::dev

#endif  // JAX_EP_CSRC_DEVICE_WARP_SCAN_H_
