// SPDX-License-Identifier: Apache-2.0
// The last step of a plan: counts become rows. Each rank works out both sides: the slots of its own
// selections, and what its own rows hold.
//
// The order of rows: tokens are walked by source rank, then by token, and in layout "expert" each
// expert has its own rows; where those of an expert or a source start is in plan_expert_layout.h
// and plan_rank_layout.h. What finds no room is dropped: rows are clipped to the capacity (`clip`
// and `slot_of` of plan_context.h); the layouts' `write_counts` count it. The low-latency
// kernels do the same in csrc/kernels/low_latency/routing_plan.h.
#ifndef JAX_EP_CSRC_KERNELS_HIGH_THROUGHPUT_PLAN_ASSIGN_H_
#define JAX_EP_CSRC_KERNELS_HIGH_THROUGHPUT_PLAN_ASSIGN_H_

#include "csrc/kernels/high_throughput/plan_context.h"

namespace jax_ep::dev {

template <typename RowLayout>
class PlanAssigner {
  using Context = typename RowLayout::Context;

 public:
  JAX_EP_DEVICE explicit PlanAssigner(Context& context) : c_(context), layout_(context) {}

  // 4. Every tile walks its tokens and hands out rows in their order.
  JAX_EP_DEVICE void assign() {
    find_starts();
    for (i32 item = c_.warp; item < c_.num_items; item += c_.num_warps) assign(item);
    report();
  }

  // Its parts that a plan by counts has, too: before rows are handed out, and besides.
  JAX_EP_DEVICE void find_starts() {
    layout_.find_starts();
    c_.warps.sync();
  }
  JAX_EP_DEVICE void report() {
    write_counts();
    clear_rows_without_token();
  }

 private:
  JAX_EP_DEVICE void assign(i32 item) {
    const typename Context::TokenTile tile = c_.tile_of(item);
    const bool own = tile.source == c_.rank;
    load_cursors(item, own);
    warp_sync();
    c_.for_each_run(tile, [this, &tile, own](i32 first, i32 expert) {
      const LaneSelection selection = c_.selection_of(expert);
      const bool is_local = selection.expert >= 0 && c_.is_local(expert);
      const CountedSelection counted = layout_.take(selection, own || is_local);
      u32 row = c_.capacity;
      if (counted.bin >= 0) {
        row = c_.clip(u64{c_.tables.cursor(counted.bin)} + c_.tokens_before(counted));
      }
      warp_sync();  // all rows are read before a cursor moves
      c_.advance(counted);
      const i32 token = first + c_.lane_token;
      if (own && c_.has_token(tile, first)) {
        st(Ptr<i32>{c_.op.slot} + (i64{first} * c_.num_topk + lane_id()), c_.slot_of(row));
      }
      const i64 global_token =
          c_.has_token(tile, first) ? i64{tile.source} * c_.num_tokens + token : -1;
      layout_.write_rows(Ptr<i32>{c_.op.source_slot}, true, global_token, is_local, row, expert);
    });
  }

  // Where the rows of a tile begin in each bin in which its selections take part.
  JAX_EP_DEVICE void load_cursors(i32 item, bool own) {
    constexpr i32 kAtOnce = 8;  // loads in flight
    const i32 bins_of_rank = layout_.row_bins_per_rank();
    const i32 first_bin = layout_.first_row_bin() + (own ? 0 : c_.rank * bins_of_rank);
    const i32 last_bin = first_bin + (own ? c_.num_ranks : 1) * bins_of_rank;
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
        c_.tables.cursor(bin) = layout_.start_of(bin) + before[i];
      }
    }
  }

  // --- what the rank reports -----------------------------------------------------------------

  JAX_EP_DEVICE void write_counts() {
    if (c_.warp != 0) return;
    const u32 dropped = warp_shfl(inclusive_sum(layout_.write_counts()), kWarpSize - 1);
    constexpr u32 kInt32Max = 0x7FFF'FFFF;
    if (lane_id() != 0) return;
    st(Ptr<i32>{c_.op.num_dropped}, static_cast<i32>(dropped < kInt32Max ? dropped : kInt32Max));
  }

  JAX_EP_DEVICE void clear_rows_without_token() {
    for (i32 i = c_.warp; i < layout_.num_gaps(); i += c_.num_warps) {
      clear(layout_.gap(i), lane_id(), kWarpSize);
    }
    clear({layout_.end_of_rows(), c_.capacity},
          block_id() * c_.warps.count() * kWarpSize + c_.warps.thread(),
          c_.exchange.num_main() * c_.warps.count() * kWarpSize);
  }

  JAX_EP_DEVICE void clear(RowRange rows, u32 worker, u32 num_workers) {
    for (i64 row = i64{rows.begin} + worker; row < rows.end; row += num_workers) {
      layout_.clear_row(row);
    }
  }

  Context& c_;
  const RowLayout layout_;
};

}  // namespace jax_ep::dev

#endif  // JAX_EP_CSRC_KERNELS_HIGH_THROUGHPUT_PLAN_ASSIGN_H_
