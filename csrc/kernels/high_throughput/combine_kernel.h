// SPDX-License-Identifier: Apache-2.0
// Combine: a block's first warps sum the rows that this rank holds of other ranks' tokens, and send
// one row per token to its owner; meanwhile the others sum what the ranks have sent for this rank's
// own tokens, in ascending order of the ranks, and so do the first, when they have sent. What this
// rank itself holds of its own tokens is summed, and rounded, where it is added. All work chunk by
// chunk of the owner's tokens.
//
// What the layouts differ in is in combine_expert_layout.h and combine_rank_layout.h: a kernel is
// compiled for one of them, and the launch chooses.
#ifndef JAX_EP_CSRC_KERNELS_HIGH_THROUGHPUT_COMBINE_KERNEL_H_
#define JAX_EP_CSRC_KERNELS_HIGH_THROUGHPUT_COMBINE_KERNEL_H_

#include "csrc/kernels/high_throughput/combine_expert_layout.h"
#include "csrc/kernels/high_throughput/combine_rank_layout.h"

namespace jax_ep::dev {

// `RowLayout` is CombineExpertLayout or CombineRankLayout, of a CombineContext.
template <typename RowLayout>
class CombineKernel {
 public:
  static constexpr bool kHasTail = false;

  JAX_EP_DEVICE explicit CombineKernel(const CombineParams& params) : c_(params) {}

  JAX_EP_DEVICE void run() {
    if (c_.exchange.closed()) return leave_no_results();
    if (warp_id() < c_.num_senders) send();
    receive();
    c_.exchange.finish();
  }

 private:
  using Context = typename RowLayout::Context;
  using Config = typename Context::Config;
  using RowType = typename Context::RowType;

  JAX_EP_DEVICE RowLayout layout() const { return RowLayout(c_); }

  // Sums the rows of a part of a chunk; `terms_of(token)` also moves scalars, of the first part.
  template <bool kHasOthers, typename TermsOf, typename OutOf>
  JAX_EP_DEVICE void sum(const ChunkPart& part, const TermsOf& terms_of, const OutOf& out_of) {
    constexpr bool kByDomain = kHasOthers && Config::kByDomain;
    if constexpr (!kByDomain) {
      if (c_.bulk && c_.hidden > 0) {
        SumStream<RowType, kHasOthers, typename Config::Stages, TermsOf, OutOf>(
            c_.ring, c_.segments, c_.hidden, terms_of, out_of)
            .run(part.first_token, part.last_token, part.first_segment, part.last_segment);
        return;
      }
    }
    for (i64 token = part.first_token; token < part.last_token; ++token) {
      const SumTerms terms = terms_of(token);
      if (terms.count() == 0) continue;
      const auto sum_in = [&]<typename Unit>(Unit /*a unit*/) {
        sum_units<RowType, kHasOthers, Unit>(terms,
                                             c_.domain_of(c_.rank),
                                             units_before<Unit>(part.first_segment),
                                             units_before<Unit>(part.last_segment),
                                             out_of(token));
      };
      if constexpr (kByDomain) {
        if (c_.bulk) {
          sum_in(Vec16{});
          continue;
        }
      }
      sum_in(typename RowType::Element{});
    }
  }
  // Of a row, in front of a segment.
  template <typename Unit>
  JAX_EP_DEVICE i64 units_before(i32 segment) const {
    const i64 elements = segment < c_.segments.count ? c_.segments.first(segment) : c_.hidden;
    return elements * Context::kElementBytes / static_cast<i64>(sizeof(Unit));
  }

  JAX_EP_DEVICE i32 held_row(i32 owner, i64 token) const {
    return row_of_lane(
        c_.shape, RowLayout::kLayout, Ptr<const i32>{c_.params.op.source_slot}, owner, token);
  }

  // --- the senders -----------------------------------------------------------------------------
  // Read y, weights, row_scalars, row_topk_idx, source_slot. Write the owners' staging. Wait for
  // acknowledged, signal arrived.

  JAX_EP_DEVICE void send() {
    const i32 num_others = c_.num_ranks - 1;
    WorkQueue work = c_.exchange.sending(c_.parts.count() * num_others, c_.num_senders);
    if (!work.has_item()) return;
    c_.exchange.wait_until_writable();
    // Chunk by chunk; each rank begins with another owner.
    for (; work.has_item(); work.next()) {
      const i32 flag_idx = work.item() / num_others;
      const i32 owner = peer_at_turn(c_.exchange.view(), 1 + work.item() % num_others);
      if (owner < 0) continue;
      const ChunkPart part = c_.parts.at(flag_idx);
      const bool sends_scalars = part.has_scalars && c_.params.op.num_scalars != 0;
      sum<false>(
          part,
          [this, owner, sends_scalars](i64 token) {
            const i32 row = held_row(owner, token);
            if (sends_scalars) layout().send_scalars(owner, token, row);
            return layout().held_terms(row);
          },
          [this, owner](i64 token) { return peer_row(c_.exchange.view(), owner, token); });
      c_.exchange.signal_arrived_at(owner, flag_idx);
    }
  }

  // --- the receivers ---------------------------------------------------------------------------
  // Read this rank's staging, topk_idx, slot, and of its own tokens what the senders read. Write
  // out, token_scalars. Wait for arrived.

  JAX_EP_DEVICE void receive() {
    for (WorkQueue work = c_.exchange.receiving(c_.parts.count(), c_.num_senders); work.has_item();
         work.next()) {
      const i32 flag_idx = work.item();
      share_out_peers(c_.exchange.view(), [this, flag_idx](i32 source) {
        if (source != c_.rank) c_.exchange.wait_arrived(source, flag_idx);
      });
      warp_sync();
      const ChunkPart part = c_.parts.at(flag_idx);
      const bool is_first = part.has_scalars;
      sum<true>(
          part,
          [this, is_first](i64 token) {
            const Selections selections(c_.shape,
                                        Ptr<const i32>{c_.params.op.topk_idx},
                                        Ptr<const i32>{c_.params.op.slot},
                                        token);
            if (is_first) receive_scalars(selections, token);
            const SumTerms terms = received_terms(selections, token);
            if (terms.count() == 0 && is_first) clear_row(token);
            return terms;
          },
          [this](i64 token) { return c_.out_row(token); });
    }
  }

  // This rank's own rows, and one of each other rank that holds the token, ascending.
  JAX_EP_DEVICE SumTerms received_terms(const Selections& selections, i64 token) const {
    const bool leads = selections.leads() && selections.dest() != c_.rank;
    const u32 others = warp_ballot(leads);
    SumTerms terms = layout().held_terms(held_row(c_.rank, token));
    // Of a plan's there are at most num_topk in all. Those of a handle from elsewhere fit too.
    const i32 lanes = static_cast<i32>(kWarpSize - count_bits(others));
    terms.set(terms.own() < lanes ? terms.own() : lanes,
              terms.weights_per_row(),
              static_cast<i32>(count_bits(others)),
              static_cast<i32>(count_bits(warp_ballot(leads && selections.dest() < c_.rank))));
    i32 place = terms.own();
    JAX_EP_NO_UNROLL
    for (i32 k = 0; k < c_.num_topk; ++k) {
      const auto other =
          static_cast<i32>(warp_shfl(static_cast<u32>(selections.dest()), static_cast<u32>(k)));
      place += static_cast<i32>((others >> k & 1) != 0 && other < selections.dest());
    }
    const i32 from = lane_with_place(leads ? place : -1, c_.num_topk);
    const auto source = static_cast<i32>(
        warp_shfl(static_cast<u32>(selections.dest()), static_cast<u32>(from < 0 ? 0 : from)));
    terms.domain = c_.domain_of(source);
    if (from >= 0) terms.row = {staged_row(c_.exchange.view(), c_.rank, source, token).raw};
    return terms;
  }

  // The sum of a token that nobody holds.
  JAX_EP_DEVICE void clear_row(i64 token) const {
    c_.bulk ? clear<Vec16>(c_.out_row(token), c_.row_bytes)
            : clear<typename RowType::Element>(c_.out_row(token), c_.row_bytes);
  }

  JAX_EP_DEVICE void receive_scalars(const Selections& selections, i64 token) {
    if (c_.params.op.num_scalars == 0) return;
    const u32 lane = lane_id();
    const u32 position = layout().scalar_position(selections);
    if (lane >= static_cast<u32>(c_.num_topk)) return;
    float scalar = 0.0F;
    if (selections.live() && selections.dest() == c_.rank) {
      scalar = c_.row_scalar(layout().own_scalar_at(selections));
    } else if (selections.live()) {
      scalar =
          ld(staged_scalars(c_.exchange.view(), c_.rank, selections.dest(), token, c_.num_topk) +
             position);
    }
    st(Ptr<float>{c_.params.op.token_scalars} + (token * c_.num_topk + lane), scalar);
  }

  // --- when the group has been closed ----------------------------------------------------------

  JAX_EP_DEVICE void leave_no_results() {
    const i64 num_tokens = c_.shape.num_tokens;
    c_.exchange.poison(static_cast<typename RowType::Element*>(c_.params.op.out),
                       num_tokens * c_.hidden);
    if (c_.params.op.num_scalars > 0) {
      c_.exchange.poison(reinterpret_cast<u32*>(c_.params.op.token_scalars),
                         num_tokens * c_.num_topk);
    }
    c_.exchange.report_closed();
  }

  Context c_;
};

}  // namespace jax_ep::dev

#endif  // JAX_EP_CSRC_KERNELS_HIGH_THROUGHPUT_COMBINE_KERNEL_H_
