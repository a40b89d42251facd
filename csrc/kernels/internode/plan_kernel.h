// SPDX-License-Identifier: Apache-2.0
// Plan, where there are several domains. See plan_routing.h.
#ifndef JAX_EP_CSRC_KERNELS_INTERNODE_PLAN_KERNEL_H_
#define JAX_EP_CSRC_KERNELS_INTERNODE_PLAN_KERNEL_H_

#include "csrc/kernels/closed_results.h"
#include "csrc/kernels/high_throughput/plan_expert_layout.h"
#include "csrc/kernels/high_throughput/plan_rank_layout.h"
#include "csrc/kernels/high_throughput/plan_steps.h"
#include "csrc/kernels/internode/plan_routing.h"

namespace jax_ep::dev {

// `RowLayout` is PlanExpertLayout or PlanRankLayout.
template <typename RowLayout, typename Transport>
class InternodePlanKernel {
 public:
  static constexpr bool kHasTail = false;
  using Params = InternodeParams<PlanOp, Transport>;

  JAX_EP_DEVICE explicit InternodePlanKernel(const Params& params)
      : c_(params.op, exchange_of(params), {}, RowLayout::kLayout),
        rail_(c_.exchange,
              params.network,
              params.transport,
              params.op.shape.num_tokens,
              c_.chunks.tokens_per_chunk * plan_chunks_per_message(params.network.layout,
                                                                   c_.chunks.count,
                                                                   c_.chunks.tokens_per_chunk,
                                                                   c_.num_topk)) {}

  JAX_EP_DEVICE void run() {
    if (c_.exchange.closed()) {
      poison_plan(c_.exchange, c_.op);
      c_.exchange.report_closed();
      return;
    }
    PlanCounter<RowLayout> counter(c_);
    counter.send();
    cross_domains();
    take_counting_steps<RowLayout>(c_, counter);
    c_.exchange.finish([this] {
      c_.exchange.acknowledge();
      if (lane_id() == 0) rail_.advance(/*with_units=*/false);
    });
  }

 private:
  using Context = typename RowLayout::Context;

  // A block's last warp relays, and the others send: a sender may wait for a relay of another rank,
  // and no relay waits for a sender of its own.
  JAX_EP_DEVICE void cross_domains() {
    const PlanRouting<Context, Transport> routing(c_, rail_);
    const auto blocks = static_cast<i32>(c_.exchange.num_main());
    const auto senders = static_cast<i32>(c_.warps.count()) - 1;
    const auto warp = static_cast<i32>(c_.warps.warp());
    if (warp == senders) {
      routing.relay(static_cast<i32>(block_id()), blocks);
    } else {
      routing.send(warp * blocks + static_cast<i32>(block_id()), senders * blocks);
    }
  }

  Context c_;
  const Rail<Transport> rail_;
};

}  // namespace jax_ep::dev

#endif  // JAX_EP_CSRC_KERNELS_INTERNODE_PLAN_KERNEL_H_
