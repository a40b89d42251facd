// SPDX-License-Identifier: Apache-2.0
// The steps of a plan, with a grid barrier between 2, 3 and 4:
//   1. send      each chunk of topk_idx goes to all ranks
//   2. count     selections per (source rank, tile, bin), as the chunks arrive
//   3. scan      per bin: counts become the number of earlier selections of the bin
//   4. assign    every tile walks its tokens and hands out rows in their order
// Bins are the experts; in layout "rank" the destination ranks follow, which count tokens.
#ifndef JAX_EP_CSRC_KERNELS_HIGH_THROUGHPUT_PLAN_STEPS_H_
#define JAX_EP_CSRC_KERNELS_HIGH_THROUGHPUT_PLAN_STEPS_H_

#include "csrc/kernels/high_throughput/plan_assign.h"
#include "csrc/kernels/high_throughput/plan_count.h"

namespace jax_ep::dev {

// Steps 2 to 4. All warps of the context. `RowLayout` is PlanExpertLayout or PlanRankLayout.
template <typename RowLayout>
JAX_EP_DEVICE void take_counting_steps(typename RowLayout::Context& context,
                                       PlanCounter<RowLayout>& counter) {
  counter.count();
  context.exchange.grid_barrier(context.warps);
  counter.scan();
  context.exchange.grid_barrier(context.warps);
  PlanAssigner<RowLayout>(context).assign();
}

// All steps.
template <typename RowLayout>
JAX_EP_DEVICE void take_plan_steps(typename RowLayout::Context& context) {
  PlanCounter<RowLayout> counter(context);
  counter.send();
  take_counting_steps<RowLayout>(context, counter);
}

}  // namespace jax_ep::dev

#endif  // JAX_EP_CSRC_KERNELS_HIGH_THROUGHPUT_PLAN_STEPS_H_
