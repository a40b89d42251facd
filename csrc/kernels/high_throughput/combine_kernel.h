// SPDX-License-Identifier: Apache-2.0
// Combine: a block's first warps sum the rows that this rank holds of each token, and send one row
// per token to its owner; meanwhile the others sum what the ranks have sent for this rank's own
// tokens, in ascending order of the ranks, and so do the first, when they have sent. All work chunk
// by chunk of the owner's tokens.
#ifndef JAX_EP_CSRC_KERNELS_HIGH_THROUGHPUT_COMBINE_KERNEL_H_
#define JAX_EP_CSRC_KERNELS_HIGH_THROUGHPUT_COMBINE_KERNEL_H_

#include "csrc/device/exchange.h"
#include "csrc/device/row_sum.h"
#include "csrc/device/token_selections.h"

namespace jax_ep::dev {

template <int kSenderWarps, int kOtherWarps, int kVectorsInFlight, int kMinMovesOfAPart>
struct CombineConfig {
  static constexpr int kSenders = kSenderWarps;
  static constexpr int kWarps = kSenders + kOtherWarps;
  static constexpr int kStages = 0;
  static constexpr int kVectors = kVectorsInFlight;
  static constexpr int kMinMoves = kMinMovesOfAPart;  // fewer are not worth a warp

  struct SharedStorage {
    SumTerms terms[kWarps];
  };
};

template <typename Config, typename RowType>
class CombineKernel {
 public:
  JAX_EP_DEVICE explicit CombineKernel(const CombineParams& params)
      : params_(params),
        shape_(params.op.shape),
        exchange_(params.view,
                  Channel::kHighThroughput,
                  OpKind::kCombine,
                  params.call_tag,
                  params.program_rank),
        terms_(shared<typename Config::SharedStorage>().terms[warp_id()]),
        hidden_(params.op.hidden),
        row_bytes_(hidden_ * static_cast<i64>(sizeof(typename RowType::Element))),
        vectors_(row_bytes_ % 16 == 0),
        rank_(params.view.rank),
        num_ranks_(params.view.num_ranks),
        num_topk_(shape_.num_topk),
        num_tokens_(shape_.num_tokens),
        chunk_tokens_(chunk_tokens(num_tokens_, params.view.chunk_target)),
        num_chunks_(num_chunks(num_tokens_, params.view.chunk_target)),
        num_moves_(hidden_ / (vectors_ ? kElementsPerMove<RowType, Config::kVectors> : 1)),
        num_parts_(num_parts(num_chunks_,
                             static_cast<i32>(num_moves_ / Config::kMinMoves),
                             params.view.chunk_target)) {}

  JAX_EP_DEVICE void run() {
    if (exchange_.closed()) return leave_no_results();
    if (warp_id() < Config::kSenders) send();
    receive();
    exchange_.finish();
  }

 private:
  JAX_EP_DEVICE bool is_rank_major() const { return shape_.layout == Layout::kRank; }
  JAX_EP_DEVICE i64 first_token(i32 chunk) const { return i64{chunk} * chunk_tokens_; }
  JAX_EP_DEVICE i64 last_token(i32 chunk) const {
    const i64 last = first_token(chunk) + chunk_tokens_;
    return last < num_tokens_ ? last : num_tokens_;
  }

  template <typename RowOf>
  JAX_EP_DEVICE void sum(i32 count, i32 part, const RowOf& row_of, Ptr<std::byte> out) {
    const i64 first = part * num_moves_ / num_parts_;
    const i64 last = (part + 1) * num_moves_ / num_parts_;
    if (vectors_) {
      sum_rows<RowType, Config::kVectors>(terms_, count, first, last, row_of, out);
    } else {
      sum_rows<RowType, 0>(terms_, count, first, last, row_of, out);
    }
  }

  // --- the senders -----------------------------------------------------------------------------
  // Read y, weights, row_scalars, row_topk_idx, source_slot. Write the owners' staging. Wait for
  // acknowledged, signal arrived.

  JAX_EP_DEVICE void send() {
    const auto warp = static_cast<i32>(block_id() * Config::kSenders + warp_id());
    const auto num_warps = static_cast<i32>(num_blocks() * Config::kSenders);
    const i64 num_items = i64{num_chunks_} * num_parts_ * num_ranks_;
    if (warp >= num_items) return;
    exchange_.wait_until_writable();
    // Chunk by chunk; each rank begins with another owner.
    for (i64 item = warp; item < num_items; item += num_warps) {
      const auto flag_idx = static_cast<i32>(item / num_ranks_);
      const i32 owner = peer_at_turn(exchange_.view(), static_cast<i32>(item % num_ranks_));
      if (owner < 0) continue;
      const i64 last = last_token(flag_idx / num_parts_);
      for (i64 token = first_token(flag_idx / num_parts_); token < last; ++token) {
        send_token(owner, token, flag_idx % num_parts_);
      }
      exchange_.signal_arrived_at(owner, flag_idx);
    }
  }

  JAX_EP_DEVICE void send_token(i32 owner, i64 token, i32 part) {
    const i32 max_rows = max_rows_per_token(shape_.layout, num_topk_, shape_.num_local_experts());
    const i64 global_token = owner * num_tokens_ + token;
    i32 row = -1;
    if (static_cast<i32>(lane_id()) < max_rows) {
      row = ld(Ptr<const i32>{params_.op.source_slot} + (global_token * max_rows + lane_id()));
    }
    if (row >= shape_.recv_capacity) row = -1;
    const u32 holders = warp_ballot(row >= 0);
    if (holders == 0) return;
    if (part == 0) send_scalars(owner, token, row);
    if (hidden_ == 0) return;
    const i32 count =
        is_rank_major() && params_.op.weighted ? list_selections(row) : list_rows(row, holders);
    warp_sync();
    sum(
        count,
        part,
        [this](i32 term) {
          return Ptr<const std::byte>{static_cast<const std::byte*>(params_.op.y)} +
                 term * row_bytes_;
        },
        peer_row(exchange_.view(), owner, token));
    warp_sync();  // the terms are read before the next token's are written
  }

  // One term per row that holds the token, ascending, as its experts are.
  JAX_EP_DEVICE i32 list_rows(i32 row, u32 holders) {
    if (row >= 0) {
      // The rows of a plan have no holes; those of a handle from elsewhere may.
      const u32 position = count_bits(holders & lanes_below(lane_id()));
      terms_.row[position] = row;
      terms_.weight[position] =
          params_.op.weighted ? ld(Ptr<const float>{params_.op.weights} + row) : 1.0F;
    }
    return static_cast<i32>(count_bits(holders));
  }

  // Layout "rank": one term per selection of the token here, by ascending expert, all of one row.
  JAX_EP_DEVICE i32 list_selections(i32 row_of_lane_0) {
    const auto row = static_cast<i32>(warp_shfl(static_cast<u32>(row_of_lane_0), 0));
    const i64 at = i64{row} * num_topk_ + lane_id();
    const bool is_selection = static_cast<i32>(lane_id()) < num_topk_;
    const i32 local = is_selection ? ld(Ptr<const i32>{params_.op.row_topk_idx} + at) : -1;
    u32 position = 0;
    for (i32 k = 0; k < num_topk_; ++k) {
      const auto other = static_cast<i32>(warp_shfl(static_cast<u32>(local), static_cast<u32>(k)));
      // A plan's are distinct. Those of a handle from elsewhere may be equal, and each must have a
      // place of its own: the sum reads as many as there are.
      const bool earlier = other == local && k < static_cast<i32>(lane_id());
      position += static_cast<u32>(other >= 0 && (other < local || earlier));
    }
    if (local >= 0) {
      terms_.row[position] = row;
      terms_.weight[position] = ld(Ptr<const float>{params_.op.weights} + at);
    }
    return static_cast<i32>(count_bits(warp_ballot(local >= 0)));
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
    if (lane >= static_cast<u32>(num_topk_)) return;
    const float scalar =
        ld(Ptr<const float>{params_.op.row_scalars} + (i64{from} * num_topk_ + lane));
    put_scalar(exchange_.view(), owner, token, num_topk_, lane, scalar);
  }

  // --- the receivers ---------------------------------------------------------------------------
  // Read this rank's staging, topk_idx, slot. Write out, token_scalars. Wait for arrived.

  JAX_EP_DEVICE void receive() {
    // Neighboring chunks to different blocks; warps that also send come last.
    const u32 late = (warp_id() + Config::kWarps - Config::kSenders) % Config::kWarps;
    const auto warp = static_cast<i32>(late * num_blocks() + block_id());
    const auto num_warps = static_cast<i32>(num_blocks() * Config::kWarps);
    for (i32 flag_idx = warp; flag_idx < num_chunks_ * num_parts_; flag_idx += num_warps) {
      share_out_peers(exchange_.view(),
                      [this, flag_idx](i32 source) { exchange_.wait_arrived(source, flag_idx); });
      warp_sync();
      const i64 last = last_token(flag_idx / num_parts_);
      for (i64 token = first_token(flag_idx / num_parts_); token < last; ++token) {
        receive_token(token, flag_idx % num_parts_);
      }
    }
  }

  JAX_EP_DEVICE void receive_token(i64 token, i32 part) {
    const Selections selections(
        shape_, Ptr<const i32>{params_.op.topk_idx}, Ptr<const i32>{params_.op.slot}, token);
    if (part == 0) receive_scalars(selections, token);
    if (hidden_ == 0) return;
    const u32 position = selections.ranks_before(num_topk_);
    if (selections.leads()) {
      terms_.row[position] = selections.dest();
      terms_.weight[position] = 1.0F;
    }
    const auto count = static_cast<i32>(count_bits(warp_ballot(selections.leads())));
    warp_sync();
    sum(
        count,
        part,
        [this, token](i32 source) {
          const Ptr<std::byte> row = staged_row(exchange_.view(), rank_, source, token);
          return Ptr<const std::byte>{row.raw};
        },
        Ptr<std::byte>{static_cast<std::byte*>(params_.op.out)} + token * row_bytes_);
    warp_sync();
  }

  JAX_EP_DEVICE void receive_scalars(const Selections& selections, i64 token) {
    if (params_.op.num_scalars == 0) return;
    const u32 lane = lane_id();
    const u32 position = is_rank_major() ? lane : selections.position(num_topk_);
    if (lane >= static_cast<u32>(num_topk_)) return;
    const float scalar =
        selections.live()
            ? ld(staged_scalars(exchange_.view(), rank_, selections.dest(), token, num_topk_) +
                 position)
            : 0.0F;
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
  SumTerms& terms_;
  const i64 hidden_;
  const i64 row_bytes_;
  const bool vectors_;  // rows are moved 16 bytes at a time
  const i32 rank_;
  const i32 num_ranks_;
  const i32 num_topk_;
  const i64 num_tokens_;
  const i32 chunk_tokens_;
  const i32 num_chunks_;
  const i64 num_moves_;  // of a row, see row_sum.h
  const i32 num_parts_;  // of a row: runs of moves
};

}  // namespace jax_ep::dev

#endif  // JAX_EP_CSRC_KERNELS_HIGH_THROUGHPUT_COMBINE_KERNEL_H_
