// SPDX-License-Identifier: Apache-2.0
// Dispatch, where there are several domains: within the own one as with one domain
// (high_throughput/dispatch_kernel.h), and by the rail to the others. Of a block's warps the first
// send to the domain, and the next ones by the rail; the last warp of the first block relays, and
// another one gives credits. Whoever is done receives: first what the domain sends, then what the
// rails bring.
//
// Nobody waits in a circle. Number the steps by exchange, then chunk, then the turn of a domain. A
// rail sender waits for the credit of a chunk before, credits for what is pulled, pullers for the
// relay, the relay for what is delivered: of a smaller step, or an earlier one of the same. Every
// warp takes its steps in ascending order, and those that wait for each other are different warps.
// Senders to the domain wait for no network.
#ifndef JAX_EP_CSRC_KERNELS_INTERNODE_DISPATCH_KERNEL_H_
#define JAX_EP_CSRC_KERNELS_INTERNODE_DISPATCH_KERNEL_H_

#include "csrc/kernels/closed_results.h"
#include "csrc/kernels/high_throughput/dispatch_expert_layout.h"
#include "csrc/kernels/high_throughput/dispatch_rank_layout.h"
#include "csrc/kernels/high_throughput/dispatch_sender.h"
#include "csrc/kernels/internode/rail_receiver.h"
#include "csrc/kernels/internode/rail_sender.h"

namespace jax_ep::dev {

// The selections of a token whose rows are in this rank's domain.
struct SelectionsInDomain {
  template <typename Context>
  JAX_EP_DEVICE static Selections of(const Context& c, i64 token) {
    const RankView& view = c.exchange.view();
    return PlannedSelections::of(c, token).within(view.first_neighbor, view.num_neighbors);
  }
};

// `RowLayout` is DispatchExpertLayout or DispatchRankLayout.
template <typename RowLayout, typename Transport>
class InternodeDispatchKernel {
 public:
  static constexpr bool kHasTail = false;
  using Params = InternodeParams<DispatchOp, Transport>;

  JAX_EP_DEVICE explicit InternodeDispatchKernel(const Params& params)
      : c_(params.op, exchange_of(params), params.num_senders),
        rail_(c_.exchange,
              params.network,
              params.transport,
              params.op.shape.num_tokens,
              params.network.layout.chunk_tokens),
        message_{
            .row_bytes = c_.wire_row_bytes(),
            .scalar_stride = params.op.num_scalars > 0 ? params.network.layout.scalar_stride : 0},
        num_rail_senders_(static_cast<u32>(params.num_rail_senders)) {}

  JAX_EP_DEVICE void run() {
    if (c_.exchange.closed()) {
      poison_rows<typename RowLayout::RowType>(c_.exchange, c_.op);
      c_.exchange.report_closed();
      return;
    }
    take_role();
    receive();
    bulk_wait<0>();
    c_.exchange.finish([this] {
      c_.exchange.acknowledge();
      if (lane_id() == 0) rail_.advance(/*with_units=*/false);
    });
  }

 private:
  using Config = typename RowLayout::Config;

  JAX_EP_DEVICE void take_role() {
    const u32 blocks = c_.exchange.num_main();
    const u32 warp = warp_id();
    constexpr u32 kLast = Config::kWarps - 1;
    if (warp < c_.num_senders) {
      DispatchSender<RowLayout, SelectionsInDomain>(c_).send_chunks();
    } else if (warp < c_.num_senders + num_rail_senders_) {
      const u32 position = (warp - c_.num_senders) * blocks + block_id();
      RailSender<RowLayout, Transport>(c_, rail_, message_)
          .send(static_cast<i32>(position), static_cast<i32>(num_rail_senders_ * blocks));
    } else if (block_id() == 0 && warp == kLast) {
      relay_messages(rail_);
    } else if (block_id() + 1 == blocks && warp == (blocks > 1 ? kLast : kLast - 1)) {
      give_credits(rail_);
    }
  }

  JAX_EP_DEVICE void receive() {
    DispatchReceiver<RowLayout> receiver(c_);
    RailReceiver<RowLayout, Transport> rail_receiver(c_, receiver, rail_, message_);
    receiver.clear_rows_without_token();
    const i32 of_domain = receiver.num_token_items();
    for (WorkQueue work = c_.exchange.receiving_by_tickets(of_domain + rail_receiver.num_items());
         work.has_item();
         work.next()) {
      if (work.item() < of_domain) {
        receiver.receive_token(work.item());
      } else {
        rail_receiver.pull(work.item() - of_domain);
      }
    }
  }

  typename RowLayout::Context c_;
  const Rail<Transport> rail_;
  const MessageLayout message_;
  const u32 num_rail_senders_;
};

}  // namespace jax_ep::dev

#endif  // JAX_EP_CSRC_KERNELS_INTERNODE_DISPATCH_KERNEL_H_
