// SPDX-License-Identifier: Apache-2.0
// What a domain does with the messages of a dispatch that its rails bring. A relay tells all ranks
// of the domain that a message is there. These pull: they read the rows that they want out of the
// receive ring of the rank that got it, straight into their own receive buffers; nobody forwards.
// When all have, the sender gets its credit.
#ifndef JAX_EP_CSRC_KERNELS_INTERNODE_RAIL_RECEIVER_H_
#define JAX_EP_CSRC_KERNELS_INTERNODE_RAIL_RECEIVER_H_

#include "csrc/device/rail.h"
#include "csrc/kernels/high_throughput/dispatch_receiver.h"
#include "csrc/kernels/internode/message.h"

namespace jax_ep::dev {

// All lanes of a warp, that of the relay.
template <typename Transport>
JAX_EP_DEVICE void relay_messages(const Rail<Transport>& rail) {
  for (i32 chunk = 0; chunk < rail.num_chunks(); ++chunk) {
    for (i32 turn = 0; turn < rail.num_others(); ++turn) {
      const i32 domain = rail.domain_at_turn(turn);
      if (lane_id() == 0) rail.wait_delivered(domain, chunk);
      rail.relay(domain, chunk);
    }
  }
}

// All lanes of a warp, another one: in the same order.
template <typename Transport>
JAX_EP_DEVICE void give_credits(const Rail<Transport>& rail) {
  for (i32 chunk = 0; chunk < rail.num_chunks(); ++chunk) {
    for (i32 turn = 0; turn < rail.num_others(); ++turn) {
      const i32 domain = rail.domain_at_turn(turn);
      rail.wait_pulled(domain, chunk);
      if (lane_id() == 0) rail.give_credit(domain, chunk);
    }
  }
}

// Pulls parts of messages: reads the receive rings of the domain's ranks and source_slot, and
// writes what a DispatchReceiver writes. Waits for relayed, signals pulled. `RowLayout` is
// DispatchExpertLayout or DispatchRankLayout.
template <typename RowLayout, typename Transport>
class RailReceiver {
  using Context = typename RowLayout::Context;

 public:
  JAX_EP_DEVICE RailReceiver(Context& context,
                             DispatchReceiver<RowLayout>& receiver,
                             const Rail<Transport>& rail,
                             const MessageLayout& message)
      : c_(context), receiver_(receiver), rail_(rail), message_(message) {}

  JAX_EP_DEVICE i32 num_items() const {
    return rail_.num_chunks() * rail_.num_others() * rail_.num_ranks() * kRailChunkParts;
  }
  // Chunk by chunk; ranks begin with different rails.
  JAX_EP_DEVICE void pull(i32 item) {
    const i32 part = item % kRailChunkParts;
    const i32 message = item / kRailChunkParts;
    const i32 turn = message / rail_.num_ranks();
    const i32 rail = (message % rail_.num_ranks() + rail_.index()) % rail_.num_ranks();
    const i32 domain = rail_.domain_at_turn(turn % rail_.num_others());
    const i32 chunk = turn / rail_.num_others();
    if (lane_id() == 0) rail_.wait_relayed(rail, domain, chunk);
    warp_sync();
    // The copy engine, too, sees what has arrived.
    fence_proxy_async_global();
    pull_part(rail_.message(rail, domain, chunk), rail_.rank_at(domain, rail), chunk, part);
    warp_sync();
    if (lane_id() == 0) rail_.put_pulled(rail, domain, chunk, part);
  }

 private:
  JAX_EP_DEVICE void pull_part(Ptr<const std::byte> message, i32 source, i32 chunk, i32 part) {
    const i64 first = rail_.first_token(chunk);
    const typename Rail<Transport>::TokenRange range = rail_.part(chunk, part);
    const TokenSet tokens = read_header(message);
    receiver_.expand(
        range.first,
        range.last,
        0,
        c_.segments.count,
        [&](i64 token) {
          const auto i = static_cast<i32>(token - first);
          if (!tokens.has(i)) return -1;
          const i32 row = receiver_.held_row(source, token);
          if (c_.op.num_scalars > 0 && warp_ballot(row >= 0) != 0) {
            const TokenScalars scalars(
                message + message_.scalars(tokens.count(), tokens.position(i)), c_.num_topk);
            const u32 holders = scalars.holders();
            // A handle from elsewhere may claim a row that nobody has sent for.
            if ((holders >> rail_.index() & 1) != 0) {
              receiver_.expand_scalars(row, {scalars.of(holders, rail_.index()).raw});
            }
          }
          return row;
        },
        [&](i64 token) {
          return message + message_.row(tokens.position(static_cast<i32>(token - first)));
        });
  }

  Context& c_;
  DispatchReceiver<RowLayout>& receiver_;
  const Rail<Transport>& rail_;
  const MessageLayout& message_;
};

}  // namespace jax_ep::dev

#endif  // JAX_EP_CSRC_KERNELS_INTERNODE_RAIL_RECEIVER_H_
