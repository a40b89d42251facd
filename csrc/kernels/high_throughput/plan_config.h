// SPDX-License-Identifier: Apache-2.0
#ifndef JAX_EP_CSRC_KERNELS_HIGH_THROUGHPUT_PLAN_CONFIG_H_
#define JAX_EP_CSRC_KERNELS_HIGH_THROUGHPUT_PLAN_CONFIG_H_

#include "csrc/device/primitives.h"

namespace jax_ep::dev {

// A plan's block: its warps, and the tables of counts that fill its shared memory.
template <int kWarpCount, int kBinCount>
struct PlanConfig {
  static constexpr int kWarps = kWarpCount;
  static constexpr int kStages = 0;
  static constexpr int kMaxBins = kBinCount;

  struct SharedStorage {
    // Per warp and bin: the selections counted so far, or the next row.
    Shared<u32> cursor[kWarps][kMaxBins];
    // First row of every expert at its rank, clipped to the capacity.
    Shared<u32> start[kMaxBins];
  };
};

}  // namespace jax_ep::dev

#endif  // JAX_EP_CSRC_KERNELS_HIGH_THROUGHPUT_PLAN_CONFIG_H_
