// SPDX-License-Identifier: Apache-2.0
// Dispatch: a block's first warps send, meanwhile the others receive, and so do the first, when
// they have sent. When all ranks have, the blocks of the tail join them. All work chunk by chunk.
#ifndef JAX_EP_CSRC_KERNELS_HIGH_THROUGHPUT_DISPATCH_KERNEL_H_
#define JAX_EP_CSRC_KERNELS_HIGH_THROUGHPUT_DISPATCH_KERNEL_H_

#include "csrc/kernels/high_throughput/dispatch_receiver.h"
#include "csrc/kernels/high_throughput/dispatch_sender.h"

namespace jax_ep::dev {

template <typename Config, typename RowType>
class DispatchKernel {
 public:
  static constexpr bool kHasTail = true;

  JAX_EP_DEVICE explicit DispatchKernel(const DispatchParams& params)
      : context_(params.op, exchange_of(params), params.num_senders) {}

  JAX_EP_DEVICE void run() {
    DispatchReceiver<Config, RowType> receiver(context_);
    const bool in_tail = context_.exchange.in_tail();
    if (context_.exchange.closed()) {
      if (!in_tail) leave_no_results();
      return;
    }
    if (!in_tail && warp_id() < context_.num_senders)
      DispatchSender<Config, RowType>(context_).send();
    receiver.receive();
    bulk_wait<0>();
    context_.exchange.finish();
  }

 private:
  JAX_EP_DEVICE void leave_no_results() {
    DispatchReceiver<Config, RowType>(context_).poison_results();
    context_.exchange.report_closed();
  }

  DispatchContext<Config, RowType> context_;
};

}  // namespace jax_ep::dev

#endif  // JAX_EP_CSRC_KERNELS_HIGH_THROUGHPUT_DISPATCH_KERNEL_H_
