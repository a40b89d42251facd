// SPDX-License-Identifier: Apache-2.0
// Plan: every rank gathers the routing of all ranks, counts it tile by tile, and turns the counts
// into rows by prefix sums. Each rank works out both sides: the slots of its own selections, and
// what its own rows hold. One exchange, and no order depends on an atomic.
//
// The steps are in plan_steps.h. What the layouts differ in is in plan_expert_layout.h and
// plan_rank_layout.h: a kernel is compiled for one of them, and the launch chooses.
#ifndef JAX_EP_CSRC_KERNELS_HIGH_THROUGHPUT_PLAN_KERNEL_H_
#define JAX_EP_CSRC_KERNELS_HIGH_THROUGHPUT_PLAN_KERNEL_H_

#include "csrc/kernels/closed_results.h"
#include "csrc/kernels/high_throughput/plan_expert_layout.h"
#include "csrc/kernels/high_throughput/plan_rank_layout.h"
#include "csrc/kernels/high_throughput/plan_steps.h"

namespace jax_ep::dev {

// `RowLayout` is PlanExpertLayout or PlanRankLayout.
template <typename RowLayout>
class PlanKernel {
 public:
  static constexpr bool kHasTail = false;

  JAX_EP_DEVICE explicit PlanKernel(const PlanParams& params)
      : context_(params.op, exchange_of(params), {}, RowLayout::kLayout) {}

  JAX_EP_DEVICE void run() {
    if (context_.exchange.closed()) return leave_no_results();
    if (context_.exchange.takes_part()) {
      take_plan_steps<RowLayout>(context_);
    } else {
      leave_empty_plan(context_.exchange, context_.op);
    }
    context_.exchange.finish();
  }

 private:
  JAX_EP_DEVICE void leave_no_results() {
    poison_plan(context_.exchange, context_.op);
    context_.exchange.report_closed();
  }

  typename RowLayout::Context context_;
};

}  // namespace jax_ep::dev

#endif  // JAX_EP_CSRC_KERNELS_HIGH_THROUGHPUT_PLAN_KERNEL_H_
