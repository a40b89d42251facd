// SPDX-License-Identifier: Apache-2.0
// What a dispatch does in layout "expert" and not in layout "rank": a rank holds a row for each of
// a token's selections, with a scalar of its own.
#ifndef JAX_EP_CSRC_KERNELS_HIGH_THROUGHPUT_DISPATCH_EXPERT_LAYOUT_H_
#define JAX_EP_CSRC_KERNELS_HIGH_THROUGHPUT_DISPATCH_EXPERT_LAYOUT_H_

#include "csrc/kernels/high_throughput/dispatch_context.h"

namespace jax_ep::dev {

template <typename BlockConfig, typename RowTypeOfCall>
class DispatchExpertLayout {
 public:
  static constexpr Layout kLayout = Layout::kExpert;
  using Config = BlockConfig;
  using RowType = RowTypeOfCall;
  using Context = DispatchContext<Config, RowType>;

  JAX_EP_DEVICE explicit DispatchExpertLayout(const Context& context) : c_(context) {}

  JAX_EP_DEVICE i32 scalars_per_row() const { return 1; }

  // All lanes, each with its selection's scalar: it goes to the rank of that selection's row, by
  // `put(rank, position, scalar)`.
  template <typename TokenSelections, typename Put>
  JAX_EP_DEVICE void send_scalars(const TokenSelections& selections,
                                  float scalar,
                                  const Put& put) const {
    const u32 position = selections.position(c_.num_topk);
    if (selections.live()) put(selections.dest(), position, scalar);
  }

  // All lanes; each has a row of this rank that holds the token, or -1. A scalar has arrived for
  // each of the rows, in their order.
  JAX_EP_DEVICE void expand_scalars(i32 row, Ptr<const float> arrived) const {
    if (row >= 0) st(Ptr<float>{c_.op.row_scalars} + row, ld(arrived + lane_id()));
  }

 private:
  const Context& c_;
};

}  // namespace jax_ep::dev

#endif  // JAX_EP_CSRC_KERNELS_HIGH_THROUGHPUT_DISPATCH_EXPERT_LAYOUT_H_
