// SPDX-License-Identifier: Apache-2.0
// Waiting for a word that another thread, block or rank stores: never silently, and never for ever.
// A wait that takes long is reported to the host, again and again; one that takes too long, or
// whose peer says that it gave up, ends in an error record for the host and a trap. Too long is the
// group's timeout (by default: jax_ep/_src/groups/deadlines.py) times timeout_quarters of it, which
// csrc/core/protocol.h has.
#ifndef JAX_EP_CSRC_DEVICE_WAIT_H_
#define JAX_EP_CSRC_DEVICE_WAIT_H_

#include "csrc/device/heap.h"
#include "csrc/device/peers.h"
#include "csrc/device/primitives.h"

namespace jax_ep::dev {

// What a wait is for, as records will say.
struct WaitContext {
  WaitTag tag;
  OpKind op;
  i32 peer;
  u32 expected;  // the exchange, or the generation
  u32 chunk;
};

// Writes the record for the host, by one thread.
JAX_EP_DEVICE void write_record(
    const RankView& view, const WaitContext& context, u32 seen, u32 other_op, u32 detail) {
  const Ptr<u32> record = as<u32>(Ptr<ErrorRecord>{view.error});
  const u32 fields[] = {static_cast<u32>(context.tag),
                        static_cast<u32>(context.op),
                        static_cast<u32>(view.rank),
                        static_cast<u32>(context.peer),
                        context.expected,
                        seen,
                        context.chunk,
                        other_op,
                        detail};
  for (int i = 0; i + 1 < kNumRecordFields; ++i) st(record + (1 + i), fields[i]);
  // RELEASE(error): publishes the record. Its acquire is the host's, see read_error.
  st_release<Scope::kSys>(record, 1);
}

// Tells the peers and the host why, and ends the kernel. Like all that is cold, it takes words and
// no structs, which would have to lie in memory for the call.
//
// That it does not return is told to the compiler. A kernel that waits and calls what may return,
// from the loop of a wait, is slower elsewhere: the sums of combine took 1.5 times as long.
[[noreturn]] JAX_EP_COLD void give_up_as(const RankView& view,
                                         WaitTag tag,
                                         OpKind op,
                                         i32 peer,
                                         u32 expected,
                                         u32 chunk,
                                         u32 seen,
                                         u32 other_op,
                                         u32 detail) {
  const Ptr<u32> record = as<u32>(Ptr<ErrorRecord>{view.error});
  // The first of the threads that give up writes; the others give it time to.
  if (fetch_add_acq_rel<Scope::kGpu>(control(view, Control::kFailed), 1) == 0) {
    // Who was told by a peer need not tell the others: they have been told too. And where the
    // others go on without this rank, they need not end: they find it missing.
    if (tag != WaitTag::kPeerGaveUp && view.given_up == nullptr) {
      const u32 word = pack(Aborted{.by = static_cast<u32>(view.rank),
                                    .blamed = static_cast<u32>(peer),
                                    .tag = static_cast<u32>(tag),
                                    .op = static_cast<u32>(op)});
      for_each_peer(view, [&view, word](i32 other) { put_aborted(view, other, word); });
    }
    write_record(view, {tag, op, peer, expected, chunk}, seen, other_op, detail);
    fence_acq_rel<Scope::kSys>();
  } else {
    while (ld_acquire<Scope::kSys>(record) == 0) spin_pause("another thread's error record");
  }
  trap();
}

[[noreturn]] JAX_EP_DEVICE void give_up(
    const RankView& view, const WaitContext& context, u32 seen, u32 other_op = 0, u32 detail = 0) {
  give_up_as(view,
             context.tag,
             context.op,
             context.peer,
             context.expected,
             context.chunk,
             seen,
             other_op,
             detail);
}

// Tells the host that a wait has taken long, or that it is over.
JAX_EP_DEVICE void report_long_wait(const RankView& view,
                                    const WaitContext& context,
                                    u32 level,
                                    bool ended,
                                    bool given_up = false) {
  // Several threads may wait for a peer, and say the same: one word, so that none is torn.
  st_relaxed<Scope::kSys>(Ptr<u64>{view.long_waits} + context.peer,
                          pack(LongWait{.epoch = context.expected,
                                        .op = static_cast<u32>(context.op),
                                        .tag = static_cast<u32>(context.tag),
                                        .level = level,
                                        .ended = ended,
                                        .given_up = given_up}));
}

// Does not return if a peer has given up, or the group is closed: there is no more to wait for.
JAX_EP_DEVICE void end_if_told(const RankView& view, const WaitContext& context) {
  const u32 word = ld_relaxed<Scope::kSys>(aborted(view, view.rank));
  if (word != 0) {
    const auto by = static_cast<i32>(unpack_aborted(word).by);
    give_up(
        view, {WaitTag::kPeerGaveUp, context.op, by, context.expected, context.chunk}, 0, 0, word);
  }
  if (ld_relaxed<Scope::kSys>(control(view, Control::kClosed)) != 0) {
    give_up(view,
            {WaitTag::kClosed, context.op, context.peer, context.expected, context.chunk},
            0,
            0,
            kClosedInAWait);
  }
}

inline constexpr u32 kMaxLevel = 32;

// What a waiting thread looks at now and then: whether it is told to end, and how long it has
// waited. Returns the level of the last report, and kOverdue with it once the deadline has passed.
inline constexpr u32 kOverdue = 1U << 31;
JAX_EP_DEVICE u32 look(const RankView& view, const WaitContext& context, u64 start, u32 level) {
  end_if_told(view, context);
  // Signed: the clocks of two SMs may differ by a little.
  const auto waited = static_cast<i64>(now_ns() - start);
  // Who waits for its own rank, which in turn waits for another one, must not give up first.
  const bool own = context.tag == WaitTag::kGridBarrier || context.peer == view.rank;
  if (level < kMaxLevel && waited >= static_cast<i64>(view.report_ns << level)) {
    report_long_wait(view, context, ++level, false);
  }
  // As timeout_quarters says; other kernels than those between domains have no register to spare.
  u64 timeout = view.timeout_ns;
  if (own) {
    timeout *= 2;
  } else if (is_between_domains(context.tag)) {
    timeout += timeout / 4 * (timeout_quarters(context.op, context.tag, own) - 4);
  }
  return waited > static_cast<i64>(timeout) ? level | kOverdue : level;
}

// Waits until `done(*word)`, which then stays, and returns it. The load that ends the wait is an
// acquire. Those before are not: each would empty the SM's cache of what it has loaded.
template <Scope kScope, typename Word, typename Done>
JAX_EP_DEVICE Word wait_until(const RankView& view,
                              Ptr<Word> word,
                              const Done& done,
                              const WaitContext& context,
                              const char* what) {
  const u64 start = now_ns();
  u32 level = 0;
  for (u32 polls = 1;; ++polls) {
    Word seen = ld_relaxed<kScope>(word);
    if (done(seen)) {
      seen = ld_acquire<kScope>(word);
      if (level != 0) report_long_wait(view, context, level & ~kOverdue, true);
      return seen;
    }
    // It has polled once more after the deadline: it may itself have stood still meanwhile.
    if ((level & kOverdue) != 0) give_up(view, context, static_cast<u32>(seen));
    if (polls % kPollsPerLook == 0) {
      level = look(view, context, start, level & ~kOverdue);
    }
    if ((level & kOverdue) == 0) spin_pause(what);
  }
}

// Whether a counter that every exchange advances has reached a value. Counters wrap around: what is
// ahead is ahead by less than half of all values.
JAX_EP_DEVICE bool has_reached(u32 seen, u32 expected) { return seen - expected <= 0x7FFF'FFFF; }

// Waits until such a counter has reached `context.expected`.
template <Scope kScope>
JAX_EP_DEVICE void wait_until_reached(const RankView& view,
                                      Ptr<u32> counter,
                                      const WaitContext& context,
                                      const char* what) {
  const u32 expected = context.expected;
  (void)wait_until<kScope>(
      view, counter, [expected](u32 seen) { return has_reached(seen, expected); }, context, what);
}

}  // namespace jax_ep::dev

#endif  // JAX_EP_CSRC_DEVICE_WAIT_H_
