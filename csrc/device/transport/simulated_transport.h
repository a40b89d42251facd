// SPDX-License-Identifier: Apache-2.0
// The transport of the simulator's network.
#ifndef JAX_EP_CSRC_DEVICE_TRANSPORT_SIMULATED_TRANSPORT_H_
#define JAX_EP_CSRC_DEVICE_TRANSPORT_SIMULATED_TRANSPORT_H_

#include "csrc/device/transport/transport.h"

namespace jax_ep::dev {

struct SimulatedTransport {
  std::byte* heap[kMaxRanks];  // by rank; only this rank's may be accessed
  i32 rank;                    // this one

  void put_and_signal(i32 peer, i64 to, i64 from, u32 bytes, NetworkSignal signal) const {
    if (lane_id() == 0) put(peer, to, from, bytes, signal);
  }
  void signal(i32 peer, NetworkSignal signal) const { put(peer, 0, 0, 0, signal); }
  // What hardware may need here has no counterpart.
  void acquired(Ptr<u64> /*word*/) const {}

 private:
  void put(i32 peer, i64 to, i64 from, u32 bytes, NetworkSignal signal) const {
    network_put(Ptr<std::byte>{heap[peer] + to},
                Ptr<const std::byte>{heap[rank] + from},
                bytes,
                as<u64>(Ptr<std::byte>{heap[peer] + signal.word}),
                signal.before,
                signal.after);
  }
};

static_assert(Transport<SimulatedTransport>);

}  // namespace jax_ep::dev

#endif  // JAX_EP_CSRC_DEVICE_TRANSPORT_SIMULATED_TRANSPORT_H_
