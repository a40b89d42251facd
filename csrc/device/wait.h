// SPDX-License-Identifier: Apache-2.0
// Waiting for a word that another thread, block or rank stores: always with a deadline, which ends
// in an error record for the host and a trap, never in a silent hang.
#ifndef JAX_EP_CSRC_DEVICE_WAIT_H_
#define JAX_EP_CSRC_DEVICE_WAIT_H_

#include "csrc/device/heap.h"
#include "csrc/device/primitives.h"

namespace jax_ep::dev {

// What a wait is for, as the error record will say.
struct WaitSite {
  WaitTag tag;
  OpKind op;
  i32 peer;
  u32 chunk;
};

// Tells the host why, and ends the kernel.
JAX_EP_DEVICE void give_up(const RankView& view, const WaitSite& site, u32 expected, u32 seen) {
  const Ptr<u32> record = as<u32>(Ptr<ErrorRecord>{view.error});
  // The first of the threads that give up writes; the others give it time to.
  if (fetch_add_acq_rel<Scope::kGpu>(control(view, Control::kFailed), 1) == 0) {
    const u32 fields[] = {static_cast<u32>(site.tag),
                          static_cast<u32>(site.op),
                          static_cast<u32>(view.rank),
                          static_cast<u32>(site.peer),
                          expected,
                          seen,
                          site.chunk};
    for (int i = 0; i < 7; ++i) st(record + (1 + i), fields[i]);
    // RELEASE(error): publishes the record. Its acquire is the host's, see RankContext::error.
    st_release<Scope::kSys>(record, 1);
    fence_acq_rel<Scope::kSys>();
  } else {
    while (ld_acquire<Scope::kSys>(record) == 0) spin_pause("another thread's error record");
  }
  trap();
}

// Waits until `*word` is one of `first` to `last`, which may wrap around, and returns it. The load
// that ends the wait is an acquire.
template <Scope kScope>
JAX_EP_DEVICE u32 wait_until_in(const RankView& view,
                                Ptr<u32> word,
                                u32 first,
                                u32 last,
                                const WaitSite& site,
                                const char* what) {
  // Who waits for its own rank, which in turn waits for another one, must not give up first.
  const bool own = site.tag == WaitTag::kGridBarrier || site.peer == view.rank;
  const u64 timeout_ns = own ? 2 * view.timeout_ns : view.timeout_ns;
  const u64 start = now_ns();
  while (true) {
    const u32 seen = ld_acquire<kScope>(word);
    if (seen - first <= last - first) return seen;
    if (now_ns() - start > timeout_ns) give_up(view, site, first, seen);
    spin_pause(what);
  }
}

// Waits until a counter that every exchange advances has reached `expected`.
template <Scope kScope>
JAX_EP_DEVICE void wait_until_reached(
    const RankView& view, Ptr<u32> counter, u32 expected, const WaitSite& site, const char* what) {
  constexpr u32 kHalf = 0x7FFF'FFFF;  // counters wrap around: what is ahead is ahead by less
  (void)wait_until_in<kScope>(view, counter, expected, expected + kHalf, site, what);
}

}  // namespace jax_ep::dev

#endif  // JAX_EP_CSRC_DEVICE_WAIT_H_
