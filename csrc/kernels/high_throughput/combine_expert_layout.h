// SPDX-License-Identifier: Apache-2.0
// What a combine does in layout "expert" and not in layout "rank": a rank holds a row for each of a
// token's selections, with a weight and a scalar of its own.
#ifndef JAX_EP_CSRC_KERNELS_HIGH_THROUGHPUT_COMBINE_EXPERT_LAYOUT_H_
#define JAX_EP_CSRC_KERNELS_HIGH_THROUGHPUT_COMBINE_EXPERT_LAYOUT_H_

#include "csrc/kernels/high_throughput/combine_context.h"

namespace jax_ep::dev {

// Of a high-throughput combine's context, or of a low-latency one's.
template <typename ContextOfCall>
class CombineExpertLayout {
 public:
  static constexpr Layout kLayout = Layout::kExpert;
  using Context = ContextOfCall;

  JAX_EP_DEVICE explicit CombineExpertLayout(const Context& context) : c_(context) {}

  // All lanes; each has a row of this rank that holds the token, or -1. One term per row,
  // ascending, as its experts are.
  JAX_EP_DEVICE SumTerms held_terms(i32 row) const {
    const u32 holders = warp_ballot(row >= 0);
    SumTerms terms{};
    terms.set(static_cast<i32>(count_bits(holders)), 1);
    if (holders == 0) return terms;
    // The rows of a plan have no holes; those of a handle from elsewhere may.
    const i32 position =
        row >= 0 ? static_cast<i32>(count_bits(holders & lanes_below(lane_id()))) : -1;
    const float weight = row >= 0 && c_.params.op.weighted ? c_.weight(row) : 1.0F;
    if ((holders & (holders + 1)) == 0) {
      terms.row = c_.y_row(row);
      terms.weight = weight;
      return terms;
    }
    const i32 from = lane_with_position(position, c_.num_topk);
    const i32 lane = from < 0 ? 0 : from;
    terms.row =
        c_.y_row(static_cast<i32>(warp_shfl(static_cast<u32>(row), static_cast<u32>(lane))));
    terms.weight = shfl_float(weight, lane);
    return terms;
  }

  // All lanes, each with a row as above: a scalar per row, by `put(position, scalar)`. A lane's
  // position is its number.
  template <typename Put>
  JAX_EP_DEVICE void send_scalars(i32 row, const Put& put) const {
    if (row >= 0) put(lane_id(), c_.row_scalar(row));
  }

  // All lanes. Of which scalar of the token, among those that its selection's rank sends, a lane's
  // selection is; and where it lies if that is this rank.
  JAX_EP_DEVICE u32 scalar_position(const Selections& selections) const {
    return selections.position(c_.num_topk);
  }
  JAX_EP_DEVICE i64 own_scalar_at(const Selections& selections) const { return selections.slot(); }

 private:
  const Context& c_;
};

}  // namespace jax_ep::dev

#endif  // JAX_EP_CSRC_KERNELS_HIGH_THROUGHPUT_COMBINE_EXPERT_LAYOUT_H_
