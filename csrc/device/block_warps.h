// SPDX-License-Identifier: Apache-2.0
// Warps of a block that do something together, and meet at a barrier: all of them, or some while
// the others do something else.
#ifndef JAX_EP_CSRC_DEVICE_BLOCK_WARPS_H_
#define JAX_EP_CSRC_DEVICE_BLOCK_WARPS_H_

#include "csrc/device/primitives.h"

namespace jax_ep::dev {

// All warps of a block that has so many.
template <int kWarpCount>
class AllWarps {
 public:
  JAX_EP_DEVICE u32 count() const { return kWarpCount; }
  // Among them: this warp, this thread.
  JAX_EP_DEVICE u32 warp() const { return warp_id(); }
  JAX_EP_DEVICE u32 thread() const { return thread_id(); }
  JAX_EP_DEVICE void sync() const { block_sync(); }
};

// Those of such a block from `first` on: at least one.
template <int kWarpCount>
class LastWarps {
 public:
  JAX_EP_DEVICE explicit LastWarps(u32 first) : first_(first) {}

  JAX_EP_DEVICE u32 first() const { return first_; }
  JAX_EP_DEVICE u32 count() const { return kWarpCount - first_; }
  JAX_EP_DEVICE u32 warp() const { return warp_id() - first_; }
  JAX_EP_DEVICE u32 thread() const { return thread_id() - first_ * kWarpSize; }
  JAX_EP_DEVICE void sync() const { named_sync(kBarrier, count() * kWarpSize); }

 private:
  static constexpr u32 kBarrier = 1;

  const u32 first_;
};

}  // namespace jax_ep::dev

#endif  // JAX_EP_CSRC_DEVICE_BLOCK_WARPS_H_
