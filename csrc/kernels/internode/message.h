// SPDX-License-Identifier: Apache-2.0
// What messages between domains hold. Those of a plan: words (plan_routing.h, counts_exchange.h).
// Those of rows, and units of sums: which tokens of the rail chunk they have, a row of each, and if
// scalars travel what there is of these. Rows and scalars are packed: the i-th is of the i-th token
// that the message has.
#ifndef JAX_EP_CSRC_KERNELS_INTERNODE_MESSAGE_H_
#define JAX_EP_CSRC_KERNELS_INTERNODE_MESSAGE_H_

#include "csrc/core/network_layout.h"
#include "csrc/device/token_selections.h"

namespace jax_ep::dev {

// All lanes of a warp. Several loads of a lane are in flight at once.
JAX_EP_DEVICE void copy_words(Ptr<u32> to, Ptr<const u32> from, i64 count) {
  constexpr u32 kAtOnce = 4;
  const auto num_words = static_cast<u32>(count);
  JAX_EP_NO_UNROLL
  for (u32 first = lane_id(); first < num_words; first += kAtOnce * kWarpSize) {
    u32 words[kAtOnce];
    JAX_EP_UNROLL
    for (u32 i = 0; i < kAtOnce; ++i) {
      if (first + i * kWarpSize < num_words) words[i] = ld(from + (first + i * kWarpSize));
    }
    JAX_EP_UNROLL
    for (u32 i = 0; i < kAtOnce; ++i) {
      if (first + i * kWarpSize < num_words) st(to + (first + i * kWarpSize), words[i]);
    }
  }
}

// The same into a message. Returns the bytes that travel, which are whole vectors.
JAX_EP_DEVICE i64 put_words(Ptr<u32> to, Ptr<const u32> from, i64 count) {
  constexpr i64 kVectorWords = 4;
  copy_words(to, from, count);
  const i64 words = align_up(count, kVectorWords);
  // What fills up the last one is sent, too.
  for (i64 i = count + lane_id(); i < words; i += kWarpSize) st(to + i, 0U);
  return 4 * words;
}

// Tokens of a rail chunk, counted from its first.
struct TokenSet {
  u64 bits;

  JAX_EP_DEVICE bool has(i32 token) const { return (bits >> token & 1) != 0; }
  // How many come before.
  JAX_EP_DEVICE i32 position(i32 token) const {
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

  JAX_EP_DEVICE i64 row(i32 position) const { return kMessageHeaderBytes + position * row_bytes; }
  JAX_EP_DEVICE i64 scalars(i32 count, i32 position) const {
    return row(count) + position * scalar_stride;
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
