// SPDX-License-Identifier: Apache-2.0
// Combine: a block's first warps sum the rows that this rank holds of other ranks' tokens, and send
// one row per token to its owner; meanwhile the others sum what the ranks have sent for this rank's
// own tokens, in ascending order of the ranks, and so do the first, when they have sent. What this
// rank itself holds of its own tokens is summed, and rounded, where it is added. All work chunk by
// chunk of the owner's tokens.
#ifndef JAX_EP_CSRC_KERNELS_HIGH_THROUGHPUT_COMBINE_KERNEL_H_
#define JAX_EP_CSRC_KERNELS_HIGH_THROUGHPUT_COMBINE_KERNEL_H_

#include "csrc/device/exchange.h"
#include "csrc/device/row_sum.h"
#include "csrc/device/token_selections.h"

namespace jax_ep::dev {

template <int kWarpCount, int kStageCount, int kSegmentBytes>
struct CombineConfig {
  static constexpr int kWarps = kWarpCount;
  static constexpr int kStages = kStageCount;
  using Stages = TermStages<kStages, kSegmentBytes>;

  struct SharedStorage {
    Stages stages[kWarps];
  };
};

template <typename Config, typename RowType>
class CombineKernel {
 public:
  static constexpr bool kHasTail = false;

  JAX_EP_DEVICE explicit CombineKernel(const CombineParams& params)
      : params_(params),
        shape_(params.op.shape),
        exchange_(params.view,
                  params.blocks,
                  Channel::kHighThroughput,
                  OpKind::kCombine,
                  params.call_tag,
                  params.program_rank),
        ring_(shared<typename Config::SharedStorage>().stages[warp_id()]),
        hidden_(params.op.hidden),
        row_bytes_(hidden_ * kElementBytes),
        bulk_(row_bytes_ % 16 == 0),
        segments_(hidden_, Config::Stages::kSegmentBytes / kElementBytes),
        num_senders_(static_cast<u32>(params.num_senders)),
        rank_(params.view.rank),
        num_ranks_(params.view.num_ranks),
        num_topk_(shape_.num_topk),
        num_tokens_(shape_.num_tokens),
        chunk_tokens_(chunk_tokens(OpKind::kCombine, num_tokens_, params.view.chunk_target)),
        num_chunks_(num_chunks(OpKind::kCombine, num_tokens_, params.view.chunk_target)),
        num_parts_(bulk_ ? num_parts(num_chunks_, segments_.count, params.view.chunk_target) : 1) {}

  JAX_EP_DEVICE void run() {
    if (exchange_.closed()) return leave_no_results();
    if (warp_id() < num_senders_) send();
    receive();
    exchange_.finish();
  }

 private:
  static constexpr i32 kElementBytes = sizeof(typename RowType::Element);

  JAX_EP_DEVICE bool is_rank_major() const { return shape_.layout == Layout::kRank; }
  JAX_EP_DEVICE i64 first_token(i32 chunk) const { return i64{chunk} * chunk_tokens_; }
  JAX_EP_DEVICE i64 last_token(i32 chunk) const {
    const i64 last = first_token(chunk) + chunk_tokens_;
    return last < num_tokens_ ? last : num_tokens_;
  }
  JAX_EP_DEVICE i32 first_segment(i32 part) const { return part * segments_.count / num_parts_; }
  JAX_EP_DEVICE Ptr<const std::byte> y_row(i32 row) const {
    return Ptr<const std::byte>{static_cast<const std::byte*>(params_.op.y)} + row * row_bytes_;
  }

  // Sums the rows of a part of a chunk; `terms_of(token)` also moves scalars, of part 0.
  template <bool kHasOthers, typename TermsOf, typename OutOf>
  JAX_EP_DEVICE void sum(i32 flag_idx, const TermsOf& terms_of, const OutOf& out_of) {
    const i64 first = first_token(flag_idx / num_parts_);
    const i64 last = last_token(flag_idx / num_parts_);
    const i32 part = flag_idx % num_parts_;
    if (bulk_ && hidden_ > 0) {
      SumStream<RowType, kHasOthers, typename Config::Stages, TermsOf, OutOf>(
          ring_, segments_, hidden_, terms_of, out_of)
          .run(first, last, first_segment(part), first_segment(part + 1));
      return;
    }
    for (i64 token = first; token < last; ++token) {
      const SumTerms terms = terms_of(token);
      if (terms.count() > 0) {
        sum_elements<RowType, kHasOthers>(terms, hidden_, out_of(token));
      }
    }
  }

  // --- what this rank holds of a token -----------------------------------------------------------

  JAX_EP_DEVICE i32 held_row(i32 owner, i64 token) const {
    return row_of_lane(shape_, Ptr<const i32>{params_.op.source_slot}, owner, token);
  }

  // The terms of these rows, in the first lanes. All lanes.
  JAX_EP_DEVICE SumTerms held_terms(i32 row) const {
    const u32 holders = warp_ballot(row >= 0);
    SumTerms terms{};
    terms.set(static_cast<i32>(count_bits(holders)), 1);
    if (holders == 0) return terms;
    if (is_rank_major() && params_.op.weighted) {
      // One row, of all of the token's selections here.
      const auto only = static_cast<i32>(warp_shfl(static_cast<u32>(row), 0));
      terms.row = y_row(only);
      list_weights(only, terms);
      return terms;
    }
    // One term per row that holds the token, ascending, as its experts are. The rows of a plan have
    // no holes; those of a handle from elsewhere may.
    const i32 place =
        row >= 0 ? static_cast<i32>(count_bits(holders & lanes_below(lane_id()))) : -1;
    const bool weighted = row >= 0 && params_.op.weighted;
    const float weight = weighted ? ld(Ptr<const float>{params_.op.weights} + row) : 1.0F;
    if ((holders & (holders + 1)) == 0) {
      terms.row = y_row(row);
      terms.weight = weight;
      return terms;
    }
    const i32 from = lane_with_place(place, num_topk_);
    const i32 lane = from < 0 ? 0 : from;
    terms.row = y_row(static_cast<i32>(warp_shfl(static_cast<u32>(row), static_cast<u32>(lane))));
    terms.weight = shfl_float(weight, lane);
    return terms;
  }

  // Layout "rank": one weight per selection of the token here, by ascending expert.
  JAX_EP_DEVICE void list_weights(i32 row, SumTerms& terms) const {
    const i64 at = i64{row} * num_topk_ + lane_id();
    const bool is_selection = static_cast<i32>(lane_id()) < num_topk_;
    const i32 local = is_selection ? ld(Ptr<const i32>{params_.op.row_topk_idx} + at) : -1;
    const float weight = local >= 0 ? ld(Ptr<const float>{params_.op.weights} + at) : 0.0F;
    i32 place = 0;
    JAX_EP_NO_UNROLL
    for (i32 k = 0; k < num_topk_; ++k) {
      const auto other = static_cast<i32>(warp_shfl(static_cast<u32>(local), static_cast<u32>(k)));
      // A plan's are distinct. Those of a handle from elsewhere may be equal, and each must have a
      // place of its own: the sum reads as many as there are.
      const bool earlier = other == local && k < static_cast<i32>(lane_id());
      place += static_cast<i32>(other >= 0 && (other < local || earlier));
    }
    const i32 from = lane_with_place(local >= 0 ? place : -1, num_topk_);
    // A handle from elsewhere may have a row of no selections: it counts with a weight of 0.
    const float weight_of_lane = shfl_float(weight, from < 0 ? 0 : from);
    const auto count = static_cast<i32>(count_bits(warp_ballot(local >= 0)));
    terms.weight = from < 0 ? 0.0F : weight_of_lane;
    terms.set(terms.own(), count > 0 ? count : 1);
  }

  // --- the senders -----------------------------------------------------------------------------
  // Read y, weights, row_scalars, row_topk_idx, source_slot. Write the owners' staging. Wait for
  // acknowledged, signal arrived.

  JAX_EP_DEVICE void send() {
    const i32 num_others = num_ranks_ - 1;
    WorkQueue work = exchange_.sending(num_chunks_ * num_parts_ * num_others, num_senders_);
    if (!work.has_item()) return;
    exchange_.wait_until_writable();
    // Chunk by chunk; each rank begins with another owner.
    for (; work.has_item(); work.next()) {
      const i32 flag_idx = work.item() / num_others;
      const i32 owner = peer_at_turn(exchange_.view(), 1 + work.item() % num_others);
      if (owner < 0) continue;
      sum<false>(
          flag_idx,
          [this, owner, flag_idx](i64 token) {
            const i32 row = held_row(owner, token);
            if (flag_idx % num_parts_ == 0) send_scalars(owner, token, row);
            return held_terms(row);
          },
          [this, owner](i64 token) { return peer_row(exchange_.view(), owner, token); });
      exchange_.signal_arrived_at(owner, flag_idx);
    }
  }

  JAX_EP_DEVICE void send_scalars(i32 owner, i64 token, i32 row) {
    if (params_.op.num_scalars == 0) return;
    const u32 lane = lane_id();
    if (!is_rank_major()) {
      if (row < 0) return;
      const float scalar = ld(Ptr<const float>{params_.op.row_scalars} + row);
      return put_scalar(exchange_.view(), owner, token, num_topk_, lane, scalar);
    }
    const auto from = static_cast<i32>(warp_shfl(static_cast<u32>(row), 0));
    if (from < 0 || lane >= static_cast<u32>(num_topk_)) return;
    const float scalar =
        ld(Ptr<const float>{params_.op.row_scalars} + (i64{from} * num_topk_ + lane));
    put_scalar(exchange_.view(), owner, token, num_topk_, lane, scalar);
  }

  // --- the receivers ---------------------------------------------------------------------------
  // Read this rank's staging, topk_idx, slot, and of its own tokens what the senders read. Write
  // out, token_scalars. Wait for arrived.

  JAX_EP_DEVICE void receive() {
    for (WorkQueue work = exchange_.receiving(num_chunks_ * num_parts_, num_senders_);
         work.has_item();
         work.next()) {
      const i32 flag_idx = work.item();
      share_out_peers(exchange_.view(), [this, flag_idx](i32 source) {
        if (source != rank_) exchange_.wait_arrived(source, flag_idx);
      });
      warp_sync();
      sum<true>(
          flag_idx,
          [this, flag_idx](i64 token) {
            const Selections selections(shape_,
                                        Ptr<const i32>{params_.op.topk_idx},
                                        Ptr<const i32>{params_.op.slot},
                                        token);
            if (flag_idx % num_parts_ == 0) receive_scalars(selections, token);
            const SumTerms terms = received_terms(selections, token);
            if (terms.count() == 0 && flag_idx % num_parts_ == 0) clear_row(token);
            return terms;
          },
          [this](i64 token) { return out_row(token); });
    }
  }

  JAX_EP_DEVICE Ptr<std::byte> out_row(i64 token) const {
    return Ptr<std::byte>{static_cast<std::byte*>(params_.op.out)} + token * row_bytes_;
  }

  // This rank's own rows, and one of each other rank that holds the token, ascending.
  JAX_EP_DEVICE SumTerms received_terms(const Selections& selections, i64 token) const {
    const bool leads = selections.leads() && selections.dest() != rank_;
    const u32 others = warp_ballot(leads);
    SumTerms terms = held_terms(held_row(rank_, token));
    // Of a plan's there are at most num_topk in all. Those of a handle from elsewhere fit too.
    const i32 lanes = static_cast<i32>(kWarpSize - count_bits(others));
    terms.set(terms.own() < lanes ? terms.own() : lanes,
              terms.weights_per_row(),
              static_cast<i32>(count_bits(others)),
              static_cast<i32>(count_bits(warp_ballot(leads && selections.dest() < rank_))));
    i32 place = terms.own();
    JAX_EP_NO_UNROLL
    for (i32 k = 0; k < num_topk_; ++k) {
      const auto other =
          static_cast<i32>(warp_shfl(static_cast<u32>(selections.dest()), static_cast<u32>(k)));
      place += static_cast<i32>((others >> k & 1) != 0 && other < selections.dest());
    }
    const i32 from = lane_with_place(leads ? place : -1, num_topk_);
    const auto source = static_cast<i32>(
        warp_shfl(static_cast<u32>(selections.dest()), static_cast<u32>(from < 0 ? 0 : from)));
    if (from >= 0) terms.row = {staged_row(exchange_.view(), rank_, source, token).raw};
    return terms;
  }

  // The sum of a token that nobody holds.
  JAX_EP_DEVICE void clear_row(i64 token) const {
    bulk_ ? clear<Vec16>(out_row(token), row_bytes_)
          : clear<typename RowType::Element>(out_row(token), row_bytes_);
  }

  JAX_EP_DEVICE void receive_scalars(const Selections& selections, i64 token) {
    if (params_.op.num_scalars == 0) return;
    const u32 lane = lane_id();
    const u32 position = is_rank_major() ? lane : selections.position(num_topk_);
    if (lane >= static_cast<u32>(num_topk_)) return;
    float scalar = 0.0F;
    if (selections.live() && selections.dest() == rank_) {
      const i64 at =
          is_rank_major() ? i64{selections.slot()} * num_topk_ + lane : i64{selections.slot()};
      scalar = ld(Ptr<const float>{params_.op.row_scalars} + at);
    } else if (selections.live()) {
      scalar = ld(staged_scalars(exchange_.view(), rank_, selections.dest(), token, num_topk_) +
                  position);
    }
    st(Ptr<float>{params_.op.token_scalars} + (token * num_topk_ + lane), scalar);
  }

  // --- when the group has been closed ----------------------------------------------------------

  JAX_EP_DEVICE void leave_no_results() {
    exchange_.poison(static_cast<typename RowType::Element*>(params_.op.out),
                     num_tokens_ * hidden_);
    if (params_.op.num_scalars > 0) {
      exchange_.poison(reinterpret_cast<u32*>(params_.op.token_scalars), num_tokens_ * num_topk_);
    }
    exchange_.report_closed();
  }

  const CombineParams& params_;
  const EpShape& shape_;
  const Exchange exchange_;
  TermRing<typename Config::Stages> ring_;
  const i64 hidden_;
  const i64 row_bytes_;
  const bool bulk_;  // rows are moved 16 bytes at a time
  const Segments segments_;
  const u32 num_senders_;  // of a block's warps
  const i32 rank_;
  const i32 num_ranks_;
  const i32 num_topk_;
  const i64 num_tokens_;
  const i32 chunk_tokens_;
  const i32 num_chunks_;
  const i32 num_parts_;  // of a row: runs of segments
};

}  // namespace jax_ep::dev

#endif  // JAX_EP_CSRC_KERNELS_HIGH_THROUGHPUT_COMBINE_KERNEL_H_
