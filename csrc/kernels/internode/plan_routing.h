// SPDX-License-Identifier: Apache-2.0
// How a plan gathers the routing of all ranks where there are several domains: each chunk of
// topk_idx goes to the peers of the domain, and by the rail to one rank of each other domain, which
// hands it on to its own. From there on all is as with one domain (plan_steps.h).
//
// Senders read topk_idx, and write the send buffers; they wait for credit, and signal delivered.
// Relays read what the rail has brought, and write the peers' staging; they wait for delivered and
// acknowledged, signal arrived, and give credit.
#ifndef JAX_EP_CSRC_KERNELS_INTERNODE_PLAN_ROUTING_H_
#define JAX_EP_CSRC_KERNELS_INTERNODE_PLAN_ROUTING_H_

#include "csrc/device/rail.h"
#include "csrc/kernels/high_throughput/plan_context.h"
#include "csrc/kernels/internode/message.h"

namespace jax_ep::dev {

// All lanes of a warp. `Context` is a PlanContext.
template <typename Context, typename Transport>
class PlanRouting {
 public:
  JAX_EP_DEVICE PlanRouting(const Context& context, const Rail<Transport>& rail)
      : c_(context), rail_(rail) {}

  // Those of warps [0, num_warps) that `warp` has.
  JAX_EP_DEVICE void send(i32 warp, i32 num_warps) const {
    for (i32 item = warp; item < num_items(); item += num_warps) {
      const i32 chunk = item / rail_.num_others();
      const i32 domain = rail_.domain_at_turn(item % rail_.num_others());
      if (lane_id() == 0) rail_.wait_credit(domain, chunk);
      warp_sync();
      const Ptr<u32> to = as<u32>(rail_.send_buffer(domain, chunk));
      const auto from = Ptr<const i32>{c_.op.topk_idx} + rail_.first_token(chunk) * c_.num_topk;
      rail_.send(domain, chunk, put_words(to, as<const u32>(from), num_selections(chunk)));
    }
  }

  JAX_EP_DEVICE void relay(i32 warp, i32 num_warps) const {
    if (warp >= num_items()) return;
    c_.exchange.wait_until_writable();
    for (i32 item = warp; item < num_items(); item += num_warps) {
      const i32 chunk = item / rail_.num_others();
      const i32 domain = rail_.domain_at_turn(item % rail_.num_others());
      if (lane_id() == 0) rail_.wait_delivered(domain, chunk);
      warp_sync();
      hand_on(domain, chunk);
      if (lane_id() == 0) rail_.give_credit(domain, chunk);
    }
  }

 private:
  JAX_EP_DEVICE i32 num_items() const { return rail_.num_chunks() * rail_.num_others(); }
  JAX_EP_DEVICE i64 num_selections(i32 chunk) const {
    return (rail_.last_token(chunk) - rail_.first_token(chunk)) * c_.num_topk;
  }

  // Its reads of the message come before a warp_sync.
  JAX_EP_DEVICE void hand_on(i32 domain, i32 chunk) const {
    const RankView& view = c_.exchange.view();
    const i32 source = rail_.rank_at(domain, rail_.index());
    const i64 first = rail_.first_token(chunk);
    const Ptr<const i32> from = as<const i32>(rail_.message(rail_.index(), domain, chunk));
    for (i64 i = lane_id(); i < num_selections(chunk); i += kWarpSize) {
      const i32 expert = ld(from + i);
      for_each_peer(
          view, [&](i32 peer) { relay_expert(view, peer, source, first, c_.num_topk, i, expert); });
    }
    warp_sync();
    const i32 first_flag = c_.chunks.chunk_of(static_cast<i32>(first));
    const i32 last_flag = c_.chunks.chunk_of(static_cast<i32>(rail_.last_token(chunk)) - 1);
    for (i32 flag_idx = first_flag; flag_idx <= last_flag; ++flag_idx) {
      share_out_peers(view, [&](i32 peer) {
        relay_arrived(view, c_.exchange.channel(), peer, source, flag_idx, c_.exchange.own_flag());
      });
    }
  }

  const Context& c_;
  const Rail<Transport>& rail_;
};

}  // namespace jax_ep::dev

#endif  // JAX_EP_CSRC_KERNELS_INTERNODE_PLAN_ROUTING_H_
