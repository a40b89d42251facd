// SPDX-License-Identifier: Apache-2.0
// The rail senders of a dispatch: they pack what other domains want of each rail chunk into a
// message for each, every row once for all ranks of a domain.
//
// They read x, x_scales, token_scalars, topk_idx and slot, and write the send buffers. They wait
// for credit, and signal delivered.
#ifndef JAX_EP_CSRC_KERNELS_INTERNODE_RAIL_SENDER_H_
#define JAX_EP_CSRC_KERNELS_INTERNODE_RAIL_SENDER_H_

#include "csrc/device/rail.h"
#include "csrc/kernels/high_throughput/row_packing.h"
#include "csrc/kernels/internode/message.h"

namespace jax_ep::dev {

// `RowLayout` is DispatchExpertLayout or DispatchRankLayout.
template <typename RowLayout, typename Transport>
class RailSender {
  using Context = typename RowLayout::Context;

 public:
  JAX_EP_DEVICE RailSender(Context& context,
                           const Rail<Transport>& rail,
                           const MessageLayout& message)
      : c_(context), rail_(rail), message_(message) {}

  // Those of warps [0, num_warps) that `warp` has. Chunk by chunk, so that all domains get theirs
  // at about the same time.
  JAX_EP_DEVICE void send(i32 warp, i32 num_warps) {
    const i32 others = rail_.num_others();
    for (i32 item = warp; item < rail_.num_chunks() * others; item += num_warps) {
      send_message(rail_.domain_at_turn(item % others), item / others);
    }
  }

 private:
  JAX_EP_DEVICE void send_message(i32 domain, i32 chunk) {
    const i64 first = rail_.first_token(chunk);
    const i64 last = rail_.last_token(chunk);
    const TokenSet tokens = tokens_where(
        first, last, [this, domain](i64 token) { return ranks_of(token, domain) != 0; });
    if (lane_id() == 0) rail_.wait_credit(domain, chunk);
    warp_sync();
    // The copy engine, too, comes after what the buffer held before.
    fence_proxy_async_global();
    const Ptr<std::byte> message = rail_.send_buffer(domain, chunk);
    write_header(message, tokens);
    if (c_.op.num_scalars > 0) pack_scalars(domain, first, last, tokens, message);
    if (c_.hidden > 0) pack_rows(first, last, tokens, message);
    bulk_wait<0>();
    rail_.send(domain, chunk, message_.bytes(tokens.count()));
  }

  // One lane: the ranks of a domain, as bits, that hold a row of a token.
  JAX_EP_DEVICE u32 ranks_of(i64 token, i32 domain) const {
    u32 ranks = 0;
    for (i32 k = 0; k < c_.num_topk; ++k) {
      const i32 expert = ld(Ptr<const i32>{c_.op.topk_idx} + (token * c_.num_topk + k));
      const i32 slot = ld(Ptr<const i32>{c_.op.slot} + (token * c_.num_topk + k));
      if (!has_row(c_.shape, expert, slot)) continue;
      const i32 rank = owner_of(expert, c_.shape.num_local_experts());
      if (rail_.domain_of(rank) == domain) ranks |= 1U << rail_.index_of(rank);
    }
    return ranks;
  }

  JAX_EP_DEVICE void pack_scalars(
      i32 domain, i64 first, i64 last, const TokenSet& tokens, Ptr<std::byte> message) const {
    for (i64 token = first; token < last; ++token) {
      const auto i = static_cast<i32>(token - first);
      if (!tokens.has(i)) continue;
      const u32 holders = ranks_of(token, domain);
      const Ptr<std::byte> at = message + message_.scalars(tokens.count(), tokens.position(i));
      clear_part(at, message_.scalar_stride);
      const TokenScalars scalars(at, c_.num_topk);
      if (lane_id() == 0) scalars.write_holders(holders);
      const float scalar = RowPacking<Context>(c_).scalar_of_lane(token);
      const Selections selections =
          PlannedSelections::of(c_, token).within(rail_.rank_at(domain, 0), rail_.num_ranks());
      RowLayout(c_).send_scalars(selections, scalar, [&](i32 rank, u32 position, float of) {
        st(scalars.of(holders, rail_.index_of(rank)) + position, of);
      });
    }
  }

  JAX_EP_DEVICE void pack_rows(i64 first,
                               i64 last,
                               const TokenSet& tokens,
                               Ptr<std::byte> message) {
    const RowPacking<Context> packing(c_);
    if (!c_.bulk) {
      for (i64 token = first; token < last; ++token) {
        const auto i = static_cast<i32>(token - first);
        if (!tokens.has(i)) continue;
        const Ptr<std::byte> at = message + message_.row(tokens.position(i));
        clear_part(at, message_.row_bytes);
        packing.pack_elements(token, at);
      }
      return;
    }
    stream_segments(
        c_.ring,
        first,
        last,
        0,
        c_.segments.count,
        // The first lane stores.
        [&](i64 token) {
          const auto i = static_cast<i32>(token - first);
          return tokens.has(i) && lane_id() == 0 ? tokens.position(i) : -1;
        },
        [&packing](i64 token, i32 segment) { return packing.source(token, segment); },
        [&](i64 token, i32 position, i32 segment, Ptr<u32> stage) {
          packing.pack_segment(token, segment, stage);
          if (position < 0) return;
          bulk_store(message + (message_.row(position) + c_.staged_at(c_.segments.first(segment))),
                     stage,
                     c_.staged_bytes(c_.segments.size(segment, c_.hidden)));
        });
  }

  Context& c_;
  const Rail<Transport>& rail_;
  const MessageLayout& message_;
};

}  // namespace jax_ep::dev

#endif  // JAX_EP_CSRC_KERNELS_INTERNODE_RAIL_SENDER_H_
