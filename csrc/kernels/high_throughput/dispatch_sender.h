// SPDX-License-Identifier: Apache-2.0
// The senders of a dispatch: they send this rank's rows, each once per destination rank, into the
// destinations' staging.
//
// They read x, x_scales, token_scalars, topk_idx and slot, and write the peers' staging. They wait
// for acknowledged, and signal arrived.
#ifndef JAX_EP_CSRC_KERNELS_HIGH_THROUGHPUT_DISPATCH_SENDER_H_
#define JAX_EP_CSRC_KERNELS_HIGH_THROUGHPUT_DISPATCH_SENDER_H_

#include <utility>

#include "csrc/kernels/high_throughput/row_packing.h"

namespace jax_ep::dev {

// Which of a token's selections are sent for: those that a plan has given a row ...
struct PlannedSelections {
  template <typename Context>
  JAX_EP_DEVICE static Selections of(const Context& c, i64 token) {
    return {c.shape, Ptr<const i32>{c.op.topk_idx}, Ptr<const i32>{c.op.slot}, token};
  }
};
// ... or may give one: the plan is being made at the same time.
struct SelectionsToPlan {
  template <typename Context>
  JAX_EP_DEVICE static UnplannedSelections of(const Context& c, i64 token) {
    return {c.exchange.view(), c.shape, Ptr<const i32>{c.op.topk_idx}, token};
  }
};

// `RowLayout` is DispatchExpertLayout or DispatchRankLayout.
template <typename RowLayout, typename Which = PlannedSelections>
class DispatchSender {
  using Context = typename RowLayout::Context;

 public:
  JAX_EP_DEVICE explicit DispatchSender(Context& context) : c_(context) {}

  JAX_EP_DEVICE void send() {
    send_chunks();
    if (tells_all_sent(c_.shape.num_tokens, c_.exchange.view().chunk_target)) {
      c_.exchange.count_sent(c_.num_senders);
    }
  }

  // The same, and no peer is told when all has been sent: of use where there is no tail.
  JAX_EP_DEVICE void send_chunks() {
    WorkQueue work = c_.exchange.sending(c_.parts.count(), c_.num_senders);
    if (!work.has_item()) return;
    c_.exchange.wait_until_writable();
    for (; work.has_item(); work.next()) {
      const i32 flag_idx = work.item();
      const ChunkPart part = c_.parts.at(flag_idx);
      if (c_.hidden > 0 && c_.bulk) {
        send_segments(part);
      } else {
        for (i64 token = part.first_token; token < part.last_token; ++token) {
          const TokenSelections selections = selections_of(token);
          send_scalars(selections, token);
          if (c_.hidden > 0) send_elements(selections, token);
        }
      }
      announce_all();
      unannounced_ = flag_idx;
      segments_since_ = 0;
    }
    announce_all();
  }

 private:
  using TokenSelections = decltype(Which::of(std::declval<const Context&>(), i64{0}));

  JAX_EP_DEVICE TokenSelections selections_of(i64 token) const { return Which::of(c_, token); }
  JAX_EP_DEVICE RowPacking<Context> packing() const { return RowPacking<Context>(c_); }

  // So many segments after a chunk's end it is announced: by then its stores have been written, and
  // the warp need not stand still for them.
  static constexpr i32 kAnnouncedAfter = 2;

  JAX_EP_DEVICE void announce_all() {
    if (unannounced_ < 0) return;
    // Not only read: the rows are in the peers' memory before the chunk is said to be.
    bulk_wait<0>();
    announce();
  }
  // Before another segment is sent.
  JAX_EP_DEVICE void announce_if_written() {
    if (unannounced_ < 0 || segments_since_++ < kAnnouncedAfter) return;
    bulk_wait<kAnnouncedAfter>();  // of the segments since alone, stores may be on their way
    announce();
  }
  JAX_EP_DEVICE void announce() {
    c_.exchange.signal_arrived(unannounced_);
    unannounced_ = -1;
  }

  JAX_EP_DEVICE void send_segments(const ChunkPart& part) {
    const auto dest_of = [this, &part](i64 token) {
      const TokenSelections selections = selections_of(token);
      if (part.has_scalars) send_scalars(selections, token);
      const bool sends = selections.leads() && selections.dest() != c_.unstaged_rank;
      return sends ? selections.dest() : -1;
    };
    const auto source_of = [this](i64 token, i32 segment) {
      return packing().source(token, segment);
    };
    stream_segments(c_.ring,
                    part.first_token,
                    part.last_token,
                    part.first_segment,
                    part.last_segment,
                    dest_of,
                    source_of,
                    [this](i64 token, i32 dest, i32 segment, Ptr<u32> stage) {
                      announce_if_written();
                      send_segment(token, dest, segment, stage);
                    });
  }

  JAX_EP_DEVICE void send_segment(i64 token, i32 dest, i32 segment, Ptr<u32> stage) {
    packing().pack_segment(token, segment, stage);
    if (dest < 0) return;
    put_segment(c_.exchange.view(),
                dest,
                token,
                c_.staged_at(c_.segments.first(segment)),
                stage,
                c_.staged_bytes(c_.segments.size(segment, c_.hidden)));
  }

  JAX_EP_DEVICE void send_scalars(const TokenSelections& selections, i64 token) {
    if (c_.op.num_scalars == 0) return;
    const float scalar = packing().scalar_of_lane(token);
    RowLayout(c_).send_scalars(selections, scalar, [this, token](i32 dest, u32 position, float of) {
      put_scalar(c_.exchange.view(), dest, token, c_.num_topk, position, of);
    });
  }

  JAX_EP_DEVICE void send_elements(const TokenSelections& selections, i64 token) {
    u32 leaders = warp_ballot(selections.leads() && selections.dest() != c_.unstaged_rank);
    for (; leaders != 0; leaders &= leaders - 1) {
      const auto dest =
          static_cast<i32>(warp_shfl(static_cast<u32>(selections.dest()), lowest_bit(leaders)));
      packing().pack_elements(token, peer_row(c_.exchange.view(), dest, token));
    }
  }

  Context& c_;
  i32 unannounced_ = -1;  // a chunk that is sent, and not yet said to be; -1: none
  i32 segments_since_ = 0;
};

}  // namespace jax_ep::dev

#endif  // JAX_EP_CSRC_KERNELS_HIGH_THROUGHPUT_DISPATCH_SENDER_H_
