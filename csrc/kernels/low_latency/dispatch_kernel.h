// SPDX-License-Identifier: Apache-2.0
// A low-latency plan with its dispatch: all warps send, then each block makes the plan for itself,
// then all warps expand what arrives. In halves, the first one sends. Where there are far ranks, of
// other domains, there are no halves.
#ifndef JAX_EP_CSRC_KERNELS_LOW_LATENCY_DISPATCH_KERNEL_H_
#define JAX_EP_CSRC_KERNELS_LOW_LATENCY_DISPATCH_KERNEL_H_

#include <type_traits>

#include "csrc/core/kernel_params.h"
#include "csrc/kernels/closed_results.h"
#include "csrc/kernels/high_throughput/plan_expert_layout.h"
#include "csrc/kernels/high_throughput/plan_rank_layout.h"
#include "csrc/kernels/low_latency/dispatch_rows.h"
#include "csrc/kernels/low_latency/far_dispatch.h"
#include "csrc/kernels/low_latency/low_latency_exchange.h"
#include "csrc/kernels/low_latency/masking_exchange.h"
#include "csrc/kernels/low_latency/routing_plan.h"

namespace jax_ep::dev {

// `RowLayout` is a plan's layout, with LowLatencyDispatchConfig. `Far` is NoFarRanks or FarRanks.
// `kMasks`: ranks that do not come are left out, and said to be missing; without far ranks, and in
// one piece.
template <typename RowType, typename RowLayout, typename Far = NoFarRanks, bool kMasks = false>
class LowLatencyDispatchKernel {
 public:
  static_assert(!(kMasks && Far::kAny));
  static constexpr bool kHasTail = false;

  using Params = typename Far::template Params<PlanDispatchOp>;

  JAX_EP_DEVICE explicit LowLatencyDispatchKernel(const Params& params)
      : op_(params.op),
        half_(params),
        exchange_(low_latency_exchange_of(params)),
        far_(exchange_, params),
        plan_(op_.plan, exchange_, typename Config::Warps(), RowLayout::kLayout) {}

  JAX_EP_DEVICE void run() {
    if (exchange_.closed()) return leave_no_results();
    if (exchange_.takes_part()) {
      half_.announce(exchange_, plan_.warp, plan_.num_warps);
      if (half_.sends()) send();
      if (half_.receives()) receive();
    } else {
      half_.check_ticket(exchange_);
      if (half_.receives()) leave_empty_results();
    }
    if constexpr (kMasks) {
      if (!exchange_.is_last_warp()) return;
      if (Half::report(exchange_, op_.dispatch.missing_ranks)) mend();
      Half::close(exchange_);
    } else {
      half_.finish(exchange_, far_);
    }
  }

 private:
  using Config = typename RowLayout::Config;
  using Rows = DispatchRows<Config, RowType, Far::kAny>;
  using Plan = RoutingPlan<RowLayout, Far, kMasks>;
  using Half = std::conditional_t<kMasks, MaskingExchange, ExchangeHalf>;

  JAX_EP_DEVICE void send() {
    Rows rows(op_.dispatch, exchange_);
    // They have the longest way, and need no bank of the peers.
    if constexpr (Far::kAny) far_dispatch().send(rows, plan_.warp, plan_.num_warps);
    const i64 selections = op_.plan.shape.num_tokens * op_.plan.shape.num_topk;
    if constexpr (kMasks) {
      send(rows, selections, half_.wait_until_bank_is_free(exchange_));
    } else {
      half_.wait_until_bank_is_free(exchange_);
      send(rows, selections, AllPeers());
    }
  }
  template <typename Wanted>
  JAX_EP_DEVICE void send(Rows& rows, i64 selections, const Wanted& wanted) {
    const i32 warp = plan_.warp;
    const i32 num_warps = plan_.num_warps;
    send_experts(exchange_, Ptr<const i32>{op_.plan.topk_idx}, selections, warp, num_warps, wanted);
    const auto num_work_items = static_cast<i32>(op_.plan.shape.num_tokens) * rows.num_segments();
    for (i32 work_item = warp; work_item < num_work_items; work_item += num_warps) {
      rows.send(work_item / rows.num_segments(), work_item % rows.num_segments(), wanted);
    }
    if (op_.dispatch.num_scalars == 0) return;
    const Ptr<const float> scalars{op_.dispatch.token_scalars};
    send_scalars(exchange_, scalars, selections, warp, num_warps, wanted);
  }

  JAX_EP_DEVICE void receive() {
    half_.wait_for_peers(exchange_, plan_.warp, plan_.num_warps);
    Plan plan(plan_, op_.dispatch, far_);
    plan.make();
    Rows rows(op_.dispatch, exchange_);
    // While packets are on their way.
    plan.for_each_empty_row([&rows](i64 row) { rows.clear(row); });
    expand(rows, plan);
    plan.report();
    if constexpr (Far::kAny) far_.wait_all(plan_.warp, plan_.num_warps);
    bulk_wait<0>();
  }

  JAX_EP_DEVICE void expand(Rows& rows, const Plan& plan) {
    const i32 num_work_items = plan_.num_ranks * plan_.num_tokens * rows.num_segments();
    for (i32 work_item = plan_.warp; work_item < num_work_items; work_item += plan_.num_warps) {
      i32 global_token = work_item / rows.num_segments();
      const i32 token = global_token % plan_.num_tokens;
      i32 source = global_token / plan_.num_tokens;
      if constexpr (Far::kAny) {
        // The own domain's come first: those of the others take longer.
        source = (exchange_.view().first_neighbor + source) % plan_.num_ranks;
        global_token = source * plan_.num_tokens + token;
        if (far_.has(source)) {
          far_dispatch().expand(
              rows, source, token, work_item % rows.num_segments(), plan.row_of_lane(global_token));
          continue;
        }
      }
      if constexpr (kMasks) {
        const bool came = rows.try_expand(
            source, token, work_item % rows.num_segments(), plan.row_of_lane(global_token));
        if (!came && lane_id() == 0) MissingRanks(exchange_).give_up_on(source);
      } else {
        rows.expand(source, token, work_item % rows.num_segments(), plan.row_of_lane(global_token));
      }
    }
  }

  // All lanes of the last warp, of masking kernels. Of who was given up when its routing counted
  // some rows may have come: none of them stays. Nor do the rows that it would have of this rank.
  JAX_EP_DEVICE void mend() {
    const MissingRanks missing(exchange_);
    const Plan plan(plan_, op_.dispatch, far_);
    const Rows rows(op_.dispatch, exchange_);
    JAX_EP_NO_UNROLL
    for (i32 source = 0; source < plan_.num_ranks; ++source) {
      if (missing.verdict(source) != Verdict::kTorn) continue;
      plan.empty_rows_of(source, [&rows](i64 row) { rows.clear(row, true); });
      plan.empty_slots_at(source);
    }
  }

  JAX_EP_DEVICE FarDispatch<Rows, Far> far_dispatch() const {
    return {op_.dispatch, exchange_, far_};
  }

  JAX_EP_DEVICE void leave_empty_results() const {
    leave_empty_plan(exchange_, op_.plan);
    leave_empty_rows<RowType>(exchange_, op_.dispatch);
  }
  JAX_EP_DEVICE void leave_no_results() const {
    if (half_.receives()) {
      poison_plan(exchange_, op_.plan);
      poison_rows<RowType>(exchange_, op_.dispatch);
      if constexpr (kMasks) poison_missing_ranks(exchange_, op_.dispatch.missing_ranks);
    } else {
      half_.poison_ticket(exchange_);
    }
    exchange_.report_closed();
  }

  const PlanDispatchOp& op_;
  const Half half_;
  const Exchange exchange_;
  const Far far_;
  typename RowLayout::Context plan_;
};

}  // namespace jax_ep::dev

#endif  // JAX_EP_CSRC_KERNELS_LOW_LATENCY_DISPATCH_KERNEL_H_
