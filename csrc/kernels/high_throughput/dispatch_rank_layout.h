// SPDX-License-Identifier: Apache-2.0
// What a dispatch does in layout "rank" and not in layout "expert": a rank holds one row of a
// token, of all its selections there, with a scalar for each.
#ifndef JAX_EP_CSRC_KERNELS_HIGH_THROUGHPUT_DISPATCH_RANK_LAYOUT_H_
#define JAX_EP_CSRC_KERNELS_HIGH_THROUGHPUT_DISPATCH_RANK_LAYOUT_H_

#include "csrc/kernels/high_throughput/dispatch_context.h"

namespace jax_ep::dev {

template <typename BlockConfig, typename RowTypeOfCall>
class DispatchRankLayout {
 public:
  static constexpr Layout kLayout = Layout::kRank;
  using Config = BlockConfig;
  using RowType = RowTypeOfCall;
  using Context = DispatchContext<Config, RowType>;

  JAX_EP_DEVICE explicit DispatchRankLayout(const Context& context) : c_(context) {}

  // One per selection of the token, those of other ranks too.
  JAX_EP_DEVICE i32 scalars_per_row() const { return c_.num_topk; }

  // All lanes, each with its selection's scalar: each rank that gets the token gets one per
  // selection, 0 for those of other ranks.
  template <typename TokenSelections, typename Put>
  JAX_EP_DEVICE void send_scalars(const TokenSelections& selections,
                                  float scalar,
                                  const Put& put) const {
    u32 leaders = warp_ballot(selections.leads());
    for (; leaders != 0; leaders &= leaders - 1) {
      const auto dest =
          static_cast<i32>(warp_shfl(static_cast<u32>(selections.dest()), lowest_bit(leaders)));
      if (lane_id() >= static_cast<u32>(c_.num_topk)) continue;
      put(dest, lane_id(), selections.dest() == dest ? scalar : 0.0F);
    }
  }

  // All lanes; the first has the row of this rank that holds the token, or -1, and the others have
  // none.
  JAX_EP_DEVICE void expand_scalars(i32 row, Ptr<const float> arrived) const {
    const auto only = static_cast<i32>(warp_shfl(static_cast<u32>(row), 0));
    const u32 lane = lane_id();
    if (only < 0 || lane >= static_cast<u32>(c_.num_topk)) return;
    st(Ptr<float>{c_.op.row_scalars} + (i64{only} * c_.num_topk + lane), ld(arrived + lane));
  }

 private:
  const Context& c_;
};

}  // namespace jax_ep::dev

#endif  // JAX_EP_CSRC_KERNELS_HIGH_THROUGHPUT_DISPATCH_RANK_LAYOUT_H_
