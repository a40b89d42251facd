// SPDX-License-Identifier: Apache-2.0
// What a plan does in layout "expert" and not in layout "rank": a row per selection, and an
// expert's rows begin where those of the expert before it end, aligned.
#ifndef JAX_EP_CSRC_KERNELS_HIGH_THROUGHPUT_PLAN_EXPERT_LAYOUT_H_
#define JAX_EP_CSRC_KERNELS_HIGH_THROUGHPUT_PLAN_EXPERT_LAYOUT_H_

#include "csrc/kernels/high_throughput/plan_context.h"

namespace jax_ep::dev {

template <typename BlockConfig>
class PlanExpertLayout {
 public:
  static constexpr Layout kLayout = Layout::kExpert;
  using Config = BlockConfig;
  using Context = PlanContext<Config>;

  JAX_EP_DEVICE explicit PlanExpertLayout(Context& context) : c_(context) {}

  // --- bins: an expert's count gives its selections their rows -----------------------------------

  JAX_EP_DEVICE i32 first_row_bin() const { return 0; }
  JAX_EP_DEVICE i32 row_bins_per_rank() const { return c_.num_local; }

  // All lanes. The bin that gives a selection its row.
  JAX_EP_DEVICE CountedSelection take(const LaneSelection& selection, bool takes_part) const {
    return c_.counted(takes_part ? selection.expert : -1, selection.same_expert);
  }
  // All lanes. Counts a run.
  JAX_EP_DEVICE void count(const LaneSelection& selection) const {
    c_.advance(take(selection, true));
  }

  // --- where rows begin --------------------------------------------------------------------------

  // Where each expert's rows start at its rank: a warp for as many of a rank's experts as it has
  // lanes; what is before them it sums up by itself, so no warp waits for another. Sums are clipped
  // to the capacity at every step, so that they fit 32 bits.
  JAX_EP_DEVICE void find_starts() const {
    const auto parts = static_cast<i32>(ceil_div(i64{c_.num_local}, i64{kWarpSize}));
    const auto num_warps = static_cast<i32>(c_.warps.count());
    for (i32 i = static_cast<i32>(c_.warps.warp()); i < c_.num_ranks * parts; i += num_warps) {
      const i32 first_of_rank = i / parts * c_.num_local;
      const i32 local = i % parts * static_cast<i32>(kWarpSize) + static_cast<i32>(lane_id());
      u32 of_lane = 0;
      for (i32 earlier = static_cast<i32>(lane_id()); earlier < local; earlier += kWarpSize) {
        of_lane = clipped_sum(of_lane, rows_of(first_of_rank + earlier));
      }
      const u32 rows = local < c_.num_local ? rows_of(first_of_rank + local) : 0;
      const u32 before_part = warp_shfl(clipped_sums(of_lane), kWarpSize - 1);
      const u32 before = from_lane_before(clipped_sums(rows));
      if (local < c_.num_local) {
        c_.tables.start(first_of_rank + local) = clipped_sum(before_part, before);
      }
    }
  }
  JAX_EP_DEVICE u32 start_of(i32 bin) const { return c_.tables.start(bin); }

  // --- rows of this rank -------------------------------------------------------------------------

  // All lanes. `global_token` is the number of the lane's token among those of all ranks, -1 if it
  // has none. The rows of this rank that hold a token, in ascending order, which is that of the
  // experts, to `source_slot`, and if `reports`, what the rows hold.
  JAX_EP_DEVICE void write_rows(Ptr<i32> source_slot,
                                bool reports,
                                i64 global_token,
                                bool is_local,
                                u32 row,
                                i32 /*expert*/) const {
    const bool has_row = is_local && row < c_.capacity;
    const u32 lanes_with_row = warp_ballot(has_row) & c_.token_lanes;
    u32 position = 0;
    for (i32 k = 0; k < c_.num_topk; ++k) {
      const u32 lane = (c_.first_lane + static_cast<u32>(k)) % kWarpSize;
      position += static_cast<u32>(warp_shfl(row, lane) < row && (lanes_with_row >> lane & 1) != 0);
    }
    if (global_token < 0) return;
    const Ptr<i32> rows = source_slot + global_token * c_.max_rows;
    const auto k = static_cast<i32>(lane_id() - c_.first_lane);
    if (has_row) {
      st(rows + position, static_cast<i32>(row));
      if (reports) st(Ptr<i32>{c_.op.row_source} + row, static_cast<i32>(global_token));
    }
    if (k >= static_cast<i32>(count_bits(lanes_with_row)) && k < c_.max_rows) st(rows + k, -1);
  }

  // What a row without token holds.
  JAX_EP_DEVICE void clear_row(i64 row) const { st(Ptr<i32>{c_.op.row_source} + row, -1); }

  // The rows between those of an expert of this rank and the next.
  JAX_EP_DEVICE i32 num_gaps() const { return c_.shape.expert_alignment > 1 ? c_.num_local : 0; }
  JAX_EP_DEVICE RowRange gap(i32 local) const {
    const i32 expert = c_.rank * c_.num_local + local;
    const u64 start = start_of(expert);
    return {c_.clip(start + ld(c_.totals() + expert)), end_of(local)};
  }
  // The first of the rows that no token of any rank can have.
  JAX_EP_DEVICE u32 end_of_rows() const { return end_of(c_.num_local - 1); }

  // --- what the rank reports ---------------------------------------------------------------------

  // All lanes of a warp. Returns how many rows this lane found dropped.
  JAX_EP_DEVICE u32 write_counts() const {
    u32 dropped = 0;
    for (i32 local = static_cast<i32>(lane_id()); local < c_.num_local; local += kWarpSize) {
      const u32 total = c_.report_total(local);
      const u32 start = start_of(c_.rank * c_.num_local + local);
      st(Ptr<i32>{c_.op.group_sizes} + local, static_cast<i32>(end_of(local) - start));
      dropped += total - (c_.clip(u64{start} + total) - start);
    }
    return dropped;
  }

 private:
  // What has 32 bits is divided in a few instructions, what has 64 in many.
  JAX_EP_DEVICE u64 aligned(u32 rows) const {
    const auto alignment = static_cast<u32>(c_.shape.expert_alignment);
    const u32 whole = rows / alignment * alignment;
    return u64{whole} + (whole < rows ? alignment : 0);
  }

  JAX_EP_DEVICE u32 rows_of(i32 expert) const { return c_.clip(aligned(ld(c_.totals() + expert))); }
  JAX_EP_DEVICE u32 clipped_sum(u32 a, u32 b) const { return c_.clip(u64{a} + b); }
  JAX_EP_DEVICE u32 clipped_sums(u32 rows) const {
    return inclusive_sum(rows, [this](u32 a, u32 b) { return clipped_sum(a, b); });
  }

  // First row after those of a local expert of this rank.
  JAX_EP_DEVICE u32 end_of(i32 local) const {
    const i32 expert = c_.rank * c_.num_local + local;
    if (local + 1 < c_.num_local) return start_of(expert + 1);
    return c_.clip(u64{start_of(expert)} + aligned(ld(c_.totals() + expert)));
  }

  Context& c_;
};

}  // namespace jax_ep::dev

#endif  // JAX_EP_CSRC_KERNELS_HIGH_THROUGHPUT_PLAN_EXPERT_LAYOUT_H_
