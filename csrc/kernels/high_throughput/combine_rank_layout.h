// SPDX-License-Identifier: Apache-2.0
// What a combine does in layout "rank" and not in layout "expert": a rank holds one row of a token,
// of all its selections there, with a weight and a scalar for each.
#ifndef JAX_EP_CSRC_KERNELS_HIGH_THROUGHPUT_COMBINE_RANK_LAYOUT_H_
#define JAX_EP_CSRC_KERNELS_HIGH_THROUGHPUT_COMBINE_RANK_LAYOUT_H_

#include "csrc/kernels/high_throughput/combine_context.h"

namespace jax_ep::dev {

// Of a high-throughput combine's context, or of a low-latency one's.
template <typename ContextOfCall>
class CombineRankLayout {
 public:
  static constexpr Layout kLayout = Layout::kRank;
  using Context = ContextOfCall;

  JAX_EP_DEVICE explicit CombineRankLayout(const Context& context) : c_(context) {}

  // All lanes; the first has the row of this rank that holds the token, or -1, and the others have
  // none. One term, with a weight per selection.
  JAX_EP_DEVICE SumTerms held_terms(i32 row) const {
    const i32 only = row_of_token(row);
    SumTerms terms{};
    terms.set(only >= 0 ? 1 : 0, 1);
    if (only < 0) return terms;
    terms.row = c_.y_row(only);
    terms.weight = 1.0F;
    if (c_.params.op.weighted) list_weights(only, terms);
    return terms;
  }

  // All lanes, as above: a scalar per selection of the token, those of other ranks too.
  template <typename Put>
  JAX_EP_DEVICE void send_scalars(i32 row, const Put& put) const {
    const i32 only = row_of_token(row);
    const u32 lane = lane_id();
    if (only < 0 || lane >= static_cast<u32>(c_.num_topk)) return;
    put(lane, c_.row_scalar(i64{only} * c_.num_topk + lane));
  }

  // All lanes. Of which scalar of the token, among those that its selection's rank sends, a lane's
  // selection is; and where it lies if that is this rank.
  JAX_EP_DEVICE u32 scalar_position(const Selections&) const { return lane_id(); }
  JAX_EP_DEVICE i64 own_scalar_at(const Selections& selections) const {
    return i64{selections.slot()} * c_.num_topk + lane_id();
  }

 private:
  JAX_EP_DEVICE static i32 row_of_token(i32 row) {
    return static_cast<i32>(warp_shfl(static_cast<u32>(row), 0));
  }

  // One weight per selection of the token here, by ascending expert.
  JAX_EP_DEVICE void list_weights(i32 row, SumTerms& terms) const {
    const i64 at = i64{row} * c_.num_topk + lane_id();
    const bool is_selection = static_cast<i32>(lane_id()) < c_.num_topk;
    const i32 local = is_selection ? ld(Ptr<const i32>{c_.params.op.row_topk_idx} + at) : -1;
    const float weight = local >= 0 ? c_.weight(at) : 0.0F;
    i32 position = 0;
    JAX_EP_NO_UNROLL
    for (i32 k = 0; k < c_.num_topk; ++k) {
      const auto other = static_cast<i32>(warp_shfl(static_cast<u32>(local), static_cast<u32>(k)));
      // A plan's are distinct. Those of a handle from elsewhere may be equal, and each must have a
      // position of its own: the sum reads as many as there are.
      const bool earlier = other == local && k < static_cast<i32>(lane_id());
      position += static_cast<i32>(other >= 0 && (other < local || earlier));
    }
    const i32 from = lane_with_position(local >= 0 ? position : -1, c_.num_topk);
    // A handle from elsewhere may have a row of no selections: it counts with a weight of 0.
    const float weight_of_lane = shfl_float(weight, from < 0 ? 0 : from);
    const auto count = static_cast<i32>(count_bits(warp_ballot(local >= 0)));
    terms.weight = from < 0 ? 0.0F : weight_of_lane;
    terms.set(terms.own(), count > 0 ? count : 1);
  }

  const Context& c_;
};

}  // namespace jax_ep::dev

#endif  // JAX_EP_CSRC_KERNELS_HIGH_THROUGHPUT_COMBINE_RANK_LAYOUT_H_
