// SPDX-License-Identifier: Apache-2.0
// Ranks that do not come, in kernels that leave them out and go on: how long a thread waits for
// what another rank sends, and what the blocks of this rank agree on. docs/design/low_latency.md
// explains it.
#ifndef JAX_EP_CSRC_KERNELS_LOW_LATENCY_MISSING_RANKS_H_
#define JAX_EP_CSRC_KERNELS_LOW_LATENCY_MISSING_RANKS_H_

#include "csrc/core/low_latency_protocol.h"
#include "csrc/device/exchange.h"
#include "csrc/kernels/low_latency/packets.h"

namespace jax_ep::dev {

// --- what is agreed on ---------------------------------------------------------------------------

// All threads of all blocks see the same verdict on a source, from when it is no more unknown on;
// but who was present may become torn, until all blocks are done.
class MissingRanks {
 public:
  JAX_EP_DEVICE explicit MissingRanks(const Exchange& exchange)
      : MissingRanks(exchange.view(), exchange.epoch()) {}
  JAX_EP_DEVICE MissingRanks(const RankView& view, u32 epoch) : view_(view), epoch_(epoch) {}

  // One thread. It can read what those have read who found the source present.
  JAX_EP_DEVICE Verdict verdict(i32 source) const {
    // ACQUIRE(verdict): the loads by which a block has found the source present.
    return verdict_of(ld_acquire<Scope::kGpu>(own_verdict(view_, source)), epoch_);
  }
  // One thread: says so, unless another one has said something. Returns what holds.
  JAX_EP_DEVICE Verdict settle(i32 source, Verdict verdict) const {
    const Ptr<u32> word = own_verdict(view_, source);
    u32 seen = ld_relaxed<Scope::kGpu>(word);
    while (verdict_of(seen, epoch_) == Verdict::kUnknown) {
      const u32 old = replace(word, seen, verdict);
      if (old == seen) return verdict;
      seen = old;
    }
    return this->verdict(source);
  }
  // One thread: what the source has sent does not count, but for a routing that others count.
  JAX_EP_DEVICE void give_up_on(i32 source) const {
    if (settle(source, Verdict::kMissing) != Verdict::kPresent) return;
    replace(own_verdict(view_, source), verdict_word(epoch_, Verdict::kPresent), Verdict::kTorn);
  }
  // One thread.
  JAX_EP_DEVICE bool is_given_up(i32 source) const {
    const u32 word = ld_relaxed<Scope::kGpu>(own_verdict(view_, source));
    return is_missing(verdict_of(word, epoch_));
  }
  JAX_EP_DEVICE static bool is_missing(Verdict verdict) {
    return verdict == Verdict::kMissing || verdict == Verdict::kTorn;
  }

 private:
  JAX_EP_DEVICE u32 replace(Ptr<u32> word, u32 seen, Verdict verdict) const {
    // RELEASE(verdict), where it is that a source is present: what this block has loaded of it.
    // ACQUIRE(verdict): what others had loaded, as above.
    return compare_exchange_acq_rel<Scope::kGpu>(word, seen, verdict_word(epoch_, verdict));
  }

  const RankView& view_;
  const u32 epoch_;
};

// --- how long is waited --------------------------------------------------------------------------

// A wait of one thread. It is over when the rank that it waits for has not been heard of for the
// group's timeout: its data have not come, and its heartbeat has not changed. Or at once, when
// another thread, the host or that rank itself says so.
class Patience {
 public:
  JAX_EP_DEVICE Patience(const Exchange& exchange, const WaitContext& context)
      : Patience(exchange.view(), exchange.epoch(), context) {}
  JAX_EP_DEVICE Patience(const RankView& view, u32 epoch, const WaitContext& context)
      : view_(view),
        context_(context),
        epoch_(epoch),
        start_(heartbeat_tick(now_ns())),
        heard_at_(start_) {}

  // Now and then between two polls. True: poll once more, and then give up.
  JAX_EP_DEVICE bool is_over(u32 polls) {
    end_if_told(view_, context_);
    const u32 now = heartbeat_tick(now_ns());
    beat(now);
    hear(now);
    // Signed: the clocks of two SMs may differ by a little.
    const auto waited = static_cast<i32>(now - start_);
    if (level() < kMaxLevel && waited >= ticks(view_.report_ns) << level()) {
      ++heartbeat_and_level_;
      report_long_wait(view_, context_, level(), false);
    }
    // What this rank sends to itself comes, as its other waits end.
    if (context_.peer == view_.rank) return false;
    const i64 timeout = ticks(view_.timeout_ns);
    return static_cast<i32>(now - heard_at_) > timeout || waited / kMostTimeouts > timeout ||
           MissingRanks(view_, epoch_).is_given_up(context_.peer) || masks_us() ||
           // Its word is far away: who waits for a moment alone does not fetch it.
           (polls > 1 && host_gives_up());
  }

  JAX_EP_DEVICE void end(bool given_up = false) const {
    if (level() != 0) report_long_wait(view_, context_, level(), true, given_up);
  }

 private:
  JAX_EP_DEVICE u32 level() const { return heartbeat_and_level_ & 0xFF; }  // of the last report
  JAX_EP_DEVICE static i64 ticks(u64 ns) { return static_cast<i64>(ns >> kHeartbeatShift); }
  JAX_EP_DEVICE void hear(u32 now) {
    const u64 word = ld_relaxed<Scope::kSys>(heartbeat_of(view_, view_.rank, context_.peer));
    const u32 heartbeat = heartbeat_tick_of(word) << 8;
    if (heartbeat == (heartbeat_and_level_ & ~0xFFU)) return;
    heartbeat_and_level_ = heartbeat | level();
    heard_at_ = now;
  }
  JAX_EP_DEVICE bool host_gives_up() const {
    if (view_.given_up == nullptr) return false;
    return (ld_relaxed<Scope::kSys>(Ptr<const u64>{view_.given_up}) >> context_.peer & 1) != 0;
  }
  JAX_EP_DEVICE bool masks_us() const {
    const Ptr<u64> word = masked_by(view_, view_.rank, context_.peer);
    const u64 seen = ld_relaxed<Scope::kSys>(word);
    if (seen == 0 || !has_reached(epoch_of(seen), epoch_)) return false;
    // ACQUIRE(masked): all that it has sent before. What is polled next is there, or never comes.
    return ld_acquire<Scope::kSys>(word) != 0;
  }
  // Tells the peers that this rank waits. Of its threads one does, each time.
  JAX_EP_DEVICE void beat(u32 tick) const {
    const u32 last = ld_relaxed<Scope::kGpu>(last_beaten(view_));
    if (last == tick) return;
    if (compare_exchange_acq_rel<Scope::kGpu>(last_beaten(view_), last, tick) != last) return;
    const u64 word = heartbeat(tick, epoch_, context_.peer);
    for_each_peer(view_, [&](i32 peer) { put_heartbeat(view_, peer, word); });
  }

  const RankView& view_;
  const WaitContext context_;
  const u32 epoch_;
  // In ticks of heartbeats: few words, because registers are short where packets are waited for.
  const u32 start_;
  u32 heard_at_;
  u32 heartbeat_and_level_ = 0;
};

// Whether a wait is to look around after so many polls: after the first one too, for ranks that
// have been given up meanwhile.
JAX_EP_DEVICE bool is_time_to_look(u32 polls) { return polls == 1 || polls % kPollsPerLook == 0; }

// As wait_until. False: the rank has been given up. `seen` is the word's last value.
template <typename Word, typename Done>
JAX_EP_DEVICE bool try_until(const Exchange& exchange,
                             Ptr<Word> word,
                             const Done& done,
                             const WaitContext& context,
                             const char* what,
                             Word& seen) {
  Patience patience(exchange, context);
  bool over = false;
  for (u32 polls = 1;; ++polls) {
    seen = ld_relaxed<Scope::kSys>(word);
    if (done(seen)) {
      seen = ld_acquire<Scope::kSys>(word);
      over = false;
      break;
    }
    if (over) break;
    if (is_time_to_look(polls)) over = patience.is_over(polls);
    if (!over) spin_pause(what);
  }
  patience.end(over);
  return !over;
}

// Waits for a packet of an exchange. False: the rank has been given up, and it is missing.
JAX_EP_DEVICE bool try_packet(
    const RankView& view, OpKind op, u32 epoch, i32 source, u32 token, const Packet* from) {
  const u32 flag = packet_flag(epoch);
  Patience patience(view, epoch, {WaitTag::kPacket, op, source, epoch, token});
  bool over = false;
  for (u32 polls = 1;; ++polls) {
    const bool came = ld_packet({from}).flag == flag;
    if (came || over) {
      patience.end(!came);
      return came;
    }
    if (is_time_to_look(polls)) over = patience.is_over(polls);
    if (!over) spin_pause("packets");
  }
}
// The same as a call.
JAX_EP_COLD bool call_try_packet(
    const RankView& view, OpKind op, u32 epoch, i32 source, u32 token, const Packet* from) {
  return try_packet(view, op, epoch, source, token, from);
}

// As wait_packets. False: the rank has been given up, and packets are missing. Who finds one
// missing waits for that one alone, and then loads all again: the registers of the others are free
// meanwhile. `kCalls`: the wait is a call, as the dispatch has no registers left for it.
template <int kCount, bool kCalls, typename From>
JAX_EP_DEVICE bool try_packets(const Exchange& exchange,
                               i32 source,
                               i64 token,
                               i32 count,
                               const From& from,
                               Packet (&packets)[kCount]) {
  const RankView& view = exchange.view();
  const u32 epoch = exchange.epoch();
  const u32 flag = packet_flag(epoch);
  JAX_EP_NO_UNROLL
  for (;;) {
    JAX_EP_UNROLL
    for (int i = 0; i < kCount; ++i) packets[i] = i < count ? ld_packet({from(i).raw}) : Packet{};
    int missing = -1;
    JAX_EP_UNROLL
    for (int i = 0; i < kCount; ++i) missing = i < count && packets[i].flag != flag ? i : missing;
    if (missing < 0) return true;
    const Packet* const at = from(missing).raw;
    const auto number = static_cast<u32>(token);
    const bool came = kCalls ? call_try_packet(view, exchange.op(), epoch, source, number, at)
                             : try_packet(view, exchange.op(), epoch, source, number, at);
    if (!came) return false;
  }
}

// All lanes. As receive_words; whether all of the lane's packets have come. If not, what is in the
// stage means nothing.
template <int kAtOnce>
JAX_EP_DEVICE bool try_words(const Exchange& exchange,
                             i32 source,
                             i64 token,
                             Ptr<Packet> from,
                             Ptr<u32> stage,
                             i32 num_words) {
  const auto packets = static_cast<i32>(ceil_div(num_words, 3));
  constexpr i32 kLanes = static_cast<i32>(kWarpSize);
  for (i32 first = static_cast<i32>(lane_id()); first < packets; first += kAtOnce * kLanes) {
    const auto left = static_cast<i32>(ceil_div(packets - first, kLanes));
    Packet packet[kAtOnce];
    const bool came = try_packets<kAtOnce, true>(
        exchange,
        source,
        token,
        left < kAtOnce ? left : kAtOnce,
        [from, first](int i) { return from + (first + i * kLanes); },
        packet);
    if (!came) return false;
    JAX_EP_UNROLL
    for (int i = 0; i < kAtOnce; ++i) {
      words_of_packet(packet[i], 3 * (first + i * kLanes), stage, num_words);
    }
  }
  return true;
}

}  // namespace jax_ep::dev

#endif  // JAX_EP_CSRC_KERNELS_LOW_LATENCY_MISSING_RANKS_H_
