// SPDX-License-Identifier: Apache-2.0
// Hands the items of a kernel's work to its warps: who is done sooner takes more. A warp takes a
// ticket when it needs one. To take it an item earlier would hide the counter's latency, but then a
// warp sits on an item that idle ones could do, and the last of them end later: by up to a third in
// small calls (docs/measurements/performance.md).
#ifndef JAX_EP_CSRC_DEVICE_WORK_QUEUE_H_
#define JAX_EP_CSRC_DEVICE_WORK_QUEUE_H_

#include "csrc/device/heap.h"

namespace jax_ep::dev {

// Items [0, num_items), in their order. The first `num_positions` go to the warps with a position,
// one to each; all others by tickets of a counter of this rank, which is 0 when the kernel starts
// and is set back by Exchange::finish. So a small call needs no ticket. Which warp has an item
// decides nothing but when it is done. All lanes of a warp, alike.
class WorkQueue {
 public:
  // position: of the warp; -1: it has none.
  JAX_EP_DEVICE WorkQueue(Ptr<u32> tickets, i32 num_items, i32 num_positions, i32 position)
      : tickets_(tickets), num_items_(num_items), num_positions_(num_positions), item_(position) {
    if (position < 0) next();
  }

  JAX_EP_DEVICE bool has_item() const { return item_ < num_items_; }
  JAX_EP_DEVICE i32 item() const { return item_; }
  JAX_EP_DEVICE void next() {
    item_ = num_items_;
    if (num_items_ <= num_positions_) return;
    u32 ticket = 0;
    // Nothing is published with it.
    if (lane_id() == 0) ticket = fetch_add_relaxed<Scope::kGpu>(tickets_, 1);
    item_ = num_positions_ + static_cast<i32>(warp_shfl(ticket, 0));
  }

 private:
  const Ptr<u32> tickets_;
  const i32 num_items_;
  const i32 num_positions_;
  i32 item_;
};

}  // namespace jax_ep::dev

#endif  // JAX_EP_CSRC_DEVICE_WORK_QUEUE_H_
