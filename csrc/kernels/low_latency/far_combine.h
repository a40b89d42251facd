// SPDX-License-Identifier: Apache-2.0
// A low-latency combine with ranks of other domains: to each goes a first message without routing,
// and one for every few of its tokens, with the sum of each of those of which this rank holds rows.
// What comes is summed in the two levels of CombineOp::domain_size.
//
// The sender reads source_slot and what its sums are made of, and writes the send buffers.
#ifndef JAX_EP_CSRC_KERNELS_LOW_LATENCY_FAR_COMBINE_H_
#define JAX_EP_CSRC_KERNELS_LOW_LATENCY_FAR_COMBINE_H_

#include "csrc/core/ops.h"
#include "csrc/device/convert.h"
#include "csrc/kernels/internode/message.h"
#include "csrc/kernels/low_latency/far_ranks.h"

namespace jax_ep::dev {

// All lanes of a warp. `Context` is a LowLatencyCombineContext, `Far` FarRanks.
template <Layout kLayout, typename Context, typename Far>
class FarCombine {
 public:
  JAX_EP_DEVICE FarCombine(const Context& context, const Far& far) : c_(context), far_(far) {}

  // Those messages of warps [0, num_warps) that `warp` has. `write_sum(owner, token, row)` stores
  // this rank's sum of an owner's token.
  template <typename WriteSum>
  JAX_EP_DEVICE void send(i32 warp, i32 num_warps, const WriteSum& write_sum) const {
    const i32 messages = far_.count() * (1 + far_.num_chunks());
    for (i32 item = warp; item < messages; item += num_warps) {
      const i32 owner = far_.at_turn(item % far_.count());
      const i32 message = item / far_.count();
      if (message == 0) {
        if (lane_id() == 0) far_.announce(owner);
      } else {
        send_sums(owner, message - 1, write_sum);
      }
    }
  }

  // The sum of a token that an owner gets of a far rank; null if it gets none, as of a handle from
  // elsewhere.
  JAX_EP_DEVICE Ptr<const std::byte> row(i32 source, i64 token) const {
    const i32 chunk = far_.chunk_of(token);
    if (lane_id() == 0) far_.wait(source, 1 + chunk);
    warp_sync();
    const Ptr<const std::byte> message = far_.message(source, 1 + chunk);
    const auto index = static_cast<i32>(token - far_.first_token(chunk));
    const TokenSet tokens = read_header(message);
    if (!tokens.has(index)) return {nullptr};
    return message + layout().row(tokens.position(index));
  }

 private:
  JAX_EP_DEVICE MessageLayout layout() const {
    return {.row_bytes = c_.row_bytes, .scalar_stride = 0};
  }

  template <typename WriteSum>
  JAX_EP_DEVICE void send_sums(i32 owner, i32 chunk, const WriteSum& write_sum) const {
    const i64 first = far_.first_token(chunk);
    const i64 last = far_.last_token(chunk);
    const TokenSet tokens =
        tokens_where(first, last, [this, owner](i64 token) { return holds(owner, token); });
    const Ptr<std::byte> message = far_.send_buffer(owner, 1 + chunk);
    write_header(message, tokens);
    for (i64 token = first; token < last; ++token) {
      const auto i = static_cast<i32>(token - first);
      if (tokens.has(i)) write_sum(owner, token, message + layout().row(tokens.position(i)));
    }
    far_.send(owner, 1 + chunk, layout().bytes(tokens.count()));
  }

  // One lane: whether this rank has a row of an owner's token.
  JAX_EP_DEVICE bool holds(i32 owner, i64 token) const {
    const i32 max_rows = max_rows_per_token(kLayout, c_.num_topk, c_.shape.num_local_experts());
    const i64 global_token = owner * c_.shape.num_tokens + token;
    for (i32 i = 0; i < max_rows; ++i) {
      const i32 row = ld(Ptr<const i32>{c_.params.op.source_slot} + (global_token * max_rows + i));
      if (row >= 0 && row < c_.shape.recv_capacity) return true;  // as in row_of_lane
    }
    return false;
  }

  const Context& c_;
  const Far& far_;
};

// The upper level of a lane's sums, of packets of words: each domain's is rounded, and added to
// those of the domains before. `kIsThere`: within one domain there is none, because such calls are
// the high-throughput kernels'.
template <typename RowType, int kPackets, bool kIsThere>
class SumOfDomains {
  static constexpr int kPerPacket = 3 * RowType::kPerWord;

 public:
  using Sums = float[kPackets][kPerPacket];

  JAX_EP_DEVICE explicit SumOfDomains(const CombineOp& op) : op_(op) {}

  // Before the first sum of a rank is added to those of its domain, in `sums`.
  JAX_EP_DEVICE void begin(i32 source, Sums& sums) {
    if constexpr (kIsThere) {
      const i32 domain = source / domain_size();
      if (domain_ >= 0 && domain != domain_) add(sums);
      domain_ = domain;
    }
  }
  // `sums` are those of the last domain, and become the result.
  JAX_EP_DEVICE void end(Sums& sums) {
    if constexpr (kIsThere) {
      add(sums);
      JAX_EP_UNROLL
      for (int i = 0; i < kPackets; ++i) {
        JAX_EP_UNROLL
        for (int e = 0; e < kPerPacket; ++e) sums[i][e] = total_[i][e];
      }
    }
  }

 private:
  JAX_EP_DEVICE i32 domain_size() const {
    return op_.domain_size > 0 ? op_.domain_size : op_.shape.num_ranks;
  }
  // And begins a new one.
  JAX_EP_DEVICE void add(Sums& sums) {
    JAX_EP_UNROLL
    for (int i = 0; i < kPackets; ++i) {
      JAX_EP_UNROLL
      for (int c = 0; c < 3; ++c) {
        float* const sum = sums[i] + c * RowType::kPerWord;
        float rounded[RowType::kPerWord];
        RowType::unpack(RowType::pack(sum), rounded);
        JAX_EP_UNROLL
        for (int e = 0; e < RowType::kPerWord; ++e) {
          total_[i][c * RowType::kPerWord + e] += rounded[e];
          sum[e] = 0.0F;
        }
      }
    }
  }

  const CombineOp& op_;
  i32 domain_ = -1;
  float total_[kIsThere ? kPackets : 1][kPerPacket] = {};
};

}  // namespace jax_ep::dev

#endif  // JAX_EP_CSRC_KERNELS_LOW_LATENCY_FAR_COMBINE_H_
