// SPDX-License-Identifier: Apache-2.0
// A transport over mapped memory: the kernels that cross nodes, with all ranks on one.
#ifndef JAX_EP_CSRC_DEVICE_TRANSPORT_LOOPBACK_TRANSPORT_H_
#define JAX_EP_CSRC_DEVICE_TRANSPORT_LOOPBACK_TRANSPORT_H_

#include "csrc/core/kernel_params.h"
#include "csrc/device/transport/transport.h"

namespace jax_ep::dev {

struct LoopbackTransport : MappedHeaps {
  JAX_EP_DEVICE void put_and_signal(
      i32 peer, i64 to, i64 from, u32 bytes, NetworkSignal signal) const {
    const Ptr<const Vec16> source = as<const Vec16>(Ptr<const std::byte>{heap[rank] + from});
    const Ptr<Vec16> target = as<Vec16>(Ptr<std::byte>{heap[peer] + to});
    for (u32 i = lane_id(); i < bytes / sizeof(Vec16); i += kWarpSize) {
      st(target + i, ld(source + i));
    }
    warp_sync();
    if (lane_id() == 0) this->signal(peer, signal);
  }
  // RELEASE(network): all that the warp has stored, and read. ACQUIRE(network) by who waits for it.
  JAX_EP_DEVICE void signal(i32 peer, NetworkSignal signal) const {
    st_release<Scope::kSys>(as<u64>(Ptr<std::byte>{heap[peer] + signal.word}), signal.after);
  }
  JAX_EP_DEVICE void acquired(Ptr<u64> /*word*/) const {}
};

static_assert(Transport<LoopbackTransport>);

}  // namespace jax_ep::dev

#endif  // JAX_EP_CSRC_DEVICE_TRANSPORT_LOOPBACK_TRANSPORT_H_
