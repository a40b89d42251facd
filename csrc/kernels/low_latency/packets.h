// SPDX-License-Identifier: Apache-2.0
// Packets on their way: waiting for them, and what is in them.
#ifndef JAX_EP_CSRC_KERNELS_LOW_LATENCY_PACKETS_H_
#define JAX_EP_CSRC_KERNELS_LOW_LATENCY_PACKETS_H_

#include "csrc/core/low_latency_protocol.h"
#include "csrc/device/exchange.h"

namespace jax_ep::dev {

// Says of which exchange the place of the last missing packet holds one; 0: of none.
template <int kCount>
[[noreturn]] JAX_EP_DEVICE void give_up_on_packets(const RankView& view,
                                                   const WaitContext& context,
                                                   u32 missing,
                                                   const Packet (&packets)[kCount]) {
  u32 seen = 0;
  JAX_EP_UNROLL
  for (int i = 0; i < kCount; ++i) seen = (missing >> i & 1) != 0 ? packets[i].flag >> 1 : seen;
  give_up(view, context, seen);
}

// Waits for packets of this exchange from a source, each lane for up to kCount of its own: those
// that `from(i)` names, for i below `count`. Lanes that wait for nothing have a count of 0. All
// that is missing is asked for at once, again and again. `token`: of which, for messages.
//
// No acquire: a packet is the data, and says itself that it is there.
template <int kCount, typename From>
JAX_EP_DEVICE void wait_packets(const Exchange& exchange,
                                i32 source,
                                i64 token,
                                i32 count,
                                const From& from,
                                Packet (&packets)[kCount]) {
  const RankView& view = exchange.view();
  const u32 flag = packet_flag(exchange.epoch());
  const WaitContext context = {
      WaitTag::kPacket, exchange.op(), source, exchange.epoch(), static_cast<u32>(token)};
  u32 missing = 0;  // as bits
  JAX_EP_UNROLL
  for (int i = 0; i < kCount; ++i) {
    packets[i] = Packet{};
    missing |= static_cast<u32>(i < count) << i;
  }
  const u64 start = now_ns();
  u32 level = 0;
  for (u32 polls = 1;; ++polls) {
    JAX_EP_UNROLL
    for (int i = 0; i < kCount; ++i) {
      if ((missing >> i & 1) == 0) continue;
      packets[i] = ld_packet({from(i).raw});
    }
    JAX_EP_UNROLL
    for (int i = 0; i < kCount; ++i) {
      if (packets[i].flag == flag) missing &= ~(1U << i);
    }
    if (missing == 0) break;
    // It has polled once more after the deadline: it may itself have stood still meanwhile.
    if ((level & kOverdue) != 0) give_up_on_packets(view, context, missing, packets);
    if (polls % kPollsPerLook == 0) level = look(view, context, start, level & ~kOverdue);
    if ((level & kOverdue) == 0) spin_pause("packets");
  }
  if (level != 0) report_long_wait(view, context, level & ~kOverdue, true);
}

// Registers have no numbers: an index that is not known when this is compiled would put them into
// memory.
JAX_EP_DEVICE u32 word_in_packet(const Packet& packet, u32 word) {
  return word == 0 ? packet.data[0] : word == 1 ? packet.data[1] : packet.data[2];
}

// --- the routing: the experts of a source's selections, six to a packet --------------------------

JAX_EP_DEVICE u32 expert_in_packet(const Packet& packet, u32 position) {
  return word_in_packet(packet, position / 2) >> 16 * (position % 2) & 0xFFFF;
}

// The packet of the selections from `first` on, of so many.
JAX_EP_DEVICE Packet pack_experts(Ptr<const i32> topk_idx, i64 first, i64 selections, u32 flag) {
  Packet packet{{0, 0, 0}, flag};
  JAX_EP_UNROLL
  for (int c = 0; c < kExpertsPerPacket; ++c) {
    const i32 expert = first + c < selections ? ld(topk_idx + (first + c)) : -1;
    const bool fits = expert >= 0 && expert < static_cast<i32>(kNoExpertInPacket);
    packet.data[c / 2] |= (fits ? static_cast<u32>(expert) : kNoExpertInPacket) << 16 * (c % 2);
  }
  return packet;
}

// To whom is sent: to all peers.
struct AllPeers {
  JAX_EP_DEVICE bool operator()(i32 /*peer*/) const { return true; }
};

// All lanes of all warps: sends all selections to the other ranks that are `wanted(peer)`.
template <typename Wanted = AllPeers>
JAX_EP_DEVICE void send_experts(const Exchange& exchange,
                                Ptr<const i32> topk_idx,
                                i64 selections,
                                i32 warp,
                                i32 num_warps,
                                const Wanted& wanted = {}) {
  const i64 packets = num_expert_packets(selections);
  for (i64 first = i64{warp} * kWarpSize; first < packets; first += i64{num_warps} * kWarpSize) {
    const i64 i = first + lane_id();
    if (i >= packets) continue;
    const Packet packet =
        pack_experts(topk_idx, i * kExpertsPerPacket, selections, packet_flag(exchange.epoch()));
    for_each_peer(exchange.view(), [&](i32 peer) {
      if (peer != exchange.view().rank && wanted(peer)) {
        put_expert_packet(exchange.view(), peer, exchange.epoch(), i, packet);
      }
    });
  }
}

// --- scalars: three to a packet ------------------------------------------------------------------

// The packet of the scalars from `first` on, of so many.
JAX_EP_DEVICE Packet pack_scalars(Ptr<const float> scalars, i64 first, i64 count, u32 flag) {
  Packet packet{{0, 0, 0}, flag};
  JAX_EP_UNROLL
  for (int c = 0; c < kScalarsPerPacket; ++c) {
    if (first + c < count) packet.data[c] = ld(as<const u32>(scalars) + (first + c));
  }
  return packet;
}

template <typename Wanted = AllPeers>
JAX_EP_DEVICE void send_scalars(const Exchange& exchange,
                                Ptr<const float> scalars,
                                i64 count,
                                i32 warp,
                                i32 num_warps,
                                const Wanted& wanted = {}) {
  const i64 packets = num_scalar_packets(count);
  for (i64 first = i64{warp} * kWarpSize; first < packets; first += i64{num_warps} * kWarpSize) {
    const i64 i = first + lane_id();
    if (i >= packets) continue;
    const Packet packet =
        pack_scalars(scalars, i * kScalarsPerPacket, count, packet_flag(exchange.epoch()));
    for_each_peer(exchange.view(), [&](i32 peer) {
      if (peer != exchange.view().rank && wanted(peer)) {
        put_scalar_packet(exchange.view(), peer, exchange.epoch(), i, packet);
      }
    });
  }
}

// --- rows: words of a segment in shared memory, three to a packet --------------------------------

// All lanes. The stores of the lanes to the stage must be known to the warp.
JAX_EP_DEVICE void send_words(u32 flag, Ptr<Packet> to, Ptr<u32> stage, i32 num_words) {
  const auto packets = static_cast<i32>(ceil_div(num_words, 3));
  constexpr int kAtOnce = 4;
  constexpr i32 kLanes = static_cast<i32>(kWarpSize);
  JAX_EP_NO_UNROLL
  for (i32 first = static_cast<i32>(lane_id()); first < packets; first += kAtOnce * kLanes) {
    Packet packet[kAtOnce];
    JAX_EP_UNROLL
    for (int i = 0; i < kAtOnce; ++i) {
      packet[i] = Packet{{0, 0, 0}, flag};
      JAX_EP_UNROLL
      for (int c = 0; c < 3; ++c) {
        const i32 word = 3 * (first + i * kLanes) + c;
        if (word < num_words) packet[i].data[c] = ld(stage + word);
      }
    }
    JAX_EP_UNROLL
    for (int i = 0; i < kAtOnce; ++i) {
      if (first + i * kLanes < packets) st_packet(to + (first + i * kLanes), packet[i]);
    }
  }
}

// A packet's words, from number `first` on of so many.
JAX_EP_DEVICE void words_of_packet(const Packet& packet, i32 first, Ptr<u32> stage, i32 num_words) {
  JAX_EP_UNROLL
  for (int c = 0; c < 3; ++c) {
    if (first + c < num_words) st(stage + (first + c), packet.data[c]);
  }
}

// All lanes. The other way; follow it with a warp_sync.
template <int kAtOnce>
JAX_EP_DEVICE void receive_words(const Exchange& exchange,
                                 i32 source,
                                 i64 token,
                                 Ptr<Packet> from,
                                 Ptr<u32> stage,
                                 i32 num_words) {
  const auto lane = static_cast<i32>(lane_id());
  const auto packets = static_cast<i32>(ceil_div(num_words, 3));
  constexpr i32 kLanes = static_cast<i32>(kWarpSize);
  for (i32 first = lane; first < packets; first += kAtOnce * kLanes) {
    const auto left = static_cast<i32>(ceil_div(packets - first, kLanes));
    Packet packet[kAtOnce];
    wait_packets<kAtOnce>(
        exchange,
        source,
        token,
        left < kAtOnce ? left : kAtOnce,
        [from, first](int i) { return from + (first + i * kLanes); },
        packet);
    JAX_EP_UNROLL
    for (int i = 0; i < kAtOnce; ++i) {
      words_of_packet(packet[i], 3 * (first + i * kLanes), stage, num_words);
    }
  }
}

}  // namespace jax_ep::dev

#endif  // JAX_EP_CSRC_KERNELS_LOW_LATENCY_PACKETS_H_
