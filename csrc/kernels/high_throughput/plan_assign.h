// SPDX-License-Identifier: Apache-2.0
// The last step of a plan: counts become rows. Each rank works out both sides: the slots of its own
// selections, and what its own rows hold.
#ifndef JAX_EP_CSRC_KERNELS_HIGH_THROUGHPUT_PLAN_ASSIGN_H_
#define JAX_EP_CSRC_KERNELS_HIGH_THROUGHPUT_PLAN_ASSIGN_H_

#include "csrc/kernels/high_throughput/plan_context.h"

namespace jax_ep::dev {

template <typename Config>
class PlanAssigner {
  using Context = PlanContext<Config>;

 public:
  JAX_EP_DEVICE explicit PlanAssigner(Context& context) : c_(context) {}

  // 4. Every tile walks its tokens and hands out rows in their order.
  JAX_EP_DEVICE void assign() {
    start_experts();
    block_sync();
    for (i32 item = c_.warp; item < c_.num_items; item += c_.num_warps) assign(item);
    write_counts();
    clear_rows_without_token();
  }

  // When the group has been closed: all threads. Without a row or a selection: what comes after
  // must not lead anywhere.
  JAX_EP_DEVICE void leave_no_results() {
    const i64 selections = i64{c_.num_tokens} * c_.num_topk;
    const i32 max_rows = max_rows_per_token(c_.shape.layout, c_.num_topk, c_.num_local);
    c_.exchange.poison(c_.params.op.slot, selections);
    c_.exchange.poison(c_.params.op.row_source, c_.capacity);
    if (c_.is_rank_major())
      c_.exchange.poison(c_.params.op.row_topk_idx, i64{c_.capacity} * c_.num_topk);
    c_.exchange.poison(c_.params.op.source_slot, i64{c_.num_ranks} * c_.num_tokens * max_rows);
    c_.exchange.fill(Ptr<i32>{c_.params.op.group_sizes}, c_.shape.num_row_groups(), 0);
    c_.exchange.fill(Ptr<i32>{c_.params.op.tokens_per_expert}, c_.num_local, 0);
    c_.exchange.fill(Ptr<i32>{c_.params.op.num_dropped}, 1, 0);
    c_.exchange.report_closed();
  }

 private:
  JAX_EP_DEVICE u32 clip(u64 row) const {
    return row < c_.capacity ? static_cast<u32>(row) : c_.capacity;
  }

  // Where each expert's rows start at its rank: a warp per rank. Sums are clipped to the capacity
  // at every step, so that they fit 32 bits.
  JAX_EP_DEVICE void start_experts() {
    const u64 alignment = static_cast<u64>(c_.shape.expert_alignment);
    const auto clipped_sum = [this](u32 a, u32 b) { return clip(u64{a} + b); };
    for (i32 rank = static_cast<i32>(warp_id()); rank < c_.num_ranks && !c_.is_rank_major();
         rank += Config::kWarps) {
      u32 start = 0;
      for (i32 first = 0; first < c_.num_local; first += kWarpSize) {
        const i32 local = first + static_cast<i32>(lane_id());
        const u64 total =
            local < c_.num_local ? ld(c_.totals() + (rank * c_.num_local + local)) : 0;
        const u32 rows = clip((total + alignment - 1) / alignment * alignment);
        const u32 sum = inclusive_sum(rows, clipped_sum);
        const u32 before = from_lane_before(sum);
        if (local < c_.num_local) {
          c_.memory.start[rank * c_.num_local + local] = clipped_sum(start, before);
        }
        start = clipped_sum(start, warp_shfl(sum, kWarpSize - 1));
      }
    }
  }

  // First row after those of a local expert of this rank.
  JAX_EP_DEVICE u32 end_of(i32 local) const {
    const i32 expert = c_.rank * c_.num_local + local;
    if (local + 1 < c_.num_local) return c_.memory.start[expert + 1];
    const u64 alignment = static_cast<u64>(c_.shape.expert_alignment);
    const u64 total = ld(c_.totals() + expert);
    return clip(u64{c_.memory.start[expert]} + (total + alignment - 1) / alignment * alignment);
  }

  JAX_EP_DEVICE void assign(i32 item) {
    const typename Context::TokenTile tile = c_.tile_of(item);
    const bool own = tile.source == c_.rank;
    load_cursors(item, own);
    warp_sync();
    const auto bin_of = [this, own](i32 expert) {
      return own || is_local_expert(expert) ? c_.row_bin(expert) : -1;
    };
    c_.for_each_run(tile, [this, &tile, own, &bin_of](i32 first, i32 expert) {
      const typename Context::CountedSelection counted = c_.take(expert, bin_of);
      u32 row = c_.capacity;
      if (counted.bin >= 0) {
        const u32 before = count_bits(counted.lanes & lanes_below(c_.first_lane));
        row = clip(u64{c_.memory.cursor[warp_id()][counted.bin]} + before);
      }
      warp_sync();  // all rows are read before a cursor moves
      c_.advance(counted);
      const i32 token = first + c_.lane_token;
      if (own && c_.has_token(tile, first)) {
        st(Ptr<i32>{c_.params.op.slot} + (i64{first} * c_.num_topk + lane_id()), slot_of(row));
      }
      const bool is_local = counted.bin >= 0 && is_local_expert(expert);
      const i64 global_token =
          c_.has_token(tile, first) ? i64{tile.source} * c_.num_tokens + token : -1;
      c_.is_rank_major() ? write_rank_row(global_token, is_local, row, expert)
                         : write_expert_rows(global_token, is_local, row);
    });
  }

  // Where the rows of a tile begin in each bin in which its selections take part.
  JAX_EP_DEVICE void load_cursors(i32 item, bool own) {
    constexpr i32 kAtOnce = 8;  // loads in flight
    const i32 all = c_.is_rank_major() ? c_.num_ranks : c_.shape.num_experts;
    const i32 bins_of_rank = c_.is_rank_major() ? 1 : c_.num_local;
    const i32 first_bin =
        (c_.is_rank_major() ? c_.rank_bin(0) : 0) + (own ? 0 : c_.rank * bins_of_rank);
    const i32 last_bin = first_bin + (own ? all : bins_of_rank);
    const auto bin_of = [first_bin](i32 base, i32 i) {
      return first_bin + base + i * static_cast<i32>(kWarpSize) + static_cast<i32>(lane_id());
    };
    for (i32 base = 0; first_bin + base < last_bin; base += kAtOnce * static_cast<i32>(kWarpSize)) {
      u32 before[kAtOnce];
      JAX_EP_UNROLL
      for (i32 i = 0; i < kAtOnce; ++i) {
        before[i] = bin_of(base, i) < last_bin ? ld(c_.count_of(bin_of(base, i), item)) : 0;
      }
      JAX_EP_UNROLL
      for (i32 i = 0; i < kAtOnce; ++i) {
        const i32 bin = bin_of(base, i);
        if (bin >= last_bin) continue;
        const u32 start = c_.is_rank_major() ? 0 : static_cast<u32>(c_.memory.start[bin]);
        c_.memory.cursor[warp_id()][bin] = start + before[i];
      }
    }
  }

  JAX_EP_DEVICE bool is_local_expert(i32 expert) const {
    return owner_of(expert, c_.num_local) == c_.rank;
  }
  JAX_EP_DEVICE i32 slot_of(u32 row) const {
    return row < c_.capacity ? static_cast<i32>(row) : -1;
  }

  // All lanes. `global_token` is the number of the lane's token among those of all ranks, -1 if it
  // has none. The rows of this rank that hold a token, in ascending order, which is that of the
  // experts.
  JAX_EP_DEVICE void write_expert_rows(i64 global_token, bool is_local, u32 row) {
    const i32 max_rows = max_rows_per_token(c_.shape.layout, c_.num_topk, c_.num_local);
    const bool has_row = is_local && row < c_.capacity;
    const u32 lanes_with_row = warp_ballot(has_row) & c_.token_lanes;
    u32 position = 0;
    for (i32 k = 0; k < c_.num_topk; ++k) {
      const u32 lane = (c_.first_lane + static_cast<u32>(k)) % kWarpSize;
      position += static_cast<u32>(warp_shfl(row, lane) < row && (lanes_with_row >> lane & 1) != 0);
    }
    if (global_token < 0) return;
    const Ptr<i32> rows = Ptr<i32>{c_.params.op.source_slot} + global_token * max_rows;
    const auto k = static_cast<i32>(lane_id() - c_.first_lane);
    if (has_row) {
      st(rows + position, static_cast<i32>(row));
      st(Ptr<i32>{c_.params.op.row_source} + row, static_cast<i32>(global_token));
    }
    if (k >= static_cast<i32>(count_bits(lanes_with_row)) && k < max_rows) st(rows + k, -1);
  }

  JAX_EP_DEVICE void write_rank_row(i64 global_token, bool is_local, u32 row, i32 expert) {
    const u32 holders = warp_ballot(is_local && row < c_.capacity) & c_.token_lanes;
    const u32 row_of_token = warp_shfl(row, holders != 0 ? lowest_bit(holders) : lane_id());
    if (global_token < 0) return;
    const bool is_first = lane_id() == c_.first_lane;
    if (is_first) {
      st(Ptr<i32>{c_.params.op.source_slot} + global_token,
         holders != 0 ? static_cast<i32>(row_of_token) : -1);
    }
    if (holders == 0) return;
    if (is_first)
      st(Ptr<i32>{c_.params.op.row_source} + row_of_token, static_cast<i32>(global_token));
    st(Ptr<i32>{c_.params.op.row_topk_idx} +
           (i64{row_of_token} * c_.num_topk + (lane_id() - c_.first_lane)),
       is_local ? expert - c_.rank * c_.num_local : -1);
  }

  // --- what the rank reports -----------------------------------------------------------------

  JAX_EP_DEVICE void write_counts() {
    if (c_.warp != 0) return;
    u32 dropped = 0;
    for (i32 local = static_cast<i32>(lane_id()); local < c_.num_local; local += kWarpSize) {
      const u32 total = ld(c_.totals() + (c_.rank * c_.num_local + local));
      st(Ptr<i32>{c_.params.op.tokens_per_expert} + local, static_cast<i32>(total));
      if (c_.is_rank_major()) continue;
      const u32 start = c_.memory.start[c_.rank * c_.num_local + local];
      st(Ptr<i32>{c_.params.op.group_sizes} + local, static_cast<i32>(end_of(local) - start));
      dropped += total - (clip(u64{start} + total) - start);
    }
    for (i32 source = static_cast<i32>(lane_id()); source < c_.num_ranks && c_.is_rank_major();
         source += kWarpSize) {
      const u32 begin = rows_before(source);
      const u32 end = rows_before(source + 1);
      st(Ptr<i32>{c_.params.op.group_sizes} + source, static_cast<i32>(clip(end) - clip(begin)));
      dropped += (end - clip(end)) - (begin - clip(begin));
    }
    dropped = warp_shfl(inclusive_sum(dropped), kWarpSize - 1);
    constexpr u32 kInt32Max = 0x7FFF'FFFF;
    if (lane_id() != 0) return;
    st(Ptr<i32>{c_.params.op.num_dropped},
       static_cast<i32>(dropped < kInt32Max ? dropped : kInt32Max));
  }

  // Layout "rank": rows of this rank that hold tokens of earlier sources.
  JAX_EP_DEVICE u32 rows_before(i32 source) const {
    if (c_.tiles == 0) return 0;
    if (source == c_.num_ranks) return ld(c_.totals() + c_.rank_bin(c_.rank));
    return ld(c_.count_of(c_.rank_bin(c_.rank), source * c_.tiles));
  }

  JAX_EP_DEVICE void clear_rows_without_token() {
    for (i32 local = c_.warp; local < c_.num_local && !c_.is_rank_major(); local += c_.num_warps) {
      const u64 start = c_.memory.start[c_.rank * c_.num_local + local];
      const u32 occupied = clip(start + ld(c_.totals() + (c_.rank * c_.num_local + local)));
      clear(occupied, end_of(local), lane_id(), kWarpSize);
    }
    const u32 end = c_.is_rank_major() ? clip(rows_before(c_.num_ranks)) : end_of(c_.num_local - 1);
    clear(end, c_.capacity, block_id() * num_threads() + thread_id(), num_blocks() * num_threads());
  }

  JAX_EP_DEVICE void clear(u32 begin, u32 end, u32 worker, u32 num_workers) {
    for (i64 row = i64{begin} + worker; row < end; row += num_workers) {
      st(Ptr<i32>{c_.params.op.row_source} + row, -1);
      for (i32 k = 0; k < c_.num_topk && c_.is_rank_major(); ++k) {
        st(Ptr<i32>{c_.params.op.row_topk_idx} + (row * c_.num_topk + k), -1);
      }
    }
  }

  Context& c_;
};

}  // namespace jax_ep::dev

#endif  // JAX_EP_CSRC_KERNELS_HIGH_THROUGHPUT_PLAN_ASSIGN_H_
