// SPDX-License-Identifier: Apache-2.0
#ifndef JAX_EP_CSRC_KERNELS_HIGH_THROUGHPUT_PLAN_BLOCK_H_
#define JAX_EP_CSRC_KERNELS_HIGH_THROUGHPUT_PLAN_BLOCK_H_

#include "csrc/device/block_warps.h"
#include "csrc/device/heap.h"

namespace jax_ep::dev {

// Counts that all blocks make together lie in the heap.
class CountsInHeap {
 public:
  JAX_EP_DEVICE static Ptr<u32> totals(const RankView& view) {
    return region<u32>(view, view.rank, Region::kTotals);
  }
  // Selections of a bin by the tokens of the sources before one.
  template <typename Context>
  JAX_EP_DEVICE static u32 total_before(const Context& c, i32 bin, i32 source) {
    return ld(c.count_of(bin, source * c.tiles));
  }
};

// A plan's block: its warps, and the tables of counts that fill its shared memory.
template <int kWarpCount, int kBinCount>
struct PlanConfig {
  static constexpr int kWarps = kWarpCount;
  static constexpr int kStages = 0;
  static constexpr int kMaxBins = kBinCount;
  using Warps = AllWarps<kWarps>;

  struct SharedStorage {
    Shared<u32> cursor[kWarps][kMaxBins];
    Shared<u32> start[kMaxBins];
  };

  // What a warp sees of them.
  class Tables : public CountsInHeap {
   public:
    JAX_EP_DEVICE explicit Tables(const Warps& /*warps*/) : memory_(shared<SharedStorage>()) {}

    // Of this warp, by bin: the selections counted so far, or the next row.
    JAX_EP_DEVICE Shared<u32>& cursor(i32 bin) const { return memory_.cursor[warp_id()][bin]; }
    // Of the block: the first row of every expert at its rank, clipped to the capacity.
    JAX_EP_DEVICE Shared<u32>& start(i32 expert) const { return memory_.start[expert]; }

   private:
    SharedStorage& memory_;
  };
};

}  // namespace jax_ep::dev

#endif  // JAX_EP_CSRC_KERNELS_HIGH_THROUGHPUT_PLAN_BLOCK_H_
