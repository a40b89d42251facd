// SPDX-License-Identifier: Apache-2.0
// What a plan does in layout "rank" and not in layout "expert": a row per token and destination
// rank, which says which local experts the token selects; no row lies between two with a token.
#ifndef JAX_EP_CSRC_KERNELS_HIGH_THROUGHPUT_PLAN_RANK_LAYOUT_H_
#define JAX_EP_CSRC_KERNELS_HIGH_THROUGHPUT_PLAN_RANK_LAYOUT_H_

#include "csrc/kernels/high_throughput/plan_context.h"

namespace jax_ep::dev {

template <typename BlockConfig>
class PlanRankLayout {
 public:
  static constexpr Layout kLayout = Layout::kRank;
  using Config = BlockConfig;
  using Context = PlanContext<Config>;

  JAX_EP_DEVICE explicit PlanRankLayout(Context& context) : c_(context) {}

  // --- bins: a destination rank's count of tokens gives them their rows --------------------------

  JAX_EP_DEVICE i32 first_row_bin() const { return c_.shape.num_experts; }
  JAX_EP_DEVICE i32 row_bins_per_rank() const { return 1; }

  // All lanes. The bin that gives a selection its row.
  JAX_EP_DEVICE CountedSelection take(const LaneSelection& selection, bool takes_part) const {
    const bool has_bin = takes_part && selection.expert >= 0;
    const i32 bin = has_bin ? bin_of(owner_of(selection.expert, c_.num_local)) : -1;
    return c_.counted(bin, lanes_alike(static_cast<u32>(bin + 1), c_.bin_bits));
  }
  // All lanes. Counts a run: rows are handed out by rank, but selections are reported by expert.
  JAX_EP_DEVICE void count(const LaneSelection& selection) const {
    c_.advance(take(selection, true));
    c_.advance(c_.counted(selection.expert, selection.same_expert));
  }

  // --- where rows begin: at the first ------------------------------------------------------------

  JAX_EP_DEVICE void find_starts() const {}
  JAX_EP_DEVICE u32 start_of(i32) const { return 0; }

  // --- rows of this rank -------------------------------------------------------------------------

  // All lanes. `global_token` is the number of the lane's token among those of all ranks, -1 if it
  // has none. The one row of this rank that holds a token, to `source_slot`, and if `reports`, what
  // the row holds.
  JAX_EP_DEVICE void write_rows(Ptr<i32> source_slot,
                                bool reports,
                                i64 global_token,
                                bool is_local,
                                u32 row,
                                i32 expert) const {
    const u32 holders = warp_ballot(is_local && row < c_.capacity) & c_.token_lanes;
    const u32 row_of_token = warp_shfl(row, holders != 0 ? lowest_bit(holders) : lane_id());
    if (global_token < 0) return;
    const bool is_first = lane_id() == c_.first_lane;
    if (is_first) {
      st(source_slot + global_token, holders != 0 ? static_cast<i32>(row_of_token) : -1);
    }
    if (holders == 0 || !reports) return;
    if (is_first) st(Ptr<i32>{c_.op.row_source} + row_of_token, static_cast<i32>(global_token));
    st(Ptr<i32>{c_.op.row_topk_idx} +
           (i64{row_of_token} * c_.num_topk + (lane_id() - c_.first_lane)),
       is_local ? expert - c_.rank * c_.num_local : -1);
  }

  // What a row without token holds.
  JAX_EP_DEVICE void clear_row(i64 row) const {
    st(Ptr<i32>{c_.op.row_source} + row, -1);
    for (i32 k = 0; k < c_.num_topk; ++k) {
      st(Ptr<i32>{c_.op.row_topk_idx} + (row * c_.num_topk + k), -1);
    }
  }

  JAX_EP_DEVICE i32 num_gaps() const { return 0; }
  JAX_EP_DEVICE RowRange gap(i32 /*i*/) const { return {0, 0}; }
  // The first of the rows that no token of any rank can have.
  JAX_EP_DEVICE u32 end_of_rows() const { return c_.clip(rows_before(c_.num_ranks)); }

  // --- what the rank reports ---------------------------------------------------------------------

  // All lanes of a warp. Returns how many rows this lane found dropped.
  JAX_EP_DEVICE u32 write_counts() const {
    for (i32 local = static_cast<i32>(lane_id()); local < c_.num_local; local += kWarpSize) {
      c_.report_total(local);
    }
    u32 dropped = 0;
    for (i32 source = static_cast<i32>(lane_id()); source < c_.num_ranks; source += kWarpSize) {
      const u32 begin = rows_before(source);
      const u32 end = rows_before(source + 1);
      st(Ptr<i32>{c_.op.group_sizes} + source, static_cast<i32>(c_.clip(end) - c_.clip(begin)));
      dropped += (end - c_.clip(end)) - (begin - c_.clip(begin));
    }
    return dropped;
  }

 private:
  JAX_EP_DEVICE i32 bin_of(i32 rank) const { return c_.shape.num_experts + rank; }

  // Rows of this rank that hold tokens of earlier sources.
  JAX_EP_DEVICE u32 rows_before(i32 source) const {
    if (c_.tiles == 0) return 0;
    if (source == c_.num_ranks) return ld(c_.totals() + bin_of(c_.rank));
    return c_.tables.total_before(c_, bin_of(c_.rank), source);
  }

  Context& c_;
};

}  // namespace jax_ep::dev

#endif  // JAX_EP_CSRC_KERNELS_HIGH_THROUGHPUT_PLAN_RANK_LAYOUT_H_
