// SPDX-License-Identifier: Apache-2.0
// What kernels use to reach ranks of other nodes: a transport puts bytes of this rank's registered
// heap into a peer's, and then changes a word there. A transport is a value, a part of a kernel's
// parameters, and kernels are templates of it. This is its contract; nothing else may be relied on.
//
// 1. Release. A call takes as its source what happens before it in the order of the calling warp:
//    weak stores of other lanes need a warp_sync before it, bulk stores a bulk_wait<0> of the lane
//    that issued them and then a warp_sync. The transport adds what its hardware needs.
// 2. Bytes are read from the source at any time after the call, piece by piece, and appear at the
//    target at any time, in any order, torn.
// 3. Signal. The word changes once all bytes of this call have appeared. It says nothing of any
//    other call, be it of the same thread, to the same peer, or before this one.
// 4. Acquire. Who has loaded the new value by ld_acquire<kSys>, and then called `acquired(word)`,
//    may read those bytes, by bulk loads after a fence_proxy_async, and may pass that on by a
//    release of any scope, also to other GPUs of its node. It also knows all that the caller knew.
// 5. Reuse. The source may be written again once the caller has acquired a word whose release came
//    after the acquire of this call's word: a credit. Nothing tells of completion at this end.
// 6. Words. Each is written by the calls of one rank, has at most one call in flight, and is never
//    stored to locally once the group is made.
// 7. Progress. What a call does appears without help of kernels at the target. A call itself may
//    wait for room in a queue, without deadline.
// 8. There are no loads, stores or atomics on another node's memory, and no calls that order
//    others.
//
// Within a node none is used: kernels store to mapped memory, through csrc/device/peers.h, which
// csrc/runtime/transport maps. Those who use one are csrc/kernels/internode, through rail.h.
//
// Implementations: NvshmemTransport; LoopbackTransport, over mapped memory of one node; and
// SimulatedTransport. One more needs .cu files as csrc/kernels/internode has them for these, and a
// host's side: csrc/runtime/transport/internode_kernels.h. What the contract allows, the simulator
// does (csrc/sim/network.cc); its litmus tests are in csrc/sim/tests/network_litmus_test.cc.
#ifndef JAX_EP_CSRC_DEVICE_TRANSPORT_TRANSPORT_H_
#define JAX_EP_CSRC_DEVICE_TRANSPORT_TRANSPORT_H_

#include <concepts>

#include "csrc/core/limits.h"
#include "csrc/device/primitives.h"

namespace jax_ep::dev {

// A word of a peer's heap, what it holds, and what it will hold.
struct NetworkSignal {
  i64 word;  // offset in the heap, in bytes; a multiple of 8
  u64 before;
  u64 after;
};

// Offsets are in bytes, of the heap of this rank or of the peer's. They and sizes are multiples of
// 16.
template <typename T>
concept Transport = requires(
    const T& transport, i32 peer, i64 offset, u32 bytes, NetworkSignal signal, Ptr<u64> word) {
  // All lanes of a warp: bytes from offset `from` of this rank's heap to offset `to` of the peer's.
  transport.put_and_signal(peer, /*to=*/offset, /*from=*/offset, bytes, signal);
  // One lane: the word alone.
  transport.signal(peer, signal);
  // One lane, after the acquire that ended a wait for the word.
  transport.acquired(word);
};

}  // namespace jax_ep::dev

#endif  // JAX_EP_CSRC_DEVICE_TRANSPORT_TRANSPORT_H_
