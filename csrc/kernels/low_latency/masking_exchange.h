// SPDX-License-Identifier: Apache-2.0
// A low-latency exchange whose kernel leaves out who does not come, in one piece and within one
// domain: when it may send and to whom, and how it ends. docs/design/low_latency.md explains it.
#ifndef JAX_EP_CSRC_KERNELS_LOW_LATENCY_MASKING_EXCHANGE_H_
#define JAX_EP_CSRC_KERNELS_LOW_LATENCY_MASKING_EXCHANGE_H_

#include "csrc/kernels/low_latency/low_latency_exchange.h"
#include "csrc/kernels/low_latency/missing_ranks.h"

namespace jax_ep::dev {

// Whom a warp sends to: the peers but those that have been given up before.
class PresentPeers {
 public:
  JAX_EP_DEVICE explicit PresentPeers(u64 given_up) : given_up_(given_up) {}
  JAX_EP_DEVICE bool operator()(i32 peer) const { return (given_up_ >> peer & 1) == 0; }

 private:
  const u64 given_up_;
};

class MaskingExchange : public ExchangeHalf {
 public:
  using ExchangeHalf::ExchangeHalf;

  // As of ExchangeHalf. Who is left out, by the mask or because it has not ended what its bank
  // held, is told so.
  JAX_EP_DEVICE void announce(const Exchange& exchange, i32 warp, i32 num_warps) const {
    const RankView& view = exchange.view();
    if (warp + 2 != num_warps) return;
    const u32 ended = ended_by_this_rank(view);
    share_out_peers(view,
                    [&](i32 peer) { put_acknowledged(view, Channel::kLowLatency, peer, ended); });
    const PresentPeers present = wait_until_bank_is_free(exchange);
    // Words that are never written again would be ahead of an epoch in the end.
    const bool renews = clears_bank(exchange.epoch());
    for (i32 peer = static_cast<i32>(lane_id()); peer < view.num_ranks; peer += kWarpSize) {
      const bool is_there = is_active(view, peer) && present(peer);
      if (is_there && renews) put_masked(view, peer, 0);
      if (!is_there) put_masked(view, peer, masked_in(exchange.epoch()));
    }
    warp_sync();
    share_out_peers(view, [&](i32 peer) {
      if (!present(peer)) return;
      put_arrived(view, Channel::kLowLatency, peer, flag_idx(exchange), exchange.own_flag());
    });
  }

  // All lanes of a warp, before it first sends. Who has not ended what the bank held is not sent
  // anything: it may still read that, and is far behind.
  JAX_EP_DEVICE static PresentPeers wait_until_bank_is_free(const Exchange& exchange) {
    const RankView& view = exchange.view();
    const u32 last = exchange.epoch() - u32{kLowLatencyBanks};
    const u32 seen = ld(control(view, Channel::kLowLatency, ChannelControl::kPeersEnded));
    if (has_reached(seen, last)) return PresentPeers(0);
    const MissingRanks missing(exchange);
    u64 given_up = 0;
    for (i32 first = 0; first < view.num_ranks; first += static_cast<i32>(kWarpSize)) {
      const i32 peer = first + static_cast<i32>(lane_id());
      bool has_ended = true;
      if (peer < view.num_ranks && is_active(view, peer)) {
        u32 ended = 0;
        // ACQUIRE(acknowledged): the peer's reads come before this warp's stores.
        has_ended = try_until(
            exchange,
            acknowledged(view, Channel::kLowLatency, view.rank, peer),
            [last](u32 word) { return has_reached(word, last); },
            {WaitTag::kAcknowledged, exchange.op(), peer, last, 0},
            "acknowledged",
            ended);
        if (!has_ended) missing.give_up_on(peer);
      }
      given_up |= u64{warp_ballot(!has_ended)} << first;
    }
    return PresentPeers(given_up);
  }

  // As of ExchangeHalf.
  JAX_EP_DEVICE void wait_for_peers(const Exchange& exchange, i32 warp, i32 num_warps) const {
    const RankView& view = exchange.view();
    if (warp + 1 != num_warps) return;
    const MissingRanks missing(exchange);
    const u32 begun = next_epoch(view, Channel::kLowLatency);
    u32 behind = 0;  // the peers of this lane, at most
    bool all_came = true;
    share_out_peers(view, [&](i32 peer) {
      if (!try_arrived(exchange, peer)) {
        missing.give_up_on(peer);
        all_came = false;
        return;
      }
      // ACQUIRE(acknowledged): the peer's reads come before what the next kernels store.
      const u32 ended =
          ld_acquire<Scope::kSys>(acknowledged(view, Channel::kLowLatency, view.rank, peer));
      // A peer that went on without this rank is ahead.
      const u32 exchanges = has_reached(ended, begun) ? 0 : begun - ended;
      behind = exchanges > behind ? exchanges : behind;
    });
    const bool any_missing = warp_ballot(!all_came) != 0;
    behind =
        warp_shfl(inclusive_sum(behind, [](u32 a, u32 b) { return a > b ? a : b; }), kWarpSize - 1);
    bool all_take_part = true;  // a mask may leave out nobody
    for (i32 rank = static_cast<i32>(lane_id()); rank < view.num_ranks; rank += kWarpSize) {
      all_take_part = all_take_part && is_active(view, rank);
    }
    all_take_part = warp_ballot(!all_take_part) == 0;
    // Of those that have not come, or take no part, nothing is known.
    if (lane_id() != 0 || any_missing || !all_take_part) return;
    st(control(view, Channel::kLowLatency, ChannelControl::kPeersEndedSeen), begun - behind);
  }

  // All lanes of the last warp: says who is missing. Whether anybody is.
  JAX_EP_DEVICE static bool report(const Exchange& exchange, u8* missing_ranks) {
    const RankView& view = exchange.view();
    const MissingRanks missing(exchange);
    bool any = false;
    for (i32 rank = static_cast<i32>(lane_id()); rank < view.num_ranks; rank += kWarpSize) {
      const bool is_missing = missing.is_given_up(rank);
      st(Ptr<u8>{missing_ranks} + rank, static_cast<u8>(is_missing));
      if (is_missing) put_masked(view, rank, masked_in(exchange.epoch()));
      any = any || is_missing;
    }
    return warp_ballot(any) != 0;
  }
  // The same warp, last thing in the kernel.
  JAX_EP_DEVICE static void close(const Exchange& exchange) {
    exchange.close([&] {
      const RankView& view = exchange.view();
      if (clears_bank(exchange.epoch())) {
        for (i32 rank = static_cast<i32>(lane_id()); rank < view.num_ranks; rank += kWarpSize) {
          st_relaxed<Scope::kGpu>(own_verdict(view, rank), 0);
        }
      }
      warp_sync();
      end(exchange);
    });
  }

 private:
  // One lane: whether the peer has begun the exchange, with the same call. What comes from another
  // one, of a program that has ended in the middle of a step, is not meant for this one.
  JAX_EP_DEVICE static bool try_arrived(const Exchange& exchange, i32 peer) {
    const RankView& view = exchange.view();
    const i32 flag = flag_idx(exchange);
    const u32 epoch = exchange.epoch();
    u64 seen = 0;
    // ACQUIRE(arrived): the peer's acknowledgment.
    const bool came = try_until(
        exchange,
        arrived(view, Channel::kLowLatency, view.rank, peer, flag),
        [epoch](u64 word) { return word != 0 && epoch_of(word) == epoch; },
        {WaitTag::kArrived, exchange.op(), peer, epoch, static_cast<u32>(flag)},
        "arrived",
        seen);
    return came && seen == exchange.own_flag();
  }
};

}  // namespace jax_ep::dev

#endif  // JAX_EP_CSRC_KERNELS_LOW_LATENCY_MASKING_EXCHANGE_H_
