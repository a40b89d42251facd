// SPDX-License-Identifier: Apache-2.0
// The peers of a rank: every loop over them, and every place in a peer's heap that is stored to;
// csrc/device/rail.h has those in the network heaps of this domain. A rank that is not in the
// view's mask is not waited for, and nothing is announced to it; rows do not go there because a
// plan with the same mask gives its experts none. Ranks of other domains than this one are no
// peers: their heaps are not mapped, and rail.h sends them messages.
#ifndef JAX_EP_CSRC_DEVICE_PEERS_H_
#define JAX_EP_CSRC_DEVICE_PEERS_H_

#include "csrc/device/heap.h"
#include "csrc/device/primitives.h"

namespace jax_ep::dev {

// --- who they are; a rank is its own peer too ----------------------------------------------------

JAX_EP_DEVICE bool all_active(const RankView& view) { return view.rank_mask == nullptr; }
// Four entries of the mask are read at once: buffers are as far apart as XLA aligns them.
JAX_EP_DEVICE bool is_active(const RankView& view, i32 peer) {
  if (all_active(view)) return true;
  const auto words = as<const u32>(Ptr<const u8>{view.rank_mask});
  return (ld(words + peer / 4) >> (8 * (peer % 4)) & 0xFF) != 0;
}

// Whether a rank is of this one's domain.
JAX_EP_DEVICE bool is_neighbor(const RankView& view, i32 rank) {
  return static_cast<u32>(rank) - static_cast<u32>(view.first_neighbor) <
         static_cast<u32>(view.num_neighbors);
}

// `use(peer)` for each, one after another, by the thread that calls.
template <typename Use>
JAX_EP_DEVICE void for_each_peer(const RankView& view, const Use& use) {
  for (i32 i = 0; i < view.num_neighbors; ++i) {
    const i32 peer = view.first_neighbor + i;
    if (is_active(view, peer)) use(peer);
  }
}
// The same, shared out among the lanes of the warp that calls.
template <typename Use>
JAX_EP_DEVICE void share_out_peers(const RankView& view, const Use& use) {
  for (i32 i = static_cast<i32>(lane_id()); i < view.num_neighbors; i += kWarpSize) {
    const i32 peer = view.first_neighbor + i;
    if (is_active(view, peer)) use(peer);
  }
}
// The peer whose turn it is, of as many turns as there are peers: each rank begins with itself, so
// that no link is crowded. -1: it is not active.
JAX_EP_DEVICE i32 peer_at_turn(const RankView& view, i32 turn) {
  const i32 next = turn + view.rank;
  const i32 end = view.first_neighbor + view.num_neighbors;
  const i32 peer = next < end ? next : next - view.num_neighbors;
  return is_active(view, peer) ? peer : -1;
}

// --- staging: what a peer gets of a token of this rank, or (combine) of its own ------------------

// The experts of `num_topk` selections of each token, from `first_token` on; `i` counts them.
JAX_EP_DEVICE void put_expert(
    const RankView& view, i32 peer, i64 first_token, i32 num_topk, i64 i, i32 expert) {
  st(staged_routing(view, peer, view.rank, first_token, num_topk) + i, expert);
}
JAX_EP_DEVICE void put_scalar(
    const RankView& view, i32 peer, i64 token, i32 num_topk, u32 position, float scalar) {
  st(staged_scalars(view, peer, view.rank, token, num_topk) + position, scalar);
}
// Where the elements of a row go.
JAX_EP_DEVICE Ptr<std::byte> peer_row(const RankView& view, i32 peer, i64 token) {
  return staged_row(view, peer, view.rank, token);
}
// What a rank of the domain gets of another domain's routing, from who has got it by its rail.
JAX_EP_DEVICE void relay_expert(
    const RankView& view, i32 peer, i32 source, i64 first_token, i32 num_topk, i64 i, i32 expert) {
  st(staged_routing(view, peer, source, first_token, num_topk) + i, expert);
}
// A part of a row, from shared memory; complete once the lane has waited for its bulk stores.
JAX_EP_DEVICE void put_segment(
    const RankView& view, i32 peer, i64 token, i64 offset, Ptr<u32> stage, u32 bytes) {
  bulk_store(peer_row(view, peer, token) + offset, stage, bytes);
}

// --- packets of a low-latency exchange -----------------------------------------------------------

JAX_EP_DEVICE void put_expert_packet(
    const RankView& view, i32 peer, u32 epoch, i64 i, const Packet& packet) {
  st_packet(expert_packets(view, peer, epoch, view.rank) + i, packet);
}
JAX_EP_DEVICE void put_scalar_packet(
    const RankView& view, i32 peer, u32 epoch, i64 i, const Packet& packet) {
  st_packet(scalar_packets(view, peer, epoch, view.rank) + i, packet);
}
// Where the packets of a row, or a sum, go.
JAX_EP_DEVICE Ptr<Packet> peer_row_packets(const RankView& view, i32 peer, u32 epoch, i64 token) {
  return row_packets(view, peer, epoch, view.rank, token);
}

// --- words ---------------------------------------------------------------------------------------

JAX_EP_DEVICE void put_arrived(
    const RankView& view, Channel channel, i32 peer, i32 flag_idx, u64 flag) {
  // RELEASE(arrived): publishes the warp's rows, scalars or routing of the chunk (ordered by the
  // warp_sync before).
  st_release<Scope::kSys>(arrived(view, channel, peer, view.rank, flag_idx), flag);
}
// The same of what `source`, of another domain, has sent by this rank's rail.
JAX_EP_DEVICE void relay_arrived(
    const RankView& view, Channel channel, i32 peer, i32 source, i32 flag_idx, u64 flag) {
  // RELEASE(arrived): publishes the routing that the warp has stored for the peer (ordered by the
  // warp_sync before).
  st_release<Scope::kSys>(arrived(view, channel, peer, source, flag_idx), flag);
}
JAX_EP_DEVICE void put_acknowledged(const RankView& view, Channel channel, i32 peer, u32 epoch) {
  // RELEASE(acknowledged): this rank has read all that the peer sent; the peer may overwrite.
  st_release<Scope::kSys>(acknowledged(view, channel, peer, view.rank), epoch);
}
JAX_EP_DEVICE void put_sent(const RankView& view, Channel channel, i32 peer, u32 epoch) {
  // A hint, which may come before the flags of the last chunks: nothing is published with it.
  st_relaxed<Scope::kSys>(sent(view, channel, peer, view.rank), epoch);
}
JAX_EP_DEVICE void put_heartbeat(const RankView& view, i32 peer, u64 word) {
  // Its change says all: nothing is published with it.
  st_relaxed<Scope::kSys>(heartbeat_of(view, peer, view.rank), word);
}
JAX_EP_DEVICE void put_masked(const RankView& view, i32 peer, u64 word) {
  // RELEASE(masked): what this rank has sent to the peer before, of which it may miss nothing.
  st_release<Scope::kSys>(masked_by(view, peer, view.rank), word);
}
JAX_EP_DEVICE void put_aborted(const RankView& view, i32 peer, u32 word) {
  // One word says all: nothing is published with it.
  st_relaxed<Scope::kSys>(aborted(view, peer), word);
}

}  // namespace jax_ep::dev

#endif  // JAX_EP_CSRC_DEVICE_PEERS_H_
