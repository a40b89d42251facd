// SPDX-License-Identifier: Apache-2.0
// The ranks of other domains in a low-latency exchange: what this rank puts into their network
// heaps and what they put into its own. docs/design/low_latency.md explains it.
//
// To each far rank go the same messages in every exchange: the first one has this rank's routing,
// or nothing, and each other one the rows of a few tokens. A word of a message has one writer, and
// no two writes of it are in flight: the bank's next exchange is the one after the next, and then
// this rank has the first message that the peer sent when it had received all of this one.
#ifndef JAX_EP_CSRC_KERNELS_LOW_LATENCY_FAR_RANKS_H_
#define JAX_EP_CSRC_KERNELS_LOW_LATENCY_FAR_RANKS_H_

#include "csrc/core/network_layout.h"
#include "csrc/device/exchange.h"
#include "csrc/device/kernel_phase.h"
#include "csrc/device/rail.h"
#include "csrc/device/transport/transport.h"
#include "csrc/kernels/internode/message.h"

namespace jax_ep::dev {

// Where there is one domain.
struct NoFarRanks {
  static constexpr bool kAny = false;
  template <typename Op>
  using Params = KernelParams<Op>;

  template <typename Op>
  JAX_EP_DEVICE NoFarRanks(const Exchange& /*exchange*/, const KernelParams<Op>& /*params*/) {}
  JAX_EP_DEVICE void put_kernel_end() const {}
};

template <typename Transport>
class FarRanks {
 public:
  static constexpr bool kAny = true;
  template <typename Op>
  using Params = InternodeLowLatencyParams<Op, Transport>;

  // All threads.
  template <typename Op>
  JAX_EP_DEVICE FarRanks(const Exchange& exchange, const Params<Op>& params)
      : exchange_(exchange),
        network_(params.network),
        transport_(params.transport),
        num_tokens_(shape_of(params.op).num_tokens),
        first_neighbor_(exchange.view().first_neighbor),
        num_neighbors_(exchange.view().num_neighbors),
        num_ranks_(exchange.view().num_ranks),
        bank_(far_bank_of_epoch(exchange.epoch())) {
    if (!exchange.closed()) put_begin(exchange, network_);
  }

  // One lane, of the last block of the kernel.
  JAX_EP_DEVICE void put_kernel_end() const { put_end(exchange_, network_); }

  // --- who and what ------------------------------------------------------------------------------

  JAX_EP_DEVICE i32 count() const { return num_ranks_ - num_neighbors_; }
  JAX_EP_DEVICE bool has(i32 rank) const { return !is_neighbor(exchange_.view(), rank); }
  // The far rank whose turn it is, of as many turns: each domain begins with the next one, and a
  // rank with that of its own number there.
  JAX_EP_DEVICE i32 at_turn(i32 turn) const {
    const i32 domain_turn = turn / num_neighbors_;
    const i32 own = exchange_.view().rank - first_neighbor_;
    const i32 index = (turn % num_neighbors_ + own) % num_neighbors_;
    return (first_neighbor_ + (1 + domain_turn) * num_neighbors_ + index) % num_ranks_;
  }

  // Of messages of rows to each. Once in a while all that there may be: a word must not be as old
  // as its numbers are, which begin anew after 2^32 exchanges.
  JAX_EP_DEVICE i32 num_chunks() const {
    const i64 tokens = clears_bank(exchange_.epoch()) ? layout().low_latency_tokens : num_tokens_;
    return static_cast<i32>(ceil_div(tokens, layout().far_chunk_tokens));
  }
  JAX_EP_DEVICE i32 chunk_of(i64 token) const {
    return static_cast<i32>(token / layout().far_chunk_tokens);
  }
  // There may be no tokens in a chunk.
  JAX_EP_DEVICE i64 first_token(i32 chunk) const { return i64{chunk} * layout().far_chunk_tokens; }
  JAX_EP_DEVICE i64 last_token(i32 chunk) const {
    const i64 last = first_token(chunk) + layout().far_chunk_tokens;
    return last < num_tokens_ ? last : num_tokens_;
  }

  // --- messages out ------------------------------------------------------------------------------
  // Number 0 is the first one, and 1 + c has the rows of chunk c.

  JAX_EP_DEVICE Ptr<std::byte> send_buffer(i32 rank, i32 message) const {
    return own<std::byte>(NetworkRegion::kFarSend) +
           offset_of(far_index(rank, first_neighbor_), message);
  }
  // All lanes of a warp, after their last store to the buffer.
  JAX_EP_DEVICE void send(i32 rank, i32 message, i64 bytes) const {
    warp_sync();
    NetworkSignal signal{};
    if (lane_id() == 0) signal = next_signal(rank, message);
    signal = from_first_lane(signal);
    const i32 domain = rank / num_neighbors_ * num_neighbors_;
    const i64 to = layout().at(NetworkRegion::kFarReceive) +
                   offset_of(far_index(exchange_.view().rank, domain), message);
    const i64 from =
        layout().at(NetworkRegion::kFarSend) + offset_of(far_index(rank, first_neighbor_), message);
    // RELEASE(far): the message. And, as all have been read before this kernel, those of the
    // exchange before.
    transport_.put_and_signal(rank, to, from, static_cast<u32>(bytes), signal);
  }
  // One lane: a first message without routing.
  JAX_EP_DEVICE void announce(i32 rank) const {
    // RELEASE(far): likewise.
    transport_.signal(rank, next_signal(rank, 0));
  }

  // --- messages in -------------------------------------------------------------------------------

  // One lane; follow it with a warp_sync.
  JAX_EP_DEVICE void wait(i32 rank, i32 message) const {
    const Ptr<u64> word = own<u64>(NetworkRegion::kFarArrived) + word_of(rank, message);
    const u32 epoch = exchange_.epoch();
    // ACQUIRE(far): the message can be read.
    const u64 seen = wait_until<Scope::kSys>(
        exchange_.view(),
        word,
        [epoch](u64 value) { return value != 0 && epoch_of(value) == epoch; },
        {WaitTag::kDelivered, exchange_.op(), rank, epoch, static_cast<u32>(message)},
        "far");
    transport_.acquired(word);
    if (seen == exchange_.own_flag()) return;
    Exchange::give_up_with_other(exchange_.view(),
                                 exchange_.op(),
                                 rank,
                                 static_cast<u32>(message),
                                 epoch,
                                 exchange_.own_flag(),
                                 seen);
  }
  // All lanes of each of so many warps, of which they share out the waits: for the first message of
  // every far rank.
  JAX_EP_DEVICE void wait_first(i32 warp, i32 num_warps) const { wait_some(1, warp, num_warps); }
  // The same for all messages. All must be waited for before the kernel ends, because their words
  // and their places are used again.
  JAX_EP_DEVICE void wait_all(i32 warp, i32 num_warps) const {
    wait_some(1 + num_chunks(), warp, num_warps);
  }
  // Of who has waited for it.
  JAX_EP_DEVICE Ptr<const std::byte> message(i32 rank, i32 message) const {
    return {(own<std::byte>(NetworkRegion::kFarReceive) +
             offset_of(far_index(rank, first_neighbor_), message))
                .raw};
  }

  // One thread of such: a packet of a first message.
  JAX_EP_DEVICE Packet packet(i32 rank, i64 i) const {
    const Vec16 vector = ld(as<const Vec16>(message(rank, 0)) + i);
    return {{vector.word[0], vector.word[1], vector.word[2]}, vector.word[3]};
  }

 private:
  JAX_EP_DEVICE const NetworkLayout& layout() const { return network_.layout; }
  template <typename T>
  JAX_EP_DEVICE Ptr<T> own(NetworkRegion which) const {
    return network_region<T>(network_, exchange_.view().rank - first_neighbor_, which);
  }
  // The index of a rank among the far ones of a domain that begins with such a rank.
  JAX_EP_DEVICE i32 far_index(i32 rank, i32 first_of_domain) const {
    return rank < first_of_domain ? rank : rank - num_neighbors_;
  }
  JAX_EP_DEVICE i64 offset_of(i32 far_rank, i32 message) const {
    const i64 rank = i64{bank_} * count() + far_rank;
    const i64 chunk =
        message == 0 ? 0 : layout().far_routing_bytes + (message - 1) * layout().far_chunk_bytes;
    return rank * layout().far_bytes + chunk;
  }
  JAX_EP_DEVICE i64 word_of(i32 rank, i32 message) const {
    return (i64{bank_} * num_ranks_ + rank) * layout().far_messages + message;
  }

  // One lane: what this rank says next in a word of the peer's, of which it knows what it said
  // last.
  JAX_EP_DEVICE NetworkSignal next_signal(i32 rank, i32 message) const {
    const Ptr<u64> last = own<u64>(NetworkRegion::kFarArrivedSent) + word_of(rank, message);
    const NetworkSignal signal = {
        layout().at(NetworkRegion::kFarArrived) + 8 * word_of(exchange_.view().rank, message),
        ld(last),
        exchange_.own_flag()};
    st(last, signal.after);
    return signal;
  }

  JAX_EP_DEVICE void wait_some(i32 messages, i32 warp, i32 num_warps) const {
    constexpr i32 kLanes = static_cast<i32>(kWarpSize);
    const i32 waits = count() * messages;
    for (i32 i = warp * kLanes + static_cast<i32>(lane_id()); i < waits; i += num_warps * kLanes) {
      wait(at_turn(i % count()), i / count());
    }
    warp_sync();
  }

  // A copy, as in csrc/device/rail.h.
  const Exchange exchange_;
  const NetworkView& network_;
  const Transport& transport_;
  const i64 num_tokens_;
  const i32 first_neighbor_;
  const i32 num_neighbors_;
  const i32 num_ranks_;
  const u32 bank_;
};

}  // namespace jax_ep::dev

#endif  // JAX_EP_CSRC_KERNELS_LOW_LATENCY_FAR_RANKS_H_
