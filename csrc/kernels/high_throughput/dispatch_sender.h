// SPDX-License-Identifier: Apache-2.0
// The senders of a dispatch: they send this rank's rows, each once per destination rank, into the
// destinations' staging.
//
// They read x, x_scales, token_scalars, topk_idx and slot, and write the peers' staging. They wait
// for acknowledged, and signal arrived.
#ifndef JAX_EP_CSRC_KERNELS_HIGH_THROUGHPUT_DISPATCH_SENDER_H_
#define JAX_EP_CSRC_KERNELS_HIGH_THROUGHPUT_DISPATCH_SENDER_H_

#include <type_traits>

#include "csrc/kernels/high_throughput/dispatch_context.h"

namespace jax_ep::dev {

// `RowLayout` is DispatchExpertLayout or DispatchRankLayout. Of the selections of a token they read
// the slots, or not if `kPlanned` is false: then the plan is being made at the same time.
template <typename RowLayout, bool kPlanned = true>
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

 private:
  using RowType = typename RowLayout::RowType;
  using Element = typename RowType::Element;
  using TokenSelections = std::conditional_t<kPlanned, Selections, UnplannedSelections>;

  JAX_EP_DEVICE TokenSelections selections_of(i64 token) const {
    const Ptr<const i32> topk_idx{c_.op.topk_idx};
    if constexpr (kPlanned) {
      return Selections(c_.shape, topk_idx, Ptr<const i32>{c_.op.slot}, token);
    } else {
      return UnplannedSelections(c_.exchange.view(), c_.shape, topk_idx, token);
    }
  }

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
      return SegmentSource{c_.x_row(token) + c_.segments.first(segment) * c_.x_bytes,
                           static_cast<u32>(c_.segments.size(segment, c_.hidden) * c_.x_bytes)};
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
    const i32 num_elements = c_.segments.size(segment, c_.hidden);
    const i64 first = c_.segments.first(segment);
    if (c_.quantizes()) {
      quantize_segment<RowType>(stage, num_elements);
    } else if (c_.fp8_wire()) {
      const i64 block = first / kScaleBlock + lane_id();
      const bool is_block = static_cast<i64>(lane_id()) * kScaleBlock < num_elements;
      const auto scales = Ptr<const float>{c_.op.x_scales} + token * c_.num_scale_blocks;
      complete_segment(stage, num_elements, is_block ? ld(scales + block) : 0.0F);
    }
    if (dest < 0) return;
    put_segment(
        c_.exchange.view(), dest, token, c_.staged_at(first), stage, c_.staged_bytes(num_elements));
  }

  JAX_EP_DEVICE void send_scalars(const TokenSelections& selections, i64 token) {
    if (c_.op.num_scalars == 0) return;
    const u32 lane = lane_id();
    const bool is_selection = lane < static_cast<u32>(c_.num_topk);
    const float scalar =
        is_selection ? ld(Ptr<const float>{c_.op.token_scalars} + (token * c_.num_topk + lane))
                     : 0.0F;
    RowLayout(c_).send_scalars(selections, token, scalar);
  }

  JAX_EP_DEVICE void send_elements(const TokenSelections& selections, i64 token) {
    u32 leaders = warp_ballot(selections.leads() && selections.dest() != c_.unstaged_rank);
    for (; leaders != 0; leaders &= leaders - 1) {
      const auto dest =
          static_cast<i32>(warp_shfl(static_cast<u32>(selections.dest()), lowest_bit(leaders)));
      const Ptr<std::byte> to = peer_row(c_.exchange.view(), dest, token);
      if (c_.quantizes()) {
        quantize_elements(token, to);
      } else if (c_.fp8_wire()) {
        c_.copy_elements(as<u8>(to), as<const u8>(c_.x_row(token)));
        c_.copy_scales(c_.scales_behind(to),
                       Ptr<const float>{c_.op.x_scales} + token * c_.num_scale_blocks);
      } else {
        c_.copy_elements(as<Element>(to), as<const Element>(c_.x_row(token)));
      }
    }
  }

  JAX_EP_DEVICE void quantize_elements(i64 token, Ptr<std::byte> to) const {
    for (i64 block = 0; block < c_.num_scale_blocks; ++block) {
      const BlockOfElements<RowType> elements(as<const Element>(c_.x_row(token)), block, c_.hidden);
      const Divider scaled(elements.scale);
      for (int i = 0; i < elements.kPerLane; ++i) {
        const i64 element = elements.element(block, i);
        if (element >= c_.hidden) continue;
        st(as<u8>(to) + element, to_fp8(scaled(elements.value[i])));
      }
      if (lane_id() == 0) st(c_.scales_behind(to) + block, elements.scale);
    }
  }

  Context& c_;
  i32 unannounced_ = -1;  // a chunk that is sent, and not yet said to be; -1: none
  i32 segments_since_ = 0;
};

}  // namespace jax_ep::dev

#endif  // JAX_EP_CSRC_KERNELS_HIGH_THROUGHPUT_DISPATCH_SENDER_H_
