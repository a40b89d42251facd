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
    // Several loads of a lane are in flight at once: what a warp moves is latency.
    constexpr u32 kAtOnce = 4;
    const auto count = static_cast<u32>(bytes / sizeof(Vec16));
    for (u32 first = lane_id(); first < count; first += kAtOnce * kWarpSize) {
      Vec16 vectors[kAtOnce];
      JAX_EP_UNROLL
      for (u32 i = 0; i < kAtOnce; ++i) {
        if (first + i * kWarpSize < count) vectors[i] = ld(source + (first + i * kWarpSize));
      }
      JAX_EP_UNROLL
      for (u32 i = 0; i < kAtOnce; ++i) {
        if (first + i * kWarpSize < count) st(target + (first + i * kWarpSize), vectors[i]);
      }
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
