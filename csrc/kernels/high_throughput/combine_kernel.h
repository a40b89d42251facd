// SPDX-License-Identifier: Apache-2.0
// Combine: a block's first warps sum the rows that this rank holds of other ranks' tokens, and send
// one row per token to its owner; meanwhile the others sum what the ranks have sent for this rank's
// own tokens, in ascending order of the ranks, and so do the first, when they have sent. What this
// rank itself holds of its own tokens is summed, and rounded, where it is added. All work chunk by
// chunk of the owner's tokens.
//
// What the layouts differ in is in combine_expert_layout.h and combine_rank_layout.h: a kernel is
// compiled for one of them, and the launch chooses.
#ifndef JAX_EP_CSRC_KERNELS_HIGH_THROUGHPUT_COMBINE_KERNEL_H_
#define JAX_EP_CSRC_KERNELS_HIGH_THROUGHPUT_COMBINE_KERNEL_H_

#include "csrc/kernels/closed_results.h"
#include "csrc/kernels/high_throughput/combine_expert_layout.h"
#include "csrc/kernels/high_throughput/combine_rank_layout.h"
#include "csrc/kernels/high_throughput/combine_receiver.h"
#include "csrc/kernels/high_throughput/combine_sender.h"

namespace jax_ep::dev {

// All threads of a closed group's combine.
template <typename Context>
JAX_EP_DEVICE void poison_combined(const Context& c) {
  poison_sums<typename Context::RowType>(c.exchange, c.params.op);
  c.exchange.report_closed();
}

// `RowLayout` is CombineExpertLayout or CombineRankLayout, of a CombineContext.
template <typename RowLayout>
class CombineKernel {
 public:
  static constexpr bool kHasTail = false;

  JAX_EP_DEVICE explicit CombineKernel(const CombineParams& params) : c_(params) {}

  JAX_EP_DEVICE void run() {
    if (c_.exchange.closed()) return poison_combined(c_);
    if (c_.exchange.takes_part()) {
      if (warp_id() < c_.num_senders) CombineSender<RowLayout>(c_).send();
      CombineReceiver<RowLayout>(c_).receive();
    } else {
      leave_empty_sums<typename RowLayout::Context::RowType>(c_.exchange, c_.params.op);
    }
    c_.exchange.finish();
  }

 private:
  typename RowLayout::Context c_;
};

}  // namespace jax_ep::dev

#endif  // JAX_EP_CSRC_KERNELS_HIGH_THROUGHPUT_COMBINE_KERNEL_H_
