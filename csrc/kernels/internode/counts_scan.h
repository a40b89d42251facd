// SPDX-License-Identifier: Apache-2.0
// What a plan by counts makes of the counts of all ranks: how many rows of a bin come before those
// of a source, and where in what a source sends the runs of each expert begin.
#ifndef JAX_EP_CSRC_KERNELS_INTERNODE_COUNTS_SCAN_H_
#define JAX_EP_CSRC_KERNELS_INTERNODE_COUNTS_SCAN_H_

#include "csrc/kernels/high_throughput/plan_context.h"
#include "csrc/kernels/internode/counts_tables.h"

namespace jax_ep::dev {

// All lanes of each warp of the context.
template <typename Context>
class CountsScan {
 public:
  JAX_EP_DEVICE CountsScan(const Context& context, const CountsTables& tables)
      : c_(context), tables_(tables) {}

  // Totals; and for the bins of this rank, and of all bins for its own tokens, what comes before a
  // source (PlanContext::count_of).
  JAX_EP_DEVICE void scan_sources() const {
    for (i32 first = c_.warp * static_cast<i32>(kWarpSize); first < c_.bins;
         first += c_.num_warps * static_cast<i32>(kWarpSize)) {
      const i32 bin = first + static_cast<i32>(lane_id());
      if (bin < c_.bins) scan_sources(bin);
    }
  }

  // Where runs begin. From the last warp on: the first ones scan sources.
  JAX_EP_DEVICE void find_runs() const {
    const RankView& view = c_.exchange.view();
    for (i32 i = c_.num_warps - 1 - c_.warp; i <= c_.num_ranks; i += c_.num_warps) {
      if (i == c_.num_ranks) {
        sum_up(c_.rank, 0, 0, c_.shape.num_experts, tables_.starts());
        continue;
      }
      const i32 first = is_neighbor(view, i) ? 0 : view.first_neighbor * c_.num_local;
      sum_up(i, first, c_.rank * c_.num_local, c_.num_local, tables_.places(i));
    }
  }

 private:
  // One lane.
  JAX_EP_DEVICE void scan_sources(i32 bin) const {
    constexpr i32 kAtOnce = 4;  // loads in flight
    const i32 owner =
        bin < c_.shape.num_experts ? owner_of(bin, c_.num_local) : bin - c_.shape.num_experts;
    const i32 num_sources = c_.num_tokens > 0 ? c_.num_ranks : 0;
    u32 total = 0;
    for (i32 first = 0; first < num_sources; first += kAtOnce) {
      u32 count_here[kAtOnce];
      JAX_EP_UNROLL
      for (i32 i = 0; i < kAtOnce; ++i) {
        const i32 source = first + i;
        count_here[i] = source < num_sources ? ld(tables_.counts_of(source) + bin) : 0;
      }
      JAX_EP_UNROLL
      for (i32 i = 0; i < kAtOnce; ++i) {
        const i32 source = first + i;
        const bool is_asked_for = owner == c_.rank || source == c_.rank;
        if (source < num_sources && is_asked_for) st(c_.count_of(bin, source), total);
        total += count_here[i];
      }
    }
    st(c_.totals() + bin, total);
  }

  // to[i]: the source's selections of bins [first, begin + i), for i in [0, count].
  JAX_EP_DEVICE void sum_up(i32 source, i32 first, i32 begin, i32 count, Ptr<u32> to) const {
    const Ptr<u32> counts = tables_.counts_of(source);
    u32 of_lane = 0;
    for (i32 bin = first + static_cast<i32>(lane_id()); bin < begin; bin += kWarpSize) {
      of_lane += ld(counts + bin);
    }
    u32 before = warp_shfl(inclusive_sum(of_lane), kWarpSize - 1);
    if (lane_id() == 0) st(to, before);
    for (i32 base = 0; base < count; base += kWarpSize) {
      const i32 i = base + static_cast<i32>(lane_id());
      const u32 sum = inclusive_sum(i < count ? ld(counts + (begin + i)) : 0);
      if (i < count) st(to + (i + 1), before + sum);
      before += warp_shfl(sum, kWarpSize - 1);
    }
  }

  const Context& c_;
  const CountsTables& tables_;
};

}  // namespace jax_ep::dev

#endif  // JAX_EP_CSRC_KERNELS_INTERNODE_COUNTS_SCAN_H_
