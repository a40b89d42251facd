// SPDX-License-Identifier: Apache-2.0
// Telling the host which kernel between domains runs. All other waits of a kernel have deadlines;
// calls of its transport have none, and a kernel that does not come back from one says nothing.
// Who watches: jax_ep/_src/groups/stuck_kernels.py.
#ifndef JAX_EP_CSRC_DEVICE_KERNEL_PHASE_H_
#define JAX_EP_CSRC_DEVICE_KERNEL_PHASE_H_

#include "csrc/device/exchange.h"

namespace jax_ep::dev {

// One thread.
JAX_EP_DEVICE void put_phase(const Exchange& exchange, const NetworkView& network, bool running) {
  const auto channel = static_cast<i32>(exchange.channel());
  st_relaxed<Scope::kSys>(
      Ptr<u64>{network.phases} + channel,
      pack(KernelPhase{
          .epoch = exchange.epoch(), .op = static_cast<u32>(exchange.op()), .running = running}));
}
// All threads, first thing in a kernel whose group is open. The thread comes before the last block
// that is done, which puts the end.
JAX_EP_DEVICE void put_begin(const Exchange& exchange, const NetworkView& network) {
  if (block_id() == 0 && thread_id() == 0) put_phase(exchange, network, /*running=*/true);
}
// One lane of the last block.
JAX_EP_DEVICE void put_end(const Exchange& exchange, const NetworkView& network) {
  put_phase(exchange, network, /*running=*/false);
}

}  // namespace jax_ep::dev

#endif  // JAX_EP_CSRC_DEVICE_KERNEL_PHASE_H_
