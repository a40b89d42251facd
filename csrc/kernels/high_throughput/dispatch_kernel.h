// SPDX-License-Identifier: Apache-2.0
// Dispatch: a block's first warps send, meanwhile the others receive, and so do the first, when
// they have sent. When all ranks have, the blocks of the tail join them. All work chunk by chunk.
//
// What the layouts differ in is in dispatch_expert_layout.h and dispatch_rank_layout.h: a kernel is
// compiled for one of them, and the launch chooses.
#ifndef JAX_EP_CSRC_KERNELS_HIGH_THROUGHPUT_DISPATCH_KERNEL_H_
#define JAX_EP_CSRC_KERNELS_HIGH_THROUGHPUT_DISPATCH_KERNEL_H_

#include "csrc/kernels/closed_results.h"
#include "csrc/kernels/high_throughput/dispatch_expert_layout.h"
#include "csrc/kernels/high_throughput/dispatch_rank_layout.h"
#include "csrc/kernels/high_throughput/dispatch_receiver.h"
#include "csrc/kernels/high_throughput/dispatch_sender.h"

namespace jax_ep::dev {

// `RowLayout` is DispatchExpertLayout or DispatchRankLayout.
template <typename RowLayout>
class DispatchKernel {
 public:
  static constexpr bool kHasTail = true;

  JAX_EP_DEVICE explicit DispatchKernel(const DispatchParams& params)
      : context_(params.op, exchange_of(params), params.num_senders) {}

  JAX_EP_DEVICE void run() {
    DispatchReceiver<RowLayout> receiver(context_);
    const bool in_tail = context_.exchange.in_tail();
    if (context_.exchange.closed()) {
      if (!in_tail) leave_no_results();
      return;
    }
    if (context_.exchange.takes_part()) {
      if (!in_tail && warp_id() < context_.num_senders) DispatchSender<RowLayout>(context_).send();
      receiver.receive();
      bulk_wait<0>();
    } else if (!in_tail) {
      leave_empty_rows<typename RowLayout::RowType>(context_.exchange, context_.op);
    }
    context_.exchange.finish();
  }

 private:
  JAX_EP_DEVICE void leave_no_results() {
    poison_rows<typename RowLayout::RowType>(context_.exchange, context_.op);
    context_.exchange.report_closed();
  }

  typename RowLayout::Context context_;
};

}  // namespace jax_ep::dev

#endif  // JAX_EP_CSRC_KERNELS_HIGH_THROUGHPUT_DISPATCH_KERNEL_H_
