// SPDX-License-Identifier: Apache-2.0
// The plan of a low-latency dispatch. Every block counts the routing of all ranks by itself, so
// that no block waits for another one, and then knows where all rows of this rank are. What is
// reported of the plan the blocks share out.
//
// Reads topk_idx, token_scalars and the peers' packets of both. Writes slot, row_source,
// row_topk_idx, source_slot, group_sizes, tokens_per_expert, num_dropped and row_scalars.
#ifndef JAX_EP_CSRC_KERNELS_LOW_LATENCY_ROUTING_PLAN_H_
#define JAX_EP_CSRC_KERNELS_LOW_LATENCY_ROUTING_PLAN_H_

#include "csrc/kernels/high_throughput/plan_context.h"
#include "csrc/kernels/low_latency/dispatch_block.h"
#include "csrc/kernels/low_latency/packets.h"

namespace jax_ep::dev {

template <typename RowLayout>
class RoutingPlan {
 public:
  using Context = typename RowLayout::Context;

  JAX_EP_DEVICE RoutingPlan(Context& context, const DispatchOp& dispatch)
      : c_(context),
        layout_(context),
        dispatch_(dispatch),
        tables_(context.tables),
        num_tokens_(c_.num_ranks * c_.num_tokens),
        // Consecutive tokens of all ranks, in multiples of a run.
        tokens_per_warp_(static_cast<i32>(
            align_up(ceil_div(num_tokens_, i64{c_.warps.count()}), c_.run_tokens))),
        first_(static_cast<i32>(c_.warps.warp()) * tokens_per_warp_),
        last_(first_ + tokens_per_warp_ < num_tokens_ ? first_ + tokens_per_warp_ : num_tokens_) {}

  // All threads of a block.
  JAX_EP_DEVICE void make() {
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
    take(lane_id() == 0 ? RowRange{layout_.end_of_rows(), c_.capacity} : RowRange{0, 0});
  }

 private:
  // A lane's selection, of a run of tokens that begins with `first`.
  struct Selected {
    i32 source;  // -1: the lane has no token
    i32 token;
    i32 expert;  // or -1
  };

  JAX_EP_DEVICE void count() const {
    warp_sync();  // what lay in the stages, and became packets, has been read
    for (i32 bin = static_cast<i32>(lane_id()); bin < c_.bins; bin += kWarpSize) {
      c_.tables.cursor(bin) = 0;
    }
    warp_sync();
    for (i32 first = first_; first < last_; first += c_.run_tokens) {
      const Selected selected = selected_of(first);
      layout_.count(c_.selection_of(selected.expert));
    }
  }

  JAX_EP_DEVICE Selected selected_of(i32 first) const {
    const i32 global_token = first + c_.lane_token;
    if (c_.lane_token >= c_.run_tokens || global_token >= last_) return {-1, 0, -1};
    const i32 source = global_token / c_.num_tokens;
    const i32 token = global_token % c_.num_tokens;
    if (!is_active(c_.exchange.view(), source)) return {source, token, -1};
    const u32 i = selection(token);
    if (source == c_.rank) {
      const i32 own = ld(Ptr<const i32>{c_.op.topk_idx} + i);
      return {source, token, c_.is_expert(own) ? own : -1};
    }
    Packet packet[1];
    wait_packets<1>(
        c_.exchange,
        source,
        token,
        1,
        [&](int) {
          return expert_packets(c_.exchange.view(), c_.rank, c_.exchange.epoch(), source) +
                 i / static_cast<u32>(kExpertsPerPacket);
        },
        packet);
    const auto expert =
        static_cast<i32>(expert_in_packet(packet[0], i % static_cast<u32>(kExpertsPerPacket)));
    return {source, token, c_.is_expert(expert) ? expert : -1};
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
        const u32 here = cursor;
        cursor = total;
        total += here;
      }
      st(c_.totals() + bin, total);
    }
  }

  // Every warp walks its tokens and hands out rows in their order. Each block reports some runs.
  JAX_EP_DEVICE void hand_out_rows() const {
    for (i32 bin = static_cast<i32>(lane_id()); bin < c_.bins; bin += kWarpSize) {
      const i32 row_bin = bin - layout_.first_row_bin();
      if (row_bin < 0) continue;  // counted for reports alone
      auto& cursor = c_.tables.cursor(bin);
      cursor = layout_.start_of(row_bin) + cursor;
    }
    warp_sync();
    i32 run = first_ / c_.run_tokens;
    for (i32 first = first_; first < last_; first += c_.run_tokens, ++run) {
      hand_out_rows(first, run % static_cast<i32>(num_blocks()) == static_cast<i32>(block_id()));
    }
  }

  JAX_EP_DEVICE void hand_out_rows(i32 first, bool reports) const {
    const Selected selected = selected_of(first);
    const LaneSelection selection = c_.selection_of(selected.expert);
    const bool selects = selection.expert >= 0;
    const bool is_local = selects && owner_of(selection.expert, c_.num_local) == c_.rank;
    const CountedSelection counted = layout_.take(selection, true);
    note_totals_before(selected, counted);
    u32 row = c_.capacity;
    if (counted.bin >= 0) {
      const u32 before = count_bits(counted.lanes & lanes_below(c_.first_lane));
      row = c_.clip(u64{c_.tables.cursor(counted.bin)} + before);
    }
    warp_sync();  // all rows are read before a cursor moves
    c_.advance(counted);
    const bool has_token = selected.source >= 0;
    const i32 slot = row < c_.capacity ? static_cast<i32>(row) : -1;
    if (reports && has_token && selected.source == c_.rank) {
      st(Ptr<i32>{c_.op.slot} + this->selection(selected.token), slot);
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
    const bool by_rank = RowLayout::kLayout == Layout::kRank;
    const u32 holders = warp_ballot(is_local && row < c_.capacity) & c_.token_lanes;
    const u32 row_of_token = warp_shfl(row, holders != 0 ? lowest_bit(holders) : lane_id());
    const bool has_row = by_rank ? holders != 0 : (holders >> lane_id() & 1) != 0;
    if (selected.source < 0 || !has_row) return;
    const float scalar = is_local ? scalar_of(selected) : 0.0F;
    const auto k = static_cast<i64>(lane_id() - c_.first_lane);
    st(Ptr<float>{dispatch_.row_scalars} +
           (by_rank ? i64{row_of_token} * c_.num_topk + k : i64{row}),
       scalar);
  }
  JAX_EP_DEVICE float scalar_of(const Selected& selected) const {
    const u32 i = selection(selected.token);
    if (selected.source == c_.rank) return ld(Ptr<const float>{dispatch_.token_scalars} + i);
    Packet packet[1];
    wait_packets<1>(
        c_.exchange,
        selected.source,
        selected.token,
        1,
        [&](int) {
          return scalar_packets(c_.exchange.view(), c_.rank, c_.exchange.epoch(), selected.source) +
                 i / static_cast<u32>(kScalarsPerPacket);
        },
        packet);
    return as_float(word_in_packet(packet[0], i % static_cast<u32>(kScalarsPerPacket)));
  }

  Context& c_;
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
