// SPDX-License-Identifier: Apache-2.0
// What a low-latency dispatch sends to ranks of other domains, and what it does with what they
// send: to each one message with this rank's routing, and its scalars if they travel, as packets;
// and one for every few tokens, with a row of each of those that the rank wants.
//
// The sender reads topk_idx, token_scalars and what DispatchRows reads, and writes the send
// buffers. The receiver reads the messages and a plan, and writes rows and rows_scales.
#ifndef JAX_EP_CSRC_KERNELS_LOW_LATENCY_FAR_DISPATCH_H_
#define JAX_EP_CSRC_KERNELS_LOW_LATENCY_FAR_DISPATCH_H_

#include "csrc/core/ops.h"
#include "csrc/kernels/internode/message.h"
#include "csrc/kernels/low_latency/far_ranks.h"
#include "csrc/kernels/low_latency/packets.h"

namespace jax_ep::dev {

// All lanes of a warp. `Rows` are DispatchRows, `Far` FarRanks.
template <typename Rows, typename Far>
class FarDispatch {
 public:
  JAX_EP_DEVICE FarDispatch(const DispatchOp& op, const Exchange& exchange, const Far& far)
      : op_(op), exchange_(exchange), far_(far) {}

  // Those messages of warps [0, num_warps) that `warp` has: the routing first, for which all of a
  // receiver's plan waits.
  JAX_EP_DEVICE void send(Rows& rows, i32 warp, i32 num_warps) const {
    const i32 messages = far_.count() * (1 + far_.num_chunks());
    for (i32 item = warp; item < messages; item += num_warps) {
      const i32 rank = far_.at_turn(item % far_.count());
      const i32 message = item / far_.count();
      if (message == 0) {
        send_routing(rank);
      } else {
        send_rows(rows, rank, message - 1);
      }
    }
  }

  // A segment of a token of a far rank; each lane has a row of this rank that holds it, or -1.
  JAX_EP_DEVICE void expand(Rows& rows, i32 source, i64 token, i32 segment, i32 row) const {
    if (warp_ballot(row >= 0) == 0) return;
    const i32 chunk = far_.chunk_of(token);
    if (lane_id() == 0) far_.wait(source, 1 + chunk);
    warp_sync();
    const Ptr<const std::byte> message = far_.message(source, 1 + chunk);
    const auto index = static_cast<i32>(token - far_.first_token(chunk));
    rows.expand_packed(
        message + layout_of(rows).row(read_header(message).position(index)), segment, row);
  }

 private:
  JAX_EP_DEVICE static MessageLayout layout_of(const Rows& rows) {
    return {.row_bytes = rows.packed_bytes(), .scalar_stride = 0};
  }

  JAX_EP_DEVICE void send_routing(i32 rank) const {
    const i64 selections = op_.shape.num_tokens * op_.shape.num_topk;
    const u32 flag = packet_flag(exchange_.epoch());
    const Ptr<Vec16> to = as<Vec16>(far_.send_buffer(rank, 0));
    const i64 experts = num_expert_packets(selections);
    for (i64 i = lane_id(); i < experts; i += kWarpSize) {
      st(to + i,
         vector_of(
             pack_experts(Ptr<const i32>{op_.topk_idx}, i * kExpertsPerPacket, selections, flag)));
    }
    const i64 scalars = op_.num_scalars > 0 ? num_scalar_packets(selections) : 0;
    for (i64 i = lane_id(); i < scalars; i += kWarpSize) {
      const Packet packet = pack_scalars(
          Ptr<const float>{op_.token_scalars}, i * kScalarsPerPacket, selections, flag);
      st(to + (experts + i), vector_of(packet));
    }
    far_.send(rank, 0, kPacketBytes * (experts + scalars));
  }
  JAX_EP_DEVICE static Vec16 vector_of(const Packet& packet) {
    return {{packet.data[0], packet.data[1], packet.data[2], packet.flag}};
  }

  // A row is loaded, and in FP8 quantized, for each far rank that wants it: messages are different
  // warps', so that none waits for another before it is put, and a token has K such ranks at most.
  JAX_EP_DEVICE void send_rows(Rows& rows, i32 rank, i32 chunk) const {
    const i64 first = far_.first_token(chunk);
    const i64 last = far_.last_token(chunk);
    const TokenSet tokens =
        tokens_where(first, last, [this, rank](i64 token) { return wants(rank, token); });
    const MessageLayout layout = layout_of(rows);
    const Ptr<std::byte> message = far_.send_buffer(rank, 1 + chunk);
    write_header(message, tokens);
    for (i64 token = first; token < last; ++token) {
      const auto i = static_cast<i32>(token - first);
      if (!tokens.has(i)) continue;
      const Ptr<std::byte> row = message + layout.row(tokens.position(i));
      for (i32 segment = 0; segment < rows.num_segments(); ++segment) {
        rows.pack(token, segment, row);
      }
    }
    far_.send(rank, 1 + chunk, layout.bytes(tokens.count()));
  }

  // One lane: whether a token selects an expert of the rank, also one that will drop it.
  JAX_EP_DEVICE bool wants(i32 rank, i64 token) const {
    const i32 num_local = op_.shape.num_local_experts();
    const Ptr<const i32> experts = Ptr<const i32>{op_.topk_idx} + token * op_.shape.num_topk;
    for (i32 k = 0; k < op_.shape.num_topk; ++k) {
      const i32 expert = ld(experts + k);
      if (expert >= 0 && expert < op_.shape.num_experts && owner_of(expert, num_local) == rank) {
        return true;
      }
    }
    return false;
  }

  const DispatchOp& op_;
  const Exchange& exchange_;
  const Far& far_;
};

}  // namespace jax_ep::dev

#endif  // JAX_EP_CSRC_KERNELS_LOW_LATENCY_FAR_DISPATCH_H_
