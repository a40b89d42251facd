// SPDX-License-Identifier: Apache-2.0
// The selections of one token, spread over a warp: lane k holds selection k.
#ifndef JAX_EP_CSRC_DEVICE_TOKEN_SELECTIONS_H_
#define JAX_EP_CSRC_DEVICE_TOKEN_SELECTIONS_H_

#include "csrc/device/heap.h"

namespace jax_ep::dev {

JAX_EP_DEVICE u32 lowest_bit(u32 bits) {
#ifdef __CUDACC__
  return static_cast<u32>(__ffs(static_cast<int>(bits))) - 1;
#else
  return static_cast<u32>(__builtin_ctz(bits));
#endif
}
JAX_EP_DEVICE u32 count_bits(u32 bits) {
#ifdef __CUDACC__
  return static_cast<u32>(__popc(bits));
#else
  return static_cast<u32>(__builtin_popcount(bits));
#endif
}
JAX_EP_DEVICE u32 lanes_below(u32 lane) { return (1U << lane) - 1; }

// A token's selections that have a row; the others take no part. All lanes make it together.
class Selections {
 public:
  JAX_EP_DEVICE Selections(const EpShape& shape,
                           Ptr<const i32> topk_idx,
                           Ptr<const i32> slots,
                           i64 token) {
    const u32 lane = lane_id();
    expert_ = -1;
    slot_ = -1;
    if (lane < static_cast<u32>(shape.num_topk)) {
      expert_ = ld(topk_idx + (token * shape.num_topk + lane));
      slot_ = ld(slots + (token * shape.num_topk + lane));
    }
    // A handle from elsewhere must not lead out of any buffer.
    live_ =
        expert_ >= 0 && expert_ < shape.num_experts && slot_ >= 0 && slot_ < shape.recv_capacity;
    dest_ = live_ ? owner_of(expert_, shape.num_local_experts()) : -1;
    same_dest_ = warp_match(static_cast<u32>(dest_));
  }

  JAX_EP_DEVICE bool live() const { return live_; }
  JAX_EP_DEVICE i32 slot() const { return slot_; }
  // The rank that holds this lane's row; -1 if there is none.
  JAX_EP_DEVICE i32 dest() const { return dest_; }
  // Whether this lane stands for its destination rank.
  JAX_EP_DEVICE bool leads() const { return live_ && lowest_bit(same_dest_) == lane_id(); }

  // How many of the token's rows on the same rank lie before this lane's: its position in
  // source_slot there. All lanes; of use where live().
  JAX_EP_DEVICE u32 position(i32 num_topk) const {
    u32 before = 0;
    for (i32 k = 0; k < num_topk; ++k) {
      const auto other = static_cast<i32>(warp_shfl(static_cast<u32>(slot_), static_cast<u32>(k)));
      before += static_cast<u32>((same_dest_ >> k & 1) != 0 && other < slot_);
    }
    return before;
  }

 private:
  i32 expert_;
  i32 slot_;
  i32 dest_;
  u32 same_dest_;  // lanes
  bool live_;
};

// Lane j gets the j-th row of this rank that holds a token of `source`, from a plan's source_slot;
// -1: it has none.
JAX_EP_DEVICE i32 row_of_lane(
    const EpShape& shape, Layout layout, Ptr<const i32> source_slot, i32 source, i64 token) {
  const i32 max_rows = max_rows_per_token(layout, shape.num_topk, shape.num_local_experts());
  if (static_cast<i32>(lane_id()) >= max_rows) return -1;
  const i64 global_token = source * shape.num_tokens + token;
  const i32 row = ld(source_slot + (global_token * max_rows + lane_id()));
  return row < shape.recv_capacity ? row : -1;  // a handle from elsewhere
}

}  // namespace jax_ep::dev

#endif  // JAX_EP_CSRC_DEVICE_TOKEN_SELECTIONS_H_
