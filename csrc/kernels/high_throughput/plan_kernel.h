// SPDX-License-Identifier: Apache-2.0
// Plan: every rank gathers the routing of all ranks, counts it tile by tile, and turns the counts
// into rows by prefix sums. Each rank works out both sides: the slots of its own selections, and
// what its own rows hold. One exchange, and no order depends on an atomic.
//
// Steps, with a grid barrier between 2, 3 and 4:
//   1. send      each chunk of topk_idx goes to all ranks
//   2. count     selections per (source rank, tile, bin), as the chunks arrive
//   3. scan      per bin: counts become the number of earlier selections of the bin
//   4. assign    every tile walks its tokens and hands out rows in their order
// Bins are the experts; in layout "rank" the destination ranks follow, which count tokens. What
// else the layouts differ in is in plan_expert_layout.h and plan_rank_layout.h: a kernel is
// compiled for one of them, and the launch chooses.
#ifndef JAX_EP_CSRC_KERNELS_HIGH_THROUGHPUT_PLAN_KERNEL_H_
#define JAX_EP_CSRC_KERNELS_HIGH_THROUGHPUT_PLAN_KERNEL_H_

#include "csrc/kernels/high_throughput/plan_assign.h"
#include "csrc/kernels/high_throughput/plan_count.h"
#include "csrc/kernels/high_throughput/plan_expert_layout.h"
#include "csrc/kernels/high_throughput/plan_rank_layout.h"

namespace jax_ep::dev {

// `RowLayout` is ExpertLayout or RankLayout.
template <typename RowLayout>
class PlanKernel {
 public:
  static constexpr bool kHasTail = false;

  JAX_EP_DEVICE explicit PlanKernel(const PlanParams& params)
      : context_(params, RowLayout::kLayout) {}

  JAX_EP_DEVICE void run() {
    PlanAssigner<RowLayout> assigner(context_);
    if (context_.exchange.closed()) return assigner.leave_no_results();
    PlanCounter<RowLayout> counter(context_);
    counter.send();
    counter.count();
    context_.exchange.grid_barrier();
    counter.scan();
    context_.exchange.grid_barrier();
    assigner.assign();
    context_.exchange.finish();
  }

 private:
  typename RowLayout::Context context_;
};

}  // namespace jax_ep::dev

#endif  // JAX_EP_CSRC_KERNELS_HIGH_THROUGHPUT_PLAN_KERNEL_H_
