// SPDX-License-Identifier: Apache-2.0
// The exchanges of a plan by counts. What a rank has for the ranks of its domain these read where
// it lies, in its network heap. What it has for another domain goes there by the rail, cut into
// messages, and the ranks there read it out of the receive ring of the rank that got it. Nobody
// forwards.
//
// Nobody waits in a circle. Number the steps by message, and for each: send, relay, read, give
// credit. A warp takes its steps in ascending order. Who sends waits for the credit of a message
// before, who relays for who sends, who reads for who relays, who gives credit for who reads: each
// for a smaller step.
#ifndef JAX_EP_CSRC_KERNELS_INTERNODE_COUNTS_EXCHANGE_H_
#define JAX_EP_CSRC_KERNELS_INTERNODE_COUNTS_EXCHANGE_H_

#include "csrc/kernels/high_throughput/plan_context.h"
#include "csrc/kernels/internode/counts_tables.h"
#include "csrc/kernels/internode/message.h"

namespace jax_ep::dev {

// Words of what a rank has for others.
struct WordRange {
  i64 first;
  i64 last;

  JAX_EP_DEVICE i64 count() const { return last > first ? last - first : 0; }
  JAX_EP_DEVICE WordRange within(i64 begin, i64 end) const {
    return {first > begin ? first : begin, last < end ? last : end};
  }
  // One of kRailChunkParts.
  JAX_EP_DEVICE WordRange part(i32 part_idx) const {
    const i64 words = ceil_div(count(), kRailChunkParts);
    return within(first + part_idx * words, first + (part_idx + 1) * words);
  }
};

// Messages [first, last) of the plan, which are those of one exchange, and the flag of the domain's
// own ranks for it.
struct CountsPhase {
  i32 first;
  i32 last;
  i32 flag;
};

// All lanes of each warp of the context. `Context` is a PlanContext.
template <typename Context, typename Transport>
class CountsExchange {
 public:
  JAX_EP_DEVICE CountsExchange(const Context& context,
                               const Rail<Transport>& rail,
                               const CountsPlanMessages& messages)
      : c_(context), rail_(rail), words_(messages.words) {}

  // Behind a grid barrier after this rank's part is there. `Content` says what is exchanged:
  //   sent_to(domain)            where what goes to another domain lies in what the rank has
  //   read_of(source)            where what this rank reads lies in what the source sends to this
  //                              domain, or if it is of this domain, in what it has
  //   words(index)               what a rank of this domain has
  //   read(source, from, range)  reads some of it; `from` is where word 0 is
  // `meanwhile()` is called once something has been sent.
  template <typename Content, typename Meanwhile>
  JAX_EP_DEVICE void exchange(const CountsPhase& phase,
                              const Content& content,
                              const Meanwhile& meanwhile) const {
    if (c_.warp == 0) c_.exchange.signal_arrived(phase.flag);
    const i32 others = rail_.num_others();
    JAX_EP_NO_UNROLL
    for (i32 message = phase.first; message < phase.last; ++message) {
      const i64 begin = (message - phase.first) * words_;
      share_out(
          0, others, [&](i32 turn) { send(content, rail_.domain_at_turn(turn), message, begin); });
      if (message == phase.first) meanwhile();
      share_out(others, others, [&](i32 turn) {
        const i32 domain = rail_.domain_at_turn(turn);
        if (lane_id() == 0) rail_.wait_delivered(domain, message);
        rail_.relay(domain, message);
      });
      // The own domain's first.
      share_out(2 * others, (others + 1) * rail_.num_ranks() * kRailChunkParts, [&](i32 item) {
        read(content, phase, item, message, begin);
      });
      share_out(2 * others, others, [&](i32 turn) {
        const i32 domain = rail_.domain_at_turn(turn);
        rail_.wait_pulled(domain, message);
        if (lane_id() == 0) rail_.give_credit(domain, message);
      });
    }
  }

 private:
  // `use(item)` for those of [0, count) that this warp has; different warps begin.
  template <typename Use>
  JAX_EP_DEVICE void share_out(i32 first_warp, i32 count, const Use& use) const {
    i32 item = c_.warp - first_warp;
    while (item < 0) item += c_.num_warps;
    JAX_EP_NO_UNROLL
    for (; item < count; item += c_.num_warps) use(item);
  }

  template <typename Content>
  JAX_EP_DEVICE void send(const Content& content, i32 domain, i32 message, i64 begin) const {
    const WordRange all = content.sent_to(domain);
    const WordRange range = all.within(all.first + begin, all.first + begin + words_);
    if (lane_id() == 0) rail_.wait_credit(domain, message);
    warp_sync();
    const Ptr<u32> to = as<u32>(rail_.send_buffer(domain, message));
    rail_.send(
        domain, message, put_words(to, content.words(rail_.index()) + range.first, range.count()));
  }

  // A part of what a source has. Of a domain's ranks each begins with the one of its index.
  template <typename Content>
  JAX_EP_DEVICE void read(
      const Content& content, const CountsPhase& phase, i32 item, i32 message, i64 begin) const {
    const i32 part = item % kRailChunkParts;
    const i32 rail = (item / kRailChunkParts + rail_.index()) % rail_.num_ranks();
    const i32 turn = item / kRailChunkParts / rail_.num_ranks() - 1;
    const i32 domain = rail_.domain_at_turn(turn);
    const i32 source = rail_.rank_at(domain, rail);
    const bool is_neighbor = turn < 0;
    // No message cuts what a rank of the domain has.
    if (is_neighbor && message != phase.first) return;
    if (lane_id() == 0 && is_neighbor) c_.exchange.wait_arrived(source, phase.flag);
    if (lane_id() == 0 && !is_neighbor) rail_.wait_relayed(rail, domain, message);
    warp_sync();
    WordRange range = content.read_of(source);
    Ptr<const u32> from = content.words(rail);
    if (!is_neighbor) {
      range = range.within(begin, begin + words_);
      from = as<const u32>(rail_.message(rail, domain, message)) + -begin;
    }
    content.read(source, from, range.part(part));
    if (is_neighbor) return;
    warp_sync();
    if (lane_id() == 0) rail_.put_pulled(rail, domain, message, part);
  }

  const Context& c_;
  const Rail<Transport>& rail_;
  const i64 words_;  // of a message at most
};

}  // namespace jax_ep::dev

#endif  // JAX_EP_CSRC_KERNELS_INTERNODE_COUNTS_EXCHANGE_H_
