// SPDX-License-Identifier: Apache-2.0
// A low-latency exchange, or half of one: which it is, when it may send, what the peers are told,
// and how it ends. docs/design/low_latency.md explains it.
#ifndef JAX_EP_CSRC_KERNELS_LOW_LATENCY_LOW_LATENCY_EXCHANGE_H_
#define JAX_EP_CSRC_KERNELS_LOW_LATENCY_LOW_LATENCY_EXCHANGE_H_

#include "csrc/core/low_latency_protocol.h"
#include "csrc/device/exchange.h"
#include "csrc/device/warp_scan.h"

namespace jax_ep::dev {

// The exchange of a kernel. A second half's is that of its ticket, and was announced as the first
// half's call. All threads, first thing in the kernel.
template <typename Op>
JAX_EP_DEVICE Exchange low_latency_exchange_of(const KernelParams<Op>& params) {
  constexpr Channel kChannel = Channel::kLowLatency;
  const bool begins = params.half != Half::kSecond;
  const u32 epoch = begins ? next_epoch(params.view, kChannel) : ld(Ptr<const u32>{params.ticket});
  const u32 tag = begins ? params.call_tag : call_tag_of_flight(ld(flight(params.view, epoch)));
  return {params.view, params.blocks, kChannel, Op::kKind, tag, params.program_rank, epoch};
}

// A kernel's part in an exchange, which is handed to it: as a member it would lie in memory.
class ExchangeHalf {
 public:
  template <typename Op>
  JAX_EP_DEVICE explicit ExchangeHalf(const KernelParams<Op>& params)
      : half_(params.half), ticket_(params.ticket) {}

  JAX_EP_DEVICE bool sends() const { return half_ != Half::kSecond; }
  JAX_EP_DEVICE bool receives() const { return half_ != Half::kFirst; }

  // All lanes of all warps, first thing, of their numbers in the call: one of them tells the peers
  // which exchanges this rank has ended, and then that it begins this one. Its flag is the bank's:
  // a peer may yet wait for the one of the exchange that had the bank before.
  JAX_EP_DEVICE void announce(const Exchange& exchange, i32 warp, i32 num_warps) const {
    const RankView& view = exchange.view();
    if (warp + 2 != num_warps) return;  // neither this one nor the last sends the first packets
    const u32 ended = ended_by_this_rank(view);
    share_out_peers(view,
                    [&](i32 peer) { put_acknowledged(view, Channel::kLowLatency, peer, ended); });
    if (!sends()) return;
    wait_until_bank_is_free(exchange);
    exchange.signal_arrived(flag_idx(exchange));
  }

  // All lanes of a warp, before it first sends: until all peers have ended what the bank held. In a
  // run of calls that are not in halves the kernel before has seen that.
  JAX_EP_DEVICE static void wait_until_bank_is_free(const Exchange& exchange) {
    const RankView& view = exchange.view();
    const u32 last = exchange.epoch() - u32{kLowLatencyBanks};
    const u32 seen = ld(control(view, Channel::kLowLatency, ChannelControl::kPeersEnded));
    if (has_reached(seen, last)) return;
    share_out_peers(view, [&](i32 peer) {
      // ACQUIRE(acknowledged): the peer's reads come before this warp's stores.
      wait_until_reached<Scope::kSys>(view,
                                      acknowledged(view, Channel::kLowLatency, view.rank, peer),
                                      {WaitTag::kAcknowledged, exchange.op(), peer, last, 0},
                                      "acknowledged");
    });
    warp_sync();
  }

  // All lanes of all warps of a kernel that receives: one of them waits until all peers have begun
  // the exchange, with the same call. Who reads packets need not know; who sends those of a later
  // exchange must know what the peers have ended.
  JAX_EP_DEVICE void wait_for_peers(const Exchange& exchange, i32 warp, i32 num_warps) const {
    const RankView& view = exchange.view();
    if (warp + 1 != num_warps) return;
    if (!sends() && lane_id() == 0) check_is_open(exchange);  // what the ticket says is waited for
    warp_sync();
    // This rank's own count is ahead of all peers', who end nothing that it has not begun.
    const u32 begun = next_epoch(view, Channel::kLowLatency) - (sends() ? 0 : 1);
    u32 behind = 0;  // the peers of this lane, at most
    share_out_peers(view, [&](i32 peer) {
      exchange.wait_arrived(peer, flag_idx(exchange));
      // ACQUIRE(acknowledged): the peer's reads come before what the next kernels store.
      const u32 ended =
          ld_acquire<Scope::kSys>(acknowledged(view, Channel::kLowLatency, view.rank, peer));
      behind = begun - ended > behind ? begun - ended : behind;
    });
    behind =
        warp_shfl(inclusive_sum(behind, [](u32 a, u32 b) { return a > b ? a : b; }), kWarpSize - 1);
    // Of those that take no part nothing is known.
    if (lane_id() != 0 || !all_active(view)) return;
    st(control(view, Channel::kLowLatency, ChannelControl::kPeersEndedSeen), begun - behind);
  }

  // All threads of a rank that takes no part: one of them asks of a ticket what the others ask.
  JAX_EP_DEVICE void check_ticket(const Exchange& exchange) const {
    if (!sends() && block_id() == 0 && thread_id() == 0) check_is_open(exchange);
  }

  // All threads, last thing in the kernel. Nobody is told before the next exchange in which this
  // rank takes part.
  template <typename Far>
  JAX_EP_DEVICE void finish(const Exchange& exchange, const Far& far) const {
    exchange.finish(
        [&] {
          if (lane_id() == 0) far.put_kernel_end();
          if (receives()) end(exchange);
          if (half_ == Half::kFirst && lane_id() == 0) leave_open(exchange);
        },
        sends());
  }

  // All threads of a closed group.
  JAX_EP_DEVICE void poison_ticket(const Exchange& exchange) const {
    exchange.poison(ticket_, kTicketWords);
  }

 protected:
  // Each bank has a flag: a peer may begin later exchanges before this rank has seen this one's.
  JAX_EP_DEVICE static i32 flag_idx(const Exchange& exchange) {
    return static_cast<i32>(bank_of_epoch(exchange.epoch()));
  }

  // Of this rank and group, and of a dispatch or a combine: the other word of its tickets.
  JAX_EP_DEVICE static u32 ticket_mark(const Exchange& exchange) {
    const auto address = reinterpret_cast<std::uintptr_t>(exchange.view().control);
    static_assert(kControlBytes == 256 && kNumOps <= 8);
    return static_cast<u32>(address / kControlBytes) << 3 | static_cast<u32>(exchange.op());
  }

  // One thread: that the ticket is that of the flight which is open in its bank.
  JAX_EP_DEVICE void check_is_open(const Exchange& exchange) const {
    const RankView& view = exchange.view();
    const u32 epoch = exchange.epoch();
    const bool is_open = ld(flight(view, epoch)) != 0;
    const u32 begun = next_epoch(view, Channel::kLowLatency) - 1;
    const bool is_of_bank = begun - epoch < u32{kLowLatencyBanks};
    if (is_open && is_of_bank && ld(Ptr<u32>{ticket_} + 1) == ticket_mark(exchange)) return;
    give_up(view, {WaitTag::kStaleFlight, exchange.op(), view.rank, epoch, 0}, begun);
  }

  // The last exchange that this rank has ended together with all before it, as the kernel begins. A
  // flight whose bank a kernel is about to use has been left behind, by a program that failed or
  // that nobody asked for results: its second half, if it comes, is refused.
  JAX_EP_DEVICE u32 ended_by_this_rank(const RankView& view) const {
    const u32 begun = next_epoch(view, Channel::kLowLatency) - 1;
    const u32 num_kept = u32{kLowLatencyBanks} - (sends() ? 1 : 0);
    u32 ended = begun;
    for (u32 age = 0; age < num_kept; ++age) {
      if (ld(flight(view, begun - age)) != 0) ended = begun - age - 1;
    }
    return ended;
  }

  // All lanes of the last warp.
  JAX_EP_DEVICE static void end(const Exchange& exchange) {
    const RankView& view = exchange.view();
    if (clears_bank(exchange.epoch())) clear_bank(exchange);
    if (lane_id() != 0) return;
    st(flight(view, exchange.epoch()), 0);
    const auto seen = control(view, Channel::kLowLatency, ChannelControl::kPeersEndedSeen);
    // Where some rank never takes part, what has been seen stays, and would be ahead in the end.
    const u32 oldest = exchange.epoch() - kOldestEnded;
    if (clears_bank(exchange.epoch()) && !has_reached(ld(seen), oldest)) st(seen, oldest);
    st(control(view, Channel::kLowLatency, ChannelControl::kPeersEnded), ld(seen));
  }
  JAX_EP_DEVICE void leave_open(const Exchange& exchange) const {
    st(flight(exchange.view(), exchange.epoch()), open_flight(exchange.call_tag()));
    st(Ptr<u32>{ticket_}, exchange.epoch());
    st(Ptr<u32>{ticket_} + 1, ticket_mark(exchange));
  }

  // All lanes: once in a while, see low_latency_protocol.h. Nobody will send packets of the bank's
  // next exchange before this rank says that it has ended this one. What it did not read, of rows
  // that found no room, may come later: that goes the next time.
  JAX_EP_DEVICE static void clear_bank(const Exchange& exchange) {
    const RankView& view = exchange.view();
    const auto clear = [&view](Ptr<Packet> of_first_source, i64 packets_per_source) {
      const i64 count = packets_per_source * view.num_neighbors;
      for (i64 i = lane_id(); i < count; i += kWarpSize) st_packet(of_first_source + i, Packet{});
    };
    const HeapLayout& layout = view.layout;
    const u32 epoch = exchange.epoch();
    const i32 first = view.first_neighbor;
    clear(expert_packets(view, view.rank, epoch, first), layout.expert_packets);
    clear(scalar_packets(view, view.rank, epoch, first), layout.scalar_packets);
    clear(row_packets(view, view.rank, epoch, first, 0),
          layout.low_latency_tokens * layout.row_packets);
  }

  const Half half_;
  u32* const ticket_;
};

}  // namespace jax_ep::dev

#endif  // JAX_EP_CSRC_KERNELS_LOW_LATENCY_LOW_LATENCY_EXCHANGE_H_
