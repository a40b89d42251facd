// SPDX-License-Identifier: Apache-2.0
#ifndef JAX_EP_CSRC_KERNELS_LOW_LATENCY_DISPATCH_BLOCK_H_
#define JAX_EP_CSRC_KERNELS_LOW_LATENCY_DISPATCH_BLOCK_H_

#include "csrc/core/low_latency_protocol.h"
#include "csrc/device/block_warps.h"
#include "csrc/device/heap.h"

namespace jax_ep::dev {

// A low-latency dispatch's block. Its warps send, then they count the routing, then they expand
// rows: each has stages for rows, in which its counts lie while it has no rows there.
template <int kWarpCount>
struct LowLatencyDispatchConfig {
  static constexpr int kWarps = kWarpCount;
  static constexpr int kStages = 2;
  static constexpr int kSegmentBytes = kLowLatencyDispatchSegmentBytes;
  static constexpr int kStageWords = kSegmentBytes / 4;
  using Warps = AllWarps<kWarps>;
  static_assert(kStages * kStageWords >= kMaxLowLatencyBins);

  struct SharedStorage {
    alignas(128) Shared<u32> stage[kWarps][kStages][kStageWords];
    // Of the block: by expert its first row at its rank, clipped to the capacity; by bin the
    // selections; by source the rows of this rank that hold tokens of earlier sources.
    Shared<u32> start[kMaxLowLatencyBins];
    Shared<u32> total[kMaxLowLatencyBins];
    Shared<u32> total_before[kMaxRanks];
    Shared<i32> expert[kMaxLowLatencySelections];       // of all ranks; -1: none
    Shared<u32> source_slot[kMaxLowLatencySelections];  // as in PlanOp
  };

  // What a warp sees of a plan's tables.
  class Tables {
   public:
    JAX_EP_DEVICE explicit Tables(const Warps& /*warps*/) : memory_(shared<SharedStorage>()) {}

    // Of a warp, by bin: the selections counted so far, or the next row.
    JAX_EP_DEVICE Shared<u32>& cursor(u32 warp, i32 bin) const {
      return (&memory_.stage[warp][0][0])[bin];
    }
    JAX_EP_DEVICE Shared<u32>& cursor(i32 bin) const { return cursor(warp_id(), bin); }
    JAX_EP_DEVICE Shared<i32>& expert(i32 selection) const { return memory_.expert[selection]; }
    JAX_EP_DEVICE Shared<u32>& start(i32 expert) const { return memory_.start[expert]; }
    JAX_EP_DEVICE Ptr<u32> totals(const RankView& /*view*/) const {
      return address_of(memory_.total[0]);
    }
    JAX_EP_DEVICE Shared<u32>& total_before(i32 source) const {
      return memory_.total_before[source];
    }
    template <typename Context>
    JAX_EP_DEVICE u32 total_before(const Context& /*c*/, i32 /*bin*/, i32 source) const {
      return total_before(source);
    }
    JAX_EP_DEVICE Ptr<i32> source_slot() const {
      return as<i32>(address_of(memory_.source_slot[0]));
    }

   private:
    SharedStorage& memory_;
  };
};

}  // namespace jax_ep::dev

#endif  // JAX_EP_CSRC_KERNELS_LOW_LATENCY_DISPATCH_BLOCK_H_
