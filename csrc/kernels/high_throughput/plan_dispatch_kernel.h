// SPDX-License-Identifier: Apache-2.0
// A plan and its dispatch in one exchange. Staging is dense, so senders need the routing alone: a
// block's first warps send rows at once, meanwhile the others make the plan. When it is made, on
// all blocks, these receive; and so do the first, when they have sent, and the tail.
#ifndef JAX_EP_CSRC_KERNELS_HIGH_THROUGHPUT_PLAN_DISPATCH_KERNEL_H_
#define JAX_EP_CSRC_KERNELS_HIGH_THROUGHPUT_PLAN_DISPATCH_KERNEL_H_

#include "csrc/kernels/closed_results.h"
#include "csrc/kernels/high_throughput/dispatch_expert_layout.h"
#include "csrc/kernels/high_throughput/dispatch_rank_layout.h"
#include "csrc/kernels/high_throughput/dispatch_receiver.h"
#include "csrc/kernels/high_throughput/dispatch_sender.h"
#include "csrc/kernels/high_throughput/plan_dispatch_block.h"
#include "csrc/kernels/high_throughput/plan_expert_layout.h"
#include "csrc/kernels/high_throughput/plan_rank_layout.h"
#include "csrc/kernels/high_throughput/plan_steps.h"

namespace jax_ep::dev {

// One layout, as what a dispatch and what a plan does in it: `RowLayout` is DispatchExpertLayout or
// DispatchRankLayout, and `PlanLayout` PlanExpertLayout or PlanRankLayout of PlanInDispatchConfig.
template <typename RowLayout, typename PlanLayout>
class PlanDispatchKernel {
  static_assert(RowLayout::kLayout == PlanLayout::kLayout);

 public:
  static constexpr bool kHasTail = true;

  JAX_EP_DEVICE explicit PlanDispatchKernel(const PlanDispatchParams& params)
      : op_(params.op),
        exchange_(exchange_of(params)),
        // Rows have the flags behind those of the routing.
        dispatch_(params.op.dispatch, exchange_.with_flags_from(kRowFlags), params.num_senders) {}

  JAX_EP_DEVICE void run() {
    DispatchReceiver<RowLayout> receiver(dispatch_);
    const bool in_tail = exchange_.in_tail();
    if (exchange_.closed()) {
      if (!in_tail) leave_no_results();
      return;
    }
    if (exchange_.takes_part()) {
      take_part(receiver, in_tail);
    } else if (!in_tail) {
      leave_empty_results();
    }
    exchange_.finish();
  }

 private:
  using Warps = typename PlanLayout::Config::Warps;

  JAX_EP_DEVICE void take_part(DispatchReceiver<RowLayout>& receiver, bool in_tail) {
    if (!in_tail && warp_id() < dispatch_.num_senders) {
      DispatchSender<RowLayout, SelectionsToPlan>(dispatch_).send();
    } else if (!in_tail) {
      make_plan();
    }
    exchange_.wait_planned();
    receiver.receive();
    bulk_wait<0>();
  }

  JAX_EP_DEVICE void make_plan() {
    const Warps warps(dispatch_.num_senders);
    typename PlanLayout::Context plan(op_.plan, exchange_, warps, PlanLayout::kLayout);
    take_plan_steps<PlanLayout>(plan);
    // The tables are in stages: what is loaded into these comes after what was stored there.
    fence_proxy_async_shared();
    exchange_.announce_plan(warps);
  }

  // All threads of the main blocks.
  JAX_EP_DEVICE void leave_no_results() {
    poison_plan(exchange_, op_.plan);
    poison_rows<typename RowLayout::RowType>(exchange_, op_.dispatch);
    exchange_.report_closed();
  }

  JAX_EP_DEVICE void leave_empty_results() {
    leave_empty_plan(exchange_, op_.plan);
    leave_empty_rows<typename RowLayout::RowType>(exchange_, op_.dispatch);
  }

  const PlanDispatchOp& op_;
  const Exchange exchange_;
  typename RowLayout::Context dispatch_;
};

}  // namespace jax_ep::dev

#endif  // JAX_EP_CSRC_KERNELS_HIGH_THROUGHPUT_PLAN_DISPATCH_KERNEL_H_
