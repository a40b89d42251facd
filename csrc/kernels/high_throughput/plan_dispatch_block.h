// SPDX-License-Identifier: Apache-2.0
#ifndef JAX_EP_CSRC_KERNELS_HIGH_THROUGHPUT_PLAN_DISPATCH_BLOCK_H_
#define JAX_EP_CSRC_KERNELS_HIGH_THROUGHPUT_PLAN_DISPATCH_BLOCK_H_

#include "csrc/kernels/high_throughput/dispatch_block.h"
#include "csrc/kernels/high_throughput/plan_block.h"

namespace jax_ep::dev {

// A plan in a dispatch's block, made by the warps that do not send. Their tables lie in their own
// stages, which they need only when the plan is made: a warp's cursors in the first half of its
// stages, and the block's starts in the second half of the first of these warps'.
template <typename DispatchConfig>
struct PlanInDispatchConfig {
  using Warps = LastWarps<DispatchConfig::kWarps>;
  static constexpr int kWordsPerStage = DispatchConfig::Stages::kSegmentBytes / 4;
  static constexpr int kMaxBins = DispatchConfig::kStages * kWordsPerStage / 2;

  class Tables : public CountsInHeap {
   public:
    JAX_EP_DEVICE explicit Tables(const Warps& warps)
        : cursors_(words_of(warp_id())), starts_(words_of(warps.first()) + kMaxBins) {}

    JAX_EP_DEVICE Shared<u32>& cursor(i32 bin) const { return cursors_[bin]; }
    JAX_EP_DEVICE Shared<u32>& start(i32 expert) const { return starts_[expert]; }

   private:
    JAX_EP_DEVICE static Shared<u32>* words_of(u32 warp) {
      return &shared<typename DispatchConfig::SharedStorage>().stages[warp].stage[0][0];
    }

    Shared<u32>* const cursors_;
    Shared<u32>* const starts_;
  };
};

}  // namespace jax_ep::dev

#endif  // JAX_EP_CSRC_KERNELS_HIGH_THROUGHPUT_PLAN_DISPATCH_BLOCK_H_
