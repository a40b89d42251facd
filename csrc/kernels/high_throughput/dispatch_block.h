// SPDX-License-Identifier: Apache-2.0
#ifndef JAX_EP_CSRC_KERNELS_HIGH_THROUGHPUT_DISPATCH_BLOCK_H_
#define JAX_EP_CSRC_KERNELS_HIGH_THROUGHPUT_DISPATCH_BLOCK_H_

#include "csrc/core/dtype.h"
#include "csrc/core/ops.h"
#include "csrc/device/segment_ring.h"

namespace jax_ep::dev {

// A dispatch's block: its warps, and the stages of each in shared memory. kMakesProducts: the
// kernel is that of the backward of a weighted combine.
template <int kWarpCount, int kStageCount, int kSegmentBytes, bool kMakesProducts = false>
struct DispatchConfig {
  static constexpr int kWarps = kWarpCount;
  static constexpr bool kProducts = kMakesProducts;
  static constexpr int kStages = kStageCount;
  using Stages = SegmentStages<kStages, kSegmentBytes>;
  static_assert(kSegmentBytes % (4 * kScaleBlock * 4) == 0);  // four blocks of float32
  static_assert(!kProducts || kSegmentBytes % (kDotBlock * 4) == 0);

  struct SharedStorage {
    Stages stages[kWarps];
  };
};

}  // namespace jax_ep::dev

#endif  // JAX_EP_CSRC_KERNELS_HIGH_THROUGHPUT_DISPATCH_BLOCK_H_
