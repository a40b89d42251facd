// SPDX-License-Identifier: Apache-2.0
// A low-latency plan with its dispatch: all warps send, then each block makes the plan for itself,
// then all warps expand what arrives. In halves, the first one sends.
#ifndef JAX_EP_CSRC_KERNELS_LOW_LATENCY_DISPATCH_KERNEL_H_
#define JAX_EP_CSRC_KERNELS_LOW_LATENCY_DISPATCH_KERNEL_H_

#include "csrc/core/kernel_params.h"
#include "csrc/kernels/closed_results.h"
#include "csrc/kernels/high_throughput/plan_expert_layout.h"
#include "csrc/kernels/high_throughput/plan_rank_layout.h"
#include "csrc/kernels/low_latency/dispatch_rows.h"
#include "csrc/kernels/low_latency/low_latency_exchange.h"
#include "csrc/kernels/low_latency/routing_plan.h"

namespace jax_ep::dev {

// `RowLayout` is a plan's layout, with LowLatencyDispatchConfig.
template <typename RowType, typename RowLayout>
class LowLatencyDispatchKernel {
 public:
  static constexpr bool kHasTail = false;

  JAX_EP_DEVICE explicit LowLatencyDispatchKernel(const PlanDispatchParams& params)
      : op_(params.op),
        half_(params),
        exchange_(low_latency_exchange_of(params)),
        plan_(op_.plan, exchange_, typename Config::Warps(), RowLayout::kLayout) {}

  JAX_EP_DEVICE void run() {
    if (exchange_.closed()) return leave_no_results();
    half_.announce(exchange_, plan_.warp, plan_.num_warps);
    if (half_.sends()) send();
    if (half_.receives()) receive();
    half_.finish(exchange_);
  }

 private:
  using Config = typename RowLayout::Config;

  JAX_EP_DEVICE void send() {
    DispatchRows<Config, RowType> rows(op_.dispatch, exchange_);
    const i64 selections = op_.plan.shape.num_tokens * op_.plan.shape.num_topk;
    half_.wait_until_bank_is_free(exchange_);
    send_experts(
        exchange_, Ptr<const i32>{op_.plan.topk_idx}, selections, plan_.warp, plan_.num_warps);
    const auto units = static_cast<i32>(op_.plan.shape.num_tokens) * rows.num_segments();
    for (i32 unit = plan_.warp; unit < units; unit += plan_.num_warps) {
      rows.send(unit / rows.num_segments(), unit % rows.num_segments());
    }
    if (op_.dispatch.num_scalars == 0) return;
    send_scalars(exchange_,
                 Ptr<const float>{op_.dispatch.token_scalars},
                 selections,
                 plan_.warp,
                 plan_.num_warps);
  }

  JAX_EP_DEVICE void receive() {
    half_.wait_for_peers(exchange_, plan_.warp, plan_.num_warps);
    RoutingPlan<RowLayout> plan(plan_, op_.dispatch);
    plan.make();
    DispatchRows<Config, RowType> rows(op_.dispatch, exchange_);
    // While packets are on their way.
    plan.for_each_empty_row([&rows](i64 row) { rows.clear(row); });
    expand(rows, plan);
    plan.report();
    bulk_wait<0>();
  }

  JAX_EP_DEVICE void expand(DispatchRows<Config, RowType>& rows,
                            const RoutingPlan<RowLayout>& plan) {
    const i32 units = plan_.num_ranks * plan_.num_tokens * rows.num_segments();
    for (i32 unit = plan_.warp; unit < units; unit += plan_.num_warps) {
      const i32 global_token = unit / rows.num_segments();
      rows.expand(global_token / plan_.num_tokens,
                  global_token % plan_.num_tokens,
                  unit % rows.num_segments(),
                  plan.row_of_lane(global_token));
    }
  }

  JAX_EP_DEVICE void leave_no_results() const {
    if (half_.receives()) {
      poison_plan(exchange_, op_.plan);
      poison_rows<RowType>(exchange_, op_.dispatch);
    } else {
      half_.poison_ticket(exchange_);
    }
    exchange_.report_closed();
  }

  const PlanDispatchOp& op_;
  const ExchangeHalf half_;
  const Exchange exchange_;
  typename RowLayout::Context plan_;
};

}  // namespace jax_ep::dev

#endif  // JAX_EP_CSRC_KERNELS_LOW_LATENCY_DISPATCH_KERNEL_H_
