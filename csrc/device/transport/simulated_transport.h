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
    check_lanes(peer, to, from, bytes, signal);
    if (lane_id() == 0) put(peer, to, from, bytes, signal);
  }
  void signal(i32 peer, NetworkSignal signal) const { put(peer, 0, 0, 0, signal); }
  void acquired(Ptr<u64> word) const { network_acquired(word); }

 private:
  // All lanes call, with the same arguments; that orders nothing among them.
  static void check_lanes(i32 peer, i64 to, i64 from, u32 bytes, NetworkSignal signal) {
    const u64 numbers[] = {static_cast<u64>(peer),
                           static_cast<u64>(to),
                           static_cast<u64>(from),
                           bytes,
                           static_cast<u64>(signal.word),
                           signal.before,
                           signal.after};
    bool same = true;
    for (const u64 number : numbers) {
      for (const u32 half : {static_cast<u32>(number), static_cast<u32>(number >> 32)}) {
        same = warp_shfl(half, 0) == half && same;
      }
    }
    if (warp_ballot(!same) != 0) trap();
  }
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
