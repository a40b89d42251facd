// SPDX-License-Identifier: Apache-2.0
// A transport over NVSHMEM: RDMA between hosts, mapped memory where the library finds some.
//
// Of NVSHMEM only what promises the contract of transport.h is used: a put with its signal, and a
// signal alone. To a word that has one writer, and one call in flight, a signal may as well add as
// store. It adds, which is one request on a queue of InfiniBand where a store is three; but to a
// mapped peer it stores: an addition goes by the network then, if there is one (3.4.5).
#ifndef JAX_EP_CSRC_DEVICE_TRANSPORT_NVSHMEM_TRANSPORT_H_
#define JAX_EP_CSRC_DEVICE_TRANSPORT_NVSHMEM_TRANSPORT_H_

#include <nvshmem.h>
#include <nvshmemx.h>

#include "csrc/core/kernel_params.h"
#include "csrc/device/transport/transport.h"

namespace jax_ep::dev {

struct NvshmemTransport : SymmetricHeaps {
  JAX_EP_DEVICE void put_and_signal(
      i32 peer, i64 to, i64 from, u32 bytes, NetworkSignal signal) const {
    // NVSHMEM 3.4.5 reads what nobody has set in a put of no bytes (IBGDA).
    if (bytes == 0) {
      if (lane_id() == 0) this->signal(peer, signal);
      return;
    }
    // RELEASE(network): all that the warp has stored, and read. ACQUIRE(network) by who waits for
    // it.
    fence_acq_rel<Scope::kSys>();
    const Change change = change_of(peer, signal);
    nvshmemx_putmem_signal_nbi_warp(
        heap + to, heap + from, bytes, word_at(signal.word), change.value, change.how, pe[peer]);
  }
  JAX_EP_DEVICE void signal(i32 peer, NetworkSignal signal) const {
    fence_acq_rel<Scope::kSys>();
    const Change change = change_of(peer, signal);
    nvshmemx_signal_op(word_at(signal.word), change.value, change.how, pe[peer]);
  }
  // Where the target itself has to see to it that bytes are there behind their signal, a test does;
  // elsewhere it is a load.
  JAX_EP_DEVICE void acquired(Ptr<u64> word) const {
    static_cast<void>(nvshmem_uint64_test(
        reinterpret_cast<uint64_t*>(word.raw), NVSHMEM_CMP_GE, /*cmp_value=*/0));
  }

 private:
  struct Change {
    u64 value;
    int how;
  };
  JAX_EP_DEVICE Change change_of(i32 peer, const NetworkSignal& signal) const {
    if (nvshmem_ptr(heap, pe[peer]) != nullptr) return {signal.after, NVSHMEM_SIGNAL_SET};
    return {signal.after - signal.before, NVSHMEM_SIGNAL_ADD};
  }
  JAX_EP_DEVICE uint64_t* word_at(i64 offset) const {
    return reinterpret_cast<uint64_t*>(heap + offset);
  }
};

static_assert(Transport<NvshmemTransport>);

}  // namespace jax_ep::dev

#endif  // JAX_EP_CSRC_DEVICE_TRANSPORT_NVSHMEM_TRANSPORT_H_
