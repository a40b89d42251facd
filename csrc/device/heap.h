// SPDX-License-Identifier: Apache-2.0
// Addresses in the symmetric heaps: what heap_layout.h says, as pointers.
#ifndef JAX_EP_CSRC_DEVICE_HEAP_H_
#define JAX_EP_CSRC_DEVICE_HEAP_H_

#include "csrc/core/kernel_params.h"
#include "csrc/device/primitives.h"

namespace jax_ep::dev {

// A region of the heap of rank `holder`.
template <typename T>
JAX_EP_DEVICE Ptr<T> region(const RankView& view, i32 holder, Region which) {
  return as<T>(Ptr<std::byte>{view.heap[holder] + view.layout.offset[static_cast<i32>(which)]});
}

JAX_EP_DEVICE Ptr<u32> control(const RankView& view, Control word) {
  return Ptr<u32>{view.control} + control_index(word);
}
JAX_EP_DEVICE Ptr<u32> control(const RankView& view, Channel channel, ChannelControl word) {
  return Ptr<u32>{view.control} + control_index(channel, word);
}

// What this rank keeps of the flight of a low-latency exchange, or of one that had its bank before.
JAX_EP_DEVICE Ptr<u32> flight(const RankView& view, u32 epoch) {
  return control(view, Channel::kLowLatency, ChannelControl::kFlights) + bank_of_epoch(epoch);
}

// Where `reader` tells `holder` which epoch it has read.
JAX_EP_DEVICE Ptr<u32> acknowledged(const RankView& view, Channel channel, i32 holder, i32 reader) {
  return region<u32>(view, holder, Region::kAcknowledged) +
         (static_cast<i32>(channel) * view.num_ranks + reader);
}

// Where `source` tells `holder` of which epoch it has sent all.
JAX_EP_DEVICE Ptr<u32> sent(const RankView& view, Channel channel, i32 holder, i32 source) {
  return region<u32>(view, holder, Region::kSent) +
         (static_cast<i32>(channel) * view.num_ranks + source);
}

// Where any peer tells `holder` that it has given up.
JAX_EP_DEVICE Ptr<u32> aborted(const RankView& view, i32 holder) {
  return region<u32>(view, holder, Region::kAborted);
}

// Where `source` tells `holder` that a chunk, or a part of one, has arrived.
JAX_EP_DEVICE Ptr<u64> arrived(
    const RankView& view, Channel channel, i32 holder, i32 source, i32 flag_idx) {
  const i64 source_of_channel = i64{static_cast<i32>(channel)} * view.num_ranks + source;
  return region<u64>(view, holder, Region::kArrived) + (source_of_channel * kMaxFlags + flag_idx);
}

// Words of kernels that leave out who does not come, see low_latency_protocol.h.
JAX_EP_DEVICE Ptr<u64> heartbeat_of(const RankView& view, i32 holder, i32 source) {
  return arrived(view, Channel::kLowLatency, holder, source, kHeartbeatFlag);
}
JAX_EP_DEVICE Ptr<u64> masked_by(const RankView& view, i32 holder, i32 source) {
  return arrived(view, Channel::kLowLatency, holder, source, kMaskedFlag);
}
JAX_EP_DEVICE Ptr<u32> own_verdict(const RankView& view, i32 source) {
  return as<u32>(arrived(view, Channel::kLowLatency, view.rank, source, kVerdictFlag));
}
JAX_EP_DEVICE Ptr<u32> last_beaten(const RankView& view) {
  return as<u32>(arrived(view, Channel::kLowLatency, view.rank, view.rank, kBeatenFlag));
}

// What `holder` keeps of a token that `source` sent (dispatch, plan), or of a token of its own
// that `source` sent back (combine).
JAX_EP_DEVICE i64 staged(const RankView& view, i32 source, i64 token) {
  return source * view.layout.max_tokens + token;
}
// The same of a source in the domain: rows of others are not staged here.
JAX_EP_DEVICE i64 staged_by_neighbor(const RankView& view, i32 source, i64 token) {
  return staged(view, source - view.first_neighbor, token);
}
JAX_EP_DEVICE Ptr<i32> staged_routing(
    const RankView& view, i32 holder, i32 source, i64 token, i32 num_topk) {
  return region<i32>(view, holder, Region::kRouting) + staged(view, source, token) * num_topk;
}
JAX_EP_DEVICE Ptr<float> staged_scalars(
    const RankView& view, i32 holder, i32 source, i64 token, i32 num_topk) {
  return region<float>(view, holder, Region::kScalars) +
         staged_by_neighbor(view, source, token) * num_topk;
}
JAX_EP_DEVICE Ptr<std::byte> staged_row(const RankView& view, i32 holder, i32 source, i64 token) {
  return region<std::byte>(view, holder, Region::kRows) +
         staged_by_neighbor(view, source, token) * view.layout.row_stride;
}

// Packets of a low-latency exchange that `source`, a rank of the domain, sent to `holder`: of its
// routing, its scalars, and the row of a token (dispatch), or the sum of a token of the holder
// (combine).
JAX_EP_DEVICE i64 packet_source(const RankView& view, u32 epoch, i32 source) {
  return i64{bank_of_epoch(epoch)} * view.num_neighbors + (source - view.first_neighbor);
}
JAX_EP_DEVICE Ptr<Packet> expert_packets(const RankView& view, i32 holder, u32 epoch, i32 source) {
  return region<Packet>(view, holder, Region::kExpertPackets) +
         packet_source(view, epoch, source) * view.layout.expert_packets;
}
JAX_EP_DEVICE Ptr<Packet> scalar_packets(const RankView& view, i32 holder, u32 epoch, i32 source) {
  return region<Packet>(view, holder, Region::kScalarPackets) +
         packet_source(view, epoch, source) * view.layout.scalar_packets;
}
JAX_EP_DEVICE Ptr<Packet> row_packets(
    const RankView& view, i32 holder, u32 epoch, i32 source, i64 token) {
  const i64 row = packet_source(view, epoch, source) * view.layout.low_latency_tokens + token;
  return region<Packet>(view, holder, Region::kRowPackets) + row * view.layout.row_packets;
}

// All lanes of a warp: writes zeros, a T at a time.
template <typename T>
JAX_EP_DEVICE void clear(Ptr<std::byte> to, i64 bytes) {
  const i64 count = bytes / static_cast<i64>(sizeof(T));
  JAX_EP_NO_UNROLL
  for (i64 i = lane_id(); i < count; i += kWarpSize) st(as<T>(to) + i, T{});
}

}  // namespace jax_ep::dev

#endif  // JAX_EP_CSRC_DEVICE_HEAP_H_
