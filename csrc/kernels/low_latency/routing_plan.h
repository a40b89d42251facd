// SPDX-License-Identifier: Apache-2.0
// The plan of a low-latency dispatch. Every block counts the routing of all ranks by itself, so
// that no block waits for another one, and then knows where all rows of this rank are. What is
// reported of the plan the blocks share out. The walk of the high-throughput kernels, over the same
// layouts, is csrc/kernels/high_throughput/plan_assign.h.
//
// Reads topk_idx, token_scalars and the peers' packets of both, also those in the first messages of
// far ranks. Writes slot, row_source,
// row_topk_idx, source_slot, group_sizes, tokens_per_expert, num_dropped and row_scalars.
#ifndef JAX_EP_CSRC_KERNELS_LOW_LATENCY_ROUTING_PLAN_H_
#define JAX_EP_CSRC_KERNELS_LOW_LATENCY_ROUTING_PLAN_H_

#include "csrc/kernels/high_throughput/plan_context.h"
#include "csrc/kernels/low_latency/dispatch_block.h"
#include "csrc/kernels/low_latency/far_ranks.h"
#include "csrc/kernels/low_latency/missing_ranks.h"
#include "csrc/kernels/low_latency/packets.h"

namespace jax_ep::dev {

// `kMasks`: ranks may be missing.
template <typename RowLayout, typename Far, bool kMasks = false>
class RoutingPlan {
 public:
  using Context = typename RowLayout::Context;

  JAX_EP_DEVICE RoutingPlan(Context& context, const DispatchOp& dispatch, const Far& far)
      : c_(context),
        far_(far),
        layout_(context),
        dispatch_(dispatch),
        tables_(context.tables),
        num_tokens_(c_.num_ranks * c_.num_tokens),
        // Consecutive tokens of all ranks, in multiples of a run.
        tokens_per_warp_(quotient_up(quotient_up(num_tokens_, c_.run_tokens),
                                     static_cast<i32>(c_.warps.count())) *
                         c_.run_tokens),
        first_(static_cast<i32>(c_.warps.warp()) * tokens_per_warp_),
        last_(first_ + tokens_per_warp_ < num_tokens_ ? first_ + tokens_per_warp_ : num_tokens_) {}

  // All threads of a block.
  JAX_EP_DEVICE void make() {
    if constexpr (Far::kAny) {
      far_.wait_first(static_cast<i32>(c_.warps.warp()), static_cast<i32>(c_.warps.count()));
      c_.warps.sync();
    }
    receive_experts();
    c_.warps.sync();
    if constexpr (kMasks) {
      settle_sources();
      c_.warps.sync();
      leave_out_missing();
      c_.warps.sync();
    }
    count();
    c_.warps.sync();
    sum_up();
    c_.warps.sync();
    layout_.find_starts();
    c_.warps.sync();
    hand_out_rows();
    c_.warps.sync();
  }

  // All lanes of a warp, once the plan is made. Lane j gets the j-th row of this rank that holds
  // the token; -1: there is none.
  JAX_EP_DEVICE i32 row_of_lane(i64 global_token) const {
    if (static_cast<i32>(lane_id()) >= c_.max_rows) return -1;
    return ld(tables_.source_slot() + (global_token * c_.max_rows + lane_id()));
  }

  // All threads, once the plan is made: what they share out.
  JAX_EP_DEVICE void report() const {
    const i32 count = num_tokens_ * c_.max_rows;
    const auto thread = static_cast<i32>(block_id() * num_threads() + thread_id());
    const auto num_workers = static_cast<i32>(num_blocks() * num_threads());
    for (i32 i = thread; i < count; i += num_workers) {
      st(Ptr<i32>{c_.op.source_slot} + i, ld(tables_.source_slot() + i));
    }
    if (c_.warp != 0) return;
    const u32 dropped = warp_shfl(inclusive_sum(layout_.write_counts()), kWarpSize - 1);
    if (lane_id() == 0) st(Ptr<i32>{c_.op.num_dropped}, static_cast<i32>(dropped));
  }

  // `clear(row)`, with a warp, for the rows of this rank that hold no token; they are reported,
  // too.
  template <typename Clear>
  JAX_EP_DEVICE void for_each_empty_row(const Clear& clear) const {
    const auto num_warps = static_cast<u32>(c_.num_warps);
    u32 turn = static_cast<u32>(c_.warp);  // the warps take empty rows by turns: this one's next
    // As many ranges as there are lanes: one after the other, most are empty.
    const auto take = [&](RowRange of_lane) {
      const u32 end = inclusive_sum(of_lane.end - of_lane.begin);
      const u32 begin = from_lane_before(end);
      const u32 total = warp_shfl(end, kWarpSize - 1);
      for (; turn < total; turn += num_warps) {
        const u32 lane = num_bits(warp_ballot(begin <= turn)) - 1;
        const u32 row = warp_shfl(of_lane.begin - begin, lane) + turn;
        if (lane_id() == 0) layout_.clear_row(row);
        clear(static_cast<i64>(row));
      }
      turn -= total;
    };
    for (i32 first = 0; first < layout_.num_gaps(); first += kWarpSize) {
      const i32 i = first + static_cast<i32>(lane_id());
      take(i < layout_.num_gaps() ? layout_.gap(i) : RowRange{0, 0});
    }
    for (u32 row = layout_.end_of_rows() + turn; row < c_.capacity; row += num_warps) {
      if (lane_id() == 0) layout_.clear_row(row);
      clear(static_cast<i64>(row));
    }
  }

  // All lanes of a warp, once the plan is made. The rows that hold the source's tokens hold none;
  // `clear(row)` as above.
  template <typename Clear>
  JAX_EP_DEVICE void empty_rows_of(i32 source, const Clear& clear) const {
    JAX_EP_NO_UNROLL
    for (i32 token = 0; token < c_.num_tokens; ++token) {
      const i64 global_token = i64{source} * c_.num_tokens + token;
      const i32 row_of_lane = this->row_of_lane(global_token);
      if (row_of_lane >= 0) {
        st(Ptr<i32>{c_.op.source_slot} + (global_token * c_.max_rows + lane_id()), -1);
      }
      for (u32 holders = warp_ballot(row_of_lane >= 0); holders != 0; holders &= holders - 1) {
        const auto row =
            static_cast<i64>(warp_shfl(static_cast<u32>(row_of_lane), lowest_bit(holders)));
        if (lane_id() == 0) layout_.clear_row(row);
        clear(row);
      }
    }
  }

  // All lanes of a warp, once the plan is made: selections of the rank's experts have no row, so
  // that no combine waits for its sums.
  JAX_EP_DEVICE void empty_slots_at(i32 rank) const {
    for (i32 i = static_cast<i32>(lane_id()); i < c_.num_tokens * c_.num_topk; i += kWarpSize) {
      const i32 expert = ld(Ptr<const i32>{c_.op.topk_idx} + i);
      if (!c_.is_expert(expert) || owner_of(expert, c_.num_local) != rank) continue;
      st(Ptr<i32>{c_.op.slot} + i, -1);
    }
  }

 private:
  // ceil_div in 32 bits, which takes a fourth of the instructions.
  JAX_EP_DEVICE static i32 quotient_up(i32 a, i32 b) { return (a + b - 1) / b; }

  // A lane's selection, of a run of tokens that begins with `first`.
  struct Selected {
    i32 source;  // -1: the lane has no token
    i32 token;
    i32 expert;  // or -1
  };

  // The experts that all ranks' selections name, -1 where there is none: a packet for each thread
  // at a time.
  JAX_EP_DEVICE void receive_experts() const {
    const i32 selections = c_.num_tokens * c_.num_topk;
    const auto packets = static_cast<i32>(num_expert_packets(selections));
    const auto threads = static_cast<i32>(c_.warps.count() * kWarpSize);
    for (i32 i = static_cast<i32>(c_.warps.thread()); i < c_.num_ranks * packets; i += threads) {
      const i32 source = i / packets;
      const i32 first = i % packets * static_cast<i32>(kExpertsPerPacket);
      const Packet packet = experts_of(source, first);
      JAX_EP_UNROLL
      for (int c = 0; c < kExpertsPerPacket; ++c) {
        if (first + c >= selections) break;
        const auto expert = static_cast<i32>(expert_in_packet(packet, static_cast<u32>(c)));
        tables_.expert(source * selections + first + c) = c_.is_expert(expert) ? expert : -1;
      }
    }
  }
  // The packet that has a source's selections from `first` on. One thread.
  JAX_EP_DEVICE Packet experts_of(i32 source, i32 first) const {
    const i32 selections = c_.num_tokens * c_.num_topk;
    if (!is_active(c_.exchange.view(), source)) {
      constexpr u32 kNone = kNoExpertInPacket << 16 | kNoExpertInPacket;
      return {{kNone, kNone, kNone}, 0};
    }
    if (source == c_.rank) {
      return pack_experts(Ptr<const i32>{c_.op.topk_idx}, first, selections, 0);
    }
    if constexpr (Far::kAny) {
      if (far_.has(source)) {
        return far_.packet(source, first / static_cast<i32>(kExpertsPerPacket));
      }
    }
    Packet packet[1];
    const auto from = [&](int) {
      return expert_packets(c_.exchange.view(), c_.rank, c_.exchange.epoch(), source) +
             first / static_cast<i32>(kExpertsPerPacket);
    };
    if constexpr (kMasks) {
      const MissingRanks missing(c_.exchange);
      while (!try_packets<1, true>(c_.exchange, source, first / c_.num_topk, 1, from, packet)) {
        // If another block has found the source present, the packet is there too.
        if (missing.settle(source, Verdict::kMissing) == Verdict::kMissing) break;
      }
      return packet[0];
    }
    wait_packets<1>(c_.exchange, source, first / c_.num_topk, 1, from, packet);
    return packet[0];
  }

  // A thread for each source, when the block has waited for the routing of all: whether it counts,
  // the same in all blocks, to where the plan has other things later.
  JAX_EP_DEVICE void settle_sources() const {
    const MissingRanks missing(c_.exchange);
    const auto threads = static_cast<i32>(c_.warps.count() * kWarpSize);
    for (i32 source = static_cast<i32>(c_.warps.thread()); source < c_.num_ranks;
         source += threads) {
      // Who has given up a source has said so: of one without verdict all is there.
      const bool is_waited_for = source != c_.rank && is_active(c_.exchange.view(), source);
      const bool is_missing =
          is_waited_for && missing.settle(source, Verdict::kPresent) == Verdict::kMissing;
      tables_.total_before(source) = is_missing ? 1 : 0;
    }
  }
  // All threads: selections of missing ranks, and of their experts, are none.
  JAX_EP_DEVICE void leave_out_missing() const {
    const i32 selections = num_tokens_ * c_.num_topk;
    const auto threads = static_cast<i32>(c_.warps.count() * kWarpSize);
    for (i32 i = static_cast<i32>(c_.warps.thread()); i < selections; i += threads) {
      const i32 expert = tables_.expert(i);
      if (expert < 0) continue;
      const i32 source = i / (c_.num_tokens * c_.num_topk);
      const i32 owner = owner_of(expert, c_.num_local);
      if ((tables_.total_before(source) | tables_.total_before(owner)) != 0) tables_.expert(i) = -1;
    }
  }

  JAX_EP_DEVICE void count() const {
    c_.clear_cursors();
    warp_sync();
    for (i32 first = first_; first < last_; first += c_.run_tokens) {
      const Selected selected = selected_of(first);
      layout_.count(c_.selection_of(selected.expert));
    }
  }

  // All lanes.
  JAX_EP_DEVICE Selected selected_of(i32 first) const {
    const i32 global_token = first + c_.lane_token;
    if (c_.lane_token >= c_.run_tokens || global_token >= last_) return {-1, 0, -1};
    const i32 source = global_token / c_.num_tokens;
    return {source,
            global_token - source * c_.num_tokens,
            tables_.expert(first * c_.num_topk + static_cast<i32>(lane_id()))};
  }
  // The number of the lane's selection among those of its source.
  JAX_EP_DEVICE u32 selection(i32 token) const {
    return static_cast<u32>(token * c_.num_topk) + lane_id() - c_.first_lane;
  }

  // The warps' counts become the selections of earlier warps, and their totals.
  JAX_EP_DEVICE void sum_up() const {
    const auto threads = static_cast<i32>(c_.warps.count() * kWarpSize);
    for (i32 bin = static_cast<i32>(c_.warps.thread()); bin < c_.bins; bin += threads) {
      u32 total = 0;
      for (u32 warp = 0; warp < c_.warps.count(); ++warp) {
        auto& cursor = tables_.cursor(warp, bin);
        const u32 count = cursor;
        cursor = total;
        total += count;
      }
      st(c_.totals() + bin, total);
    }
  }

  // Every warp walks its tokens and hands out rows in their order. Each block reports some runs.
  JAX_EP_DEVICE void hand_out_rows() const {
    u32 reporter = static_cast<u32>(first_ / c_.run_tokens) % num_blocks();
    for (i32 first = first_; first < last_; first += c_.run_tokens) {
      hand_out_rows(first, reporter == block_id());
      reporter = reporter + 1 < num_blocks() ? reporter + 1 : 0;
    }
  }

  JAX_EP_DEVICE void hand_out_rows(i32 first, bool reports) const {
    const Selected selected = selected_of(first);
    const LaneSelection selection = c_.selection_of(selected.expert);
    const bool is_local = selection.expert >= 0 && c_.is_local(selection.expert);
    const CountedSelection counted = layout_.take(selection, true);
    note_totals_before(selected, counted);
    u32 row = c_.capacity;
    if (counted.bin >= 0) {
      const u32 start = layout_.start_of(counted.bin - layout_.first_row_bin());
      row = c_.clip(u64{start} + c_.tables.cursor(counted.bin) + c_.tokens_before(counted));
    }
    warp_sync();  // all rows are read before a cursor moves
    c_.advance(counted);
    const bool has_token = selected.source >= 0;
    if (reports && has_token && selected.source == c_.rank) {
      st(Ptr<i32>{c_.op.slot} + this->selection(selected.token), c_.slot_of(row));
    }
    layout_.write_rows(tables_.source_slot(),
                       reports,
                       has_token ? i64{first} + c_.lane_token : -1,
                       is_local,
                       row,
                       selected.expert);
    if (reports && dispatch_.num_scalars > 0) write_scalar(selected, is_local, row);
  }

  // In front of a source's first token, its first lane: how many tokens of earlier sources have
  // rows of this rank. All lanes.
  JAX_EP_DEVICE void note_totals_before(const Selected& selected,
                                        const CountedSelection& counted) const {
    if (RowLayout::kLayout != Layout::kRank) return;
    const i32 bin = layout_.first_row_bin() + c_.rank;
    const bool in_bin = counted.bin == bin && (counted.lanes >> lane_id() & 1) != 0;
    const u32 lanes = warp_ballot(in_bin);
    if (selected.source < 0 || selected.token != 0 || lane_id() != c_.first_lane) return;
    tables_.total_before(selected.source) =
        c_.tables.cursor(bin) + count_bits(lanes & lanes_below(lane_id()));
  }

  // The scalar of a local selection, at its row; where a token has one row for all its selections,
  // zeros for the others. All lanes.
  JAX_EP_DEVICE void write_scalar(const Selected& selected, bool is_local, u32 row) const {
    const bool is_rank_major = RowLayout::kLayout == Layout::kRank;
    const u32 holders = warp_ballot(is_local && row < c_.capacity) & c_.token_lanes;
    const u32 row_of_token = warp_shfl(row, holders != 0 ? lowest_bit(holders) : lane_id());
    const bool has_row = is_rank_major ? holders != 0 : (holders >> lane_id() & 1) != 0;
    if (selected.source < 0 || !has_row) return;
    const float scalar = is_local ? scalar_of(selected) : 0.0F;
    const auto k = static_cast<i64>(lane_id() - c_.first_lane);
    st(Ptr<float>{dispatch_.row_scalars} +
           (is_rank_major ? i64{row_of_token} * c_.num_topk + k : i64{row}),
       scalar);
  }
  JAX_EP_DEVICE float scalar_of(const Selected& selected) const {
    const u32 i = selection(selected.token);
    if (selected.source == c_.rank) return ld(Ptr<const float>{dispatch_.token_scalars} + i);
    const u32 position = i % static_cast<u32>(kScalarsPerPacket);
    if constexpr (Far::kAny) {
      if (far_.has(selected.source)) {
        const i64 behind = num_expert_packets(i64{c_.num_tokens} * c_.num_topk);
        const Packet packet =
            far_.packet(selected.source, behind + i / static_cast<u32>(kScalarsPerPacket));
        return as_float(word_in_packet(packet, position));
      }
    }
    Packet packet[1];
    const auto from = [&](int) {
      return scalar_packets(c_.exchange.view(), c_.rank, c_.exchange.epoch(), selected.source) +
             i / static_cast<u32>(kScalarsPerPacket);
    };
    if constexpr (kMasks) {
      if (!try_packets<1, true>(c_.exchange, selected.source, selected.token, 1, from, packet)) {
        MissingRanks(c_.exchange).give_up_on(selected.source);
        return 0;  // as the row will be
      }
      return as_float(word_in_packet(packet[0], position));
    }
    wait_packets<1>(c_.exchange, selected.source, selected.token, 1, from, packet);
    return as_float(word_in_packet(packet[0], position));
  }

  Context& c_;
  const Far& far_;
  const RowLayout layout_;
  const DispatchOp& dispatch_;
  const typename Context::Tables& tables_;
  const i32 num_tokens_;  // of all ranks
  const i32 tokens_per_warp_;
  const i32 first_;  // of this warp's tokens, among those of all ranks
  const i32 last_;
};

}  // namespace jax_ep::dev

#endif  // JAX_EP_CSRC_KERNELS_LOW_LATENCY_ROUTING_PLAN_H_
