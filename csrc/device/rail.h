// SPDX-License-Identifier: Apache-2.0
// The rail of a rank: how it exchanges messages with the ranks of other domains that have its index
// there, and hands on to its own domain what they send. docs/design/internode.md explains it.
//
// Messages are rail chunks of a call's tokens, one to each other domain for each chunk, also where
// nothing of it goes there: so nobody must know who is silent, and buffers stay in step. A word of
// a buffer has one writer, and no two writes of it are in flight: the next message of a buffer is
// sent when the last one's credit is here. Nothing is reset; the counts are in device memory, so
// that a captured graph can be replayed.
#ifndef JAX_EP_CSRC_DEVICE_RAIL_H_
#define JAX_EP_CSRC_DEVICE_RAIL_H_

#include "csrc/device/exchange.h"
#include "csrc/device/kernel_phase.h"
#include "csrc/device/transport/transport.h"

namespace jax_ep::dev {

// A region of the network heap of the rank of this domain with such an index.
template <typename T>
JAX_EP_DEVICE Ptr<T> network_region(const NetworkView& network, i32 index, NetworkRegion which) {
  return as<T>(Ptr<std::byte>{network.heap[index] + network.layout.at(which)});
}

// All lanes: what the first one has.
JAX_EP_DEVICE u64 from_first_lane(u64 value) {
  const u64 low = warp_shfl(static_cast<u32>(value), 0);
  const u64 high = warp_shfl(static_cast<u32>(value >> 32), 0);
  return high << 32 | low;
}
JAX_EP_DEVICE NetworkSignal from_first_lane(const NetworkSignal& signal) {
  return {static_cast<i64>(from_first_lane(static_cast<u64>(signal.word))),
          from_first_lane(signal.before),
          from_first_lane(signal.after)};
}

template <typename Transport>
class Rail {
 public:
  // All threads. tokens_per_chunk: of a rail chunk.
  JAX_EP_DEVICE Rail(const Exchange& exchange,
                     const NetworkView& network,
                     const Transport& transport,
                     i64 num_tokens,
                     i32 tokens_per_chunk)
      : exchange_(exchange),
        network_(network),
        transport_(transport),
        num_tokens_(num_tokens),
        tokens_per_chunk_(tokens_per_chunk),
        num_chunks_(static_cast<i32>(ceil_div(num_tokens, tokens_per_chunk))),
        domain_(network.topology.domain_of(exchange.view().rank)),
        index_(network.topology.index_in_domain(exchange.view().rank)) {
    if (exchange.closed()) return;
    put_begin(exchange, network);
    sequence_ = ld(sequence(0));
    first_unit_ = ld(sequence(1));
  }

  // --- who and what ------------------------------------------------------------------------------

  JAX_EP_DEVICE const NetworkLayout& layout() const { return network_.layout; }
  JAX_EP_DEVICE i32 domain() const { return domain_; }
  JAX_EP_DEVICE i32 index() const { return index_; }
  JAX_EP_DEVICE i32 num_ranks() const { return network_.topology.num_scaleup_ranks; }
  JAX_EP_DEVICE i32 num_others() const { return network_.topology.num_scaleout_ranks - 1; }
  // The other domain whose turn it is, of as many turns: each domain begins with the next one.
  JAX_EP_DEVICE i32 domain_at_turn(i32 turn) const {
    return (domain_ + 1 + turn) % network_.topology.num_scaleout_ranks;
  }
  JAX_EP_DEVICE i32 domain_of(i32 rank) const { return network_.topology.domain_of(rank); }
  JAX_EP_DEVICE i32 index_of(i32 rank) const { return network_.topology.index_in_domain(rank); }
  JAX_EP_DEVICE i32 rank_at(i32 domain, i32 index) const {
    return network_.topology.rank_at(domain, index);
  }

  JAX_EP_DEVICE i32 num_chunks() const { return num_chunks_; }
  JAX_EP_DEVICE i32 tokens_per_chunk() const { return tokens_per_chunk_; }
  JAX_EP_DEVICE i64 first_token(i32 chunk) const { return i64{chunk} * tokens_per_chunk_; }
  JAX_EP_DEVICE i64 last_token(i32 chunk) const {
    const i64 last = first_token(chunk) + tokens_per_chunk_;
    return last < num_tokens_ ? last : num_tokens_;
  }

  struct TokenRange {
    i64 first;
    i64 last;
  };
  // One of the parts of a rail chunk, which may have no tokens.
  JAX_EP_DEVICE TokenRange part(i32 chunk, i32 part_idx) const {
    const i64 tokens = ceil_div(tokens_per_chunk_, kRailChunkParts);
    const i64 end = last_token(chunk);
    const i64 first = first_token(chunk) + part_idx * tokens;
    return {first < end ? first : end, first + tokens < end ? first + tokens : end};
  }

  // --- messages out ------------------------------------------------------------------------------

  // One lane, before it stores to the buffer; follow it with a warp_sync.
  JAX_EP_DEVICE void wait_credit(i32 domain, i32 chunk) const {
    const auto window = static_cast<u64>(layout().window);
    if (sequence_number(chunk) < window) return;
    const auto before = static_cast<u32>(sequence_number(chunk) - window);
    const Ptr<u64> word = own<u64>(NetworkRegion::kCredits) + buffer(domain, chunk);
    // ACQUIRE(credit): the message that had the buffer before has been sent and read. What it was
    // of, the credit alone lets this warp know.
    wait(word, before, WaitTag::kCredit, rank_at(domain, index_), chunk, "credit");
    transport_.acquired(word);
  }
  JAX_EP_DEVICE Ptr<std::byte> send_buffer(i32 domain, i32 chunk) const {
    return own<std::byte>(NetworkRegion::kSendRing) +
           ring_buffer(ring_of(domain, domain_), chunk) * layout().buffer_bytes;
  }
  // All lanes of a warp, after their last store to the buffer; every lane has waited for its own
  // bulk stores.
  JAX_EP_DEVICE void send(i32 domain, i32 chunk, i64 bytes) const {
    warp_sync();
    NetworkSignal signal{};
    if (lane_id() == 0) {
      signal = next_signal(NetworkRegion::kDelivered, NetworkRegion::kDeliveredSent, domain, chunk);
    }
    signal = from_first_lane(signal);
    const i64 to = layout().at(NetworkRegion::kReceiveRing) +
                   ring_buffer(ring_of(domain_, domain), chunk) * layout().buffer_bytes;
    const i64 from = layout().at(NetworkRegion::kSendRing) +
                     ring_buffer(ring_of(domain, domain_), chunk) * layout().buffer_bytes;
    // RELEASE(delivered): the message.
    transport_.put_and_signal(rank_at(domain, index_), to, from, static_cast<u32>(bytes), signal);
  }

  // --- messages in -------------------------------------------------------------------------------

  // One lane; follow it with a warp_sync.
  JAX_EP_DEVICE void wait_delivered(i32 domain, i32 chunk) const {
    const Ptr<u64> word = own<u64>(NetworkRegion::kDelivered) + buffer(domain, chunk);
    // ACQUIRE(delivered): the message can be read.
    const u64 seen = wait(word,
                          static_cast<u32>(sequence_number(chunk)),
                          WaitTag::kDelivered,
                          rank_at(domain, index_),
                          chunk,
                          "delivered");
    transport_.acquired(word);
    if (seen != flag(chunk)) {
      Exchange::give_up_with_other(exchange_.view(),
                                   exchange_.op(),
                                   rank_at(domain, index_),
                                   static_cast<u32>(chunk),
                                   exchange_.epoch(),
                                   flag(chunk),
                                   seen);
    }
  }
  // Where a message lies that came by the rail of such an index.
  JAX_EP_DEVICE Ptr<const std::byte> message(i32 rail, i32 domain, i32 chunk) const {
    const Ptr<std::byte> ring =
        network_region<std::byte>(network_, rail, NetworkRegion::kReceiveRing);
    return {(ring + ring_buffer(ring_of(domain, domain_), chunk) * layout().buffer_bytes).raw};
  }
  // One lane, behind a warp_sync or an acquire after all reads of the message.
  JAX_EP_DEVICE void give_credit(i32 domain, i32 chunk) const {
    // RELEASE(credit): all that has been read of the buffer.
    transport_.signal(
        rank_at(domain, index_),
        next_signal(NetworkRegion::kCredits, NetworkRegion::kCreditsSent, domain, chunk));
  }

  // --- messages that a rank of the domain reads --------------------------------------------------

  // All lanes of a warp that has waited for the message: all ranks of the domain may read it.
  JAX_EP_DEVICE void relay(i32 domain, i32 chunk) const {
    warp_sync();
    share_out_ranks([&](i32 rank) {
      // RELEASE(relayed): what the network has brought.
      st_release<Scope::kSys>(network_region<u64>(network_, rank, NetworkRegion::kRelayed) +
                                  (i64{index_} * num_buffers() + buffer(domain, chunk)),
                              flag(chunk));
    });
  }
  // One lane; follow it with a warp_sync.
  JAX_EP_DEVICE void wait_relayed(i32 rail, i32 domain, i32 chunk) const {
    const Ptr<u64> word =
        own<u64>(NetworkRegion::kRelayed) + (i64{rail} * num_buffers() + buffer(domain, chunk));
    // ACQUIRE(relayed): the message can be read.
    wait(word,
         static_cast<u32>(sequence_number(chunk)),
         WaitTag::kRelayed,
         rank_at(domain_, rail),
         chunk,
         "relayed");
  }
  // One lane, behind a warp_sync: this rank has read a part of a message.
  JAX_EP_DEVICE void put_pulled(i32 rail, i32 domain, i32 chunk, i32 part) const {
    // RELEASE(pulled): the reads of the message.
    st_release<Scope::kSys>(pulled(rail, index_, domain, chunk, part), flag(chunk));
  }
  // All lanes: until all ranks of the domain have read all parts of a message of this rail.
  JAX_EP_DEVICE void wait_pulled(i32 domain, i32 chunk) const {
    for (i32 i = static_cast<i32>(lane_id()); i < num_ranks() * kRailChunkParts; i += kWarpSize) {
      const i32 reader = i / kRailChunkParts;
      // ACQUIRE(pulled): the reads come before the next message in the buffer.
      wait(pulled(index_, reader, domain, chunk, i % kRailChunkParts),
           static_cast<u32>(sequence_number(chunk)),
           WaitTag::kPulled,
           rank_at(domain_, reader),
           chunk,
           "pulled");
    }
    warp_sync();
  }

  // --- sums of the ranks of the domain, which the rail of their owner adds up --------------------
  // A unit is what this domain's ranks hold of a rail chunk of a rank of another domain. Units of
  // all combines are counted, alike on all ranks of the domain, and share a ring.

  JAX_EP_DEVICE u64 unit(i32 turn, i32 chunk) const {
    return first_unit_ + static_cast<u64>(chunk) * static_cast<u64>(num_others()) +
           static_cast<u64>(turn);
  }
  // One lane, before it stores sums for a rail; follow it with a warp_sync.
  JAX_EP_DEVICE void wait_freed(i32 rail, u64 unit) const {
    const auto units = static_cast<u64>(layout().gather_units);
    if (unit < units) return;
    // ACQUIRE(freed): the rail has read what the buffer held before.
    wait_count(own<u64>(NetworkRegion::kFreed) + unit_word(rail, unit),
               unit - units + 1,
               WaitTag::kFreed,
               rail,
               "freed");
  }
  // Where a rank's sums of a unit lie, at the rail.
  JAX_EP_DEVICE Ptr<std::byte> gather_buffer(i32 rail, i32 rank, u64 unit) const {
    const i64 at = static_cast<i64>(unit % static_cast<u64>(layout().gather_units));
    return network_region<std::byte>(network_, rail, NetworkRegion::kGatherRing) +
           (at * num_ranks() + rank) * layout().buffer_bytes;
  }
  // All lanes, after their last store of a unit.
  JAX_EP_DEVICE void put_gathered(i32 rail, u64 unit) const {
    warp_sync();
    if (lane_id() != 0) return;
    // RELEASE(gathered): this rank's sums.
    st_release<Scope::kSys>(
        network_region<u64>(network_, rail, NetworkRegion::kGathered) + unit_word(index_, unit),
        unit + 1);
  }
  // All lanes: until all ranks of the domain have stored their sums of a unit of this rail. Follow
  // it with a warp_sync.
  JAX_EP_DEVICE void wait_gathered(u64 unit) const {
    share_out_ranks([&](i32 rank) {
      // ACQUIRE(gathered): the rank's sums can be read.
      wait_count(own<u64>(NetworkRegion::kGathered) + unit_word(rank, unit),
                 unit + 1,
                 WaitTag::kGathered,
                 rank,
                 "gathered");
    });
  }
  // All lanes, behind a warp_sync after their last read of a unit.
  JAX_EP_DEVICE void put_freed(u64 unit) const {
    share_out_ranks([&](i32 rank) {
      // RELEASE(freed): the rail's reads of the rank's sums.
      st_release<Scope::kSys>(
          network_region<u64>(network_, rank, NetworkRegion::kFreed) + unit_word(index_, unit),
          unit + 1);
    });
  }

  // One lane, of the last block of the kernel: the next exchange's messages follow these.
  JAX_EP_DEVICE void advance(bool with_units) const {
    put_end(exchange_, network_);
    st(sequence(0), sequence_ + static_cast<u64>(num_chunks_));
    if (!with_units) return;
    st(sequence(1), first_unit_ + static_cast<u64>(num_chunks_) * static_cast<u64>(num_others()));
  }
  // Of a rail chunk, how many parts have been received; see NetworkRegion::kPartsReceived.
  JAX_EP_DEVICE Ptr<u32> parts_received(i32 chunk) const {
    return own<u32>(NetworkRegion::kPartsReceived) + buffer_of(chunk);
  }

 private:
  // Of messages, of each domain.
  JAX_EP_DEVICE u64 sequence_number(i32 chunk) const { return sequence_ + static_cast<u64>(chunk); }
  JAX_EP_DEVICE u64 flag(i32 chunk) const {
    return arrival_flag(
        static_cast<u32>(sequence_number(chunk)), exchange_.op(), exchange_.call_tag());
  }
  JAX_EP_DEVICE i32 buffer_of(i32 chunk) const {
    return static_cast<i32>(sequence_number(chunk) % static_cast<u64>(layout().window));
  }
  // Of words that have room for all domains.
  JAX_EP_DEVICE i64 num_buffers() const {
    return i64{network_.topology.num_scaleout_ranks} * layout().window;
  }
  JAX_EP_DEVICE i64 buffer(i32 domain, i32 chunk) const {
    return i64{domain} * layout().window + buffer_of(chunk);
  }
  // Of rings that have room for the others.
  JAX_EP_DEVICE static i32 ring_of(i32 domain, i32 holder) {
    return domain < holder ? domain : domain - 1;
  }
  JAX_EP_DEVICE i64 ring_buffer(i32 ring, i32 chunk) const {
    return i64{ring} * layout().window + buffer_of(chunk);
  }
  JAX_EP_DEVICE i64 unit_word(i32 rank, u64 unit) const {
    const auto units = static_cast<u64>(layout().gather_units);
    return static_cast<i64>(static_cast<u64>(rank) * units + unit % units);
  }

  template <typename T>
  JAX_EP_DEVICE Ptr<T> own(NetworkRegion which) const {
    return network_region<T>(network_, index_, which);
  }
  JAX_EP_DEVICE Ptr<u64> sequence(i32 which) const {
    return own<u64>(NetworkRegion::kSequences) + which;
  }
  JAX_EP_DEVICE Ptr<u64> pulled(i32 rail, i32 reader, i32 domain, i32 chunk, i32 part) const {
    return network_region<u64>(network_, rail, NetworkRegion::kPulled) +
           ((i64{reader} * num_buffers() + buffer(domain, chunk)) * kRailChunkParts + part);
  }
  template <typename Use>
  JAX_EP_DEVICE void share_out_ranks(const Use& use) const {
    for (i32 rank = static_cast<i32>(lane_id()); rank < num_ranks(); rank += kWarpSize) use(rank);
  }

  // One lane: what this rank says next in a word of the peer's, of which it knows what it said
  // last.
  JAX_EP_DEVICE NetworkSignal next_signal(NetworkRegion words,
                                          NetworkRegion sent,
                                          i32 domain,
                                          i32 chunk) const {
    const Ptr<u64> last = own<u64>(sent) + buffer(domain, chunk);
    const NetworkSignal signal = {
        layout().at(words) + 8 * buffer(domain_, chunk), ld(last), flag(chunk)};
    st(last, signal.after);
    return signal;
  }

  // One lane: until the word is of a message.
  JAX_EP_DEVICE u64
  wait(Ptr<u64> word, u32 message, WaitTag tag, i32 peer, i32 chunk, const char* what) const {
    return wait_until<Scope::kSys>(
        exchange_.view(),
        word,
        [message](u64 seen) { return seen != 0 && epoch_of(seen) == message; },
        {tag, exchange_.op(), peer, message, static_cast<u32>(chunk)},
        what);
  }
  JAX_EP_DEVICE void wait_count(
      Ptr<u64> word, u64 count, WaitTag tag, i32 index, const char* what) const {
    (void)wait_until<Scope::kSys>(
        exchange_.view(),
        word,
        [count](u64 seen) { return seen == count; },
        {tag, exchange_.op(), rank_at(domain_, index), static_cast<u32>(count), 0},
        what);
  }

  // A copy: a kernel that held a reference into itself would lie in memory, and not in registers.
  const Exchange exchange_;
  const NetworkView& network_;
  const Transport& transport_;
  const i64 num_tokens_;
  const i32 tokens_per_chunk_;
  const i32 num_chunks_;
  const i32 domain_;
  const i32 index_;
  u64 sequence_ = 0;    // messages to each domain in all exchanges before
  u64 first_unit_ = 0;  // units of all combines before
};

}  // namespace jax_ep::dev

#endif  // JAX_EP_CSRC_DEVICE_RAIL_H_
