// SPDX-License-Identifier: Apache-2.0
// The selections of one token, spread over a warp: lane k holds selection k.
#ifndef JAX_EP_CSRC_DEVICE_TOKEN_SELECTIONS_H_
#define JAX_EP_CSRC_DEVICE_TOKEN_SELECTIONS_H_

#include "csrc/device/heap.h"
#include "csrc/device/peers.h"

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

// Of the first `num_topk` lanes, how many of `lanes` have less than this one. All lanes.
JAX_EP_DEVICE u32 num_earlier(i32 value, u32 lanes, i32 num_topk) {
  u32 before = 0;
  for (i32 k = 0; k < num_topk; ++k) {
    const auto other = static_cast<i32>(warp_shfl(static_cast<u32>(value), static_cast<u32>(k)));
    before += static_cast<u32>((lanes >> k & 1) != 0 && other < value);
  }
  return before;
}

// Whether a selection has a row. A handle from elsewhere must not lead out of any buffer.
JAX_EP_DEVICE bool has_row(const EpShape& shape, i32 expert, i32 slot) {
  return expert >= 0 && expert < shape.num_experts && slot >= 0 && slot < shape.recv_capacity;
}

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
    live_ = has_row(shape, expert_, slot_);
    dest_ = live_ ? owner_of(expert_, shape.num_local_experts()) : -1;
    same_dest_ = warp_match(static_cast<u32>(dest_));
  }

  // All lanes: those of them whose rows are on ranks [first, first + count).
  JAX_EP_DEVICE Selections within(i32 first, i32 count) const {
    Selections found = *this;
    found.live_ = live_ && dest_ >= first && dest_ < first + count;
    found.dest_ = found.live_ ? dest_ : -1;
    found.same_dest_ = warp_match(static_cast<u32>(found.dest_));
    return found;
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
    return num_earlier(slot_, same_dest_, num_topk);
  }

 private:
  i32 expert_;
  i32 slot_;
  i32 dest_;
  u32 same_dest_;  // lanes
  bool live_;
};

// The same before there is a plan: the selections that it will give a row, and those that it will
// drop because their rank has no room. What is sent for these nobody reads. All lanes make it
// together.
class UnplannedSelections {
 public:
  JAX_EP_DEVICE UnplannedSelections(const RankView& view,
                                    const EpShape& shape,
                                    Ptr<const i32> topk_idx,
                                    i64 token) {
    const u32 lane = lane_id();
    expert_ = -1;
    if (lane < static_cast<u32>(shape.num_topk)) {
      expert_ = ld(topk_idx + (token * shape.num_topk + lane));
    }
    dest_ = -1;
    if (expert_ >= 0 && expert_ < shape.num_experts) {
      const i32 owner = owner_of(expert_, shape.num_local_experts());
      if (is_active(view, owner)) dest_ = owner;
    }
    // As in a plan, a selection that repeats an earlier one of its token gets no row.
    if (lowest_bit(warp_match(static_cast<u32>(expert_))) != lane) dest_ = -1;
    same_dest_ = warp_match(static_cast<u32>(dest_));
  }

  JAX_EP_DEVICE bool live() const { return dest_ >= 0; }
  JAX_EP_DEVICE i32 dest() const { return dest_; }
  JAX_EP_DEVICE bool leads() const { return live() && lowest_bit(same_dest_) == lane_id(); }
  // A rank's rows of a token are in the order of its experts, and those that find no room come
  // last.
  JAX_EP_DEVICE u32 position(i32 num_topk) const {
    return num_earlier(expert_, same_dest_, num_topk);
  }

 private:
  i32 expert_;
  i32 dest_;
  u32 same_dest_;  // lanes
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
