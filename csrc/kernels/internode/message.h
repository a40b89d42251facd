// SPDX-License-Identifier: Apache-2.0
// What a message of rows between domains holds (one of a plan: plan_routing.h), and a unit of sums:
// which tokens of the rail chunk it has, a row of each, and if scalars travel what there is of
// these. Rows and scalars are packed: the i-th is of the i-th token that the message has.
#ifndef JAX_EP_CSRC_KERNELS_INTERNODE_MESSAGE_H_
#define JAX_EP_CSRC_KERNELS_INTERNODE_MESSAGE_H_

#include "csrc/core/network_layout.h"
#include "csrc/device/token_selections.h"

namespace jax_ep::dev {

// Tokens of a rail chunk, counted from its first.
struct TokenSet {
  u64 bits;

  JAX_EP_DEVICE bool has(i32 token) const { return (bits >> token & 1) != 0; }
  // How many come before.
  JAX_EP_DEVICE i32 place(i32 token) const {
    return TokenSet{bits & ((u64{1} << token) - 1)}.count();
  }
  JAX_EP_DEVICE i32 count() const {
    return static_cast<i32>(count_bits(static_cast<u32>(bits)) +
                            count_bits(static_cast<u32>(bits >> 32)));
  }
};

// All lanes: the tokens of [first, last) of which `is_in(token)` holds, which a lane asks for each.
template <typename IsIn>
JAX_EP_DEVICE TokenSet tokens_where(i64 first, i64 last, const IsIn& is_in) {
  u64 bits = 0;
  for (i32 half = 0; half < kMaxRailChunkTokens / static_cast<i32>(kWarpSize); ++half) {
    const i64 token = first + half * static_cast<i32>(kWarpSize) + lane_id();
    const u32 found = warp_ballot(token < last && is_in(token));
    bits |= u64{found} << (half * static_cast<i32>(kWarpSize));
  }
  return {bits};
}

// Where things lie in a message of so many tokens, in bytes.
struct MessageLayout {
  i64 row_bytes;      // of each row, a multiple of 16
  i64 scalar_stride;  // of each token's scalars, likewise; 0: none travel

  JAX_EP_DEVICE i64 row(i32 place) const { return kMessageHeaderBytes + place * row_bytes; }
  JAX_EP_DEVICE i64 scalars(i32 count, i32 place) const {
    return row(count) + place * scalar_stride;
  }
  JAX_EP_DEVICE i64 bytes(i32 count) const { return scalars(count, count); }
};

// The header: the tokens.
JAX_EP_DEVICE void write_header(Ptr<std::byte> message, const TokenSet& tokens) {
  if (lane_id() != 0) return;
  const auto low = static_cast<u32>(tokens.bits);
  const auto high = static_cast<u32>(tokens.bits >> 32);
  st(as<Vec16>(message), Vec16{{low, high, 0, 0}});
}
JAX_EP_DEVICE TokenSet read_header(Ptr<const std::byte> message) {
  const Vec16 header = ld(as<const Vec16>(message));
  return {u64{header.word[1]} << 32 | header.word[0]};
}

// All lanes: zeros, before parts of it are stored. What fills up a message travels, too, and must
// not be what somebody else has left there.
JAX_EP_DEVICE void clear_part(Ptr<std::byte> at, i64 bytes) {
  clear<Vec16>(at, bytes);
  warp_sync();
}

// A token's scalars in a message between domains: K of each rank that holds it, in the order of the
// ranks, behind a word that has a bit for each of these.
class TokenScalars {
 public:
  JAX_EP_DEVICE TokenScalars(Ptr<std::byte> at, i32 num_topk) : at_(at), num_topk_(num_topk) {}
  JAX_EP_DEVICE TokenScalars(Ptr<const std::byte> at, i32 num_topk)
      : at_{const_cast<std::byte*>(at.raw)}, num_topk_(num_topk) {}

  JAX_EP_DEVICE void write_holders(u32 ranks) const { st(as<u32>(at_), ranks); }
  JAX_EP_DEVICE u32 holders() const { return ld(as<u32>(at_)); }
  JAX_EP_DEVICE Ptr<float> of(u32 holders, i32 rank) const {
    const auto before = static_cast<i32>(count_bits(holders & lanes_below(rank)));
    return as<float>(at_ + 16) + before * num_topk_;
  }

 private:
  const Ptr<std::byte> at_;
  const i32 num_topk_;
};

}  // namespace jax_ep::dev

#endif  // JAX_EP_CSRC_KERNELS_INTERNODE_MESSAGE_H_
