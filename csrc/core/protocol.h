// SPDX-License-Identifier: Apache-2.0
// What the ranks of a group tell each other of an exchange, as words; docs/design/protocol.md
// explains it. The kernels, the host and the simulator read this header; nothing else knows a bit
// of a flag.
#ifndef JAX_EP_CSRC_CORE_PROTOCOL_H_
#define JAX_EP_CSRC_CORE_PROTOCOL_H_

#include <cstdint>
#include <string_view>

#include "csrc/core/dtype.h"
#include "csrc/core/ep_shape.h"
#include "csrc/core/low_latency_protocol.h"

namespace jax_ep {

// An exchange's operation.
// kPlanDispatch is both in one exchange: the plan of a dispatch, and the dispatch.
enum class OpKind : uint32_t { kPlan = 0, kDispatch = 1, kCombine = 2, kPlanDispatch = 3 };
constexpr std::string_view name(OpKind op) {
  switch (op) {
    case OpKind::kPlan: return "plan";
    case OpKind::kDispatch: return "dispatch";
    case OpKind::kCombine: return "combine";
    case OpKind::kPlanDispatch: return "plan_dispatch";
  }
  return "an unknown operation";
}
inline constexpr uint32_t kNumOps = 4;
inline constexpr uint32_t kMaxOps = 255;  // a flag has a byte for operation + 1
static_assert(kNumOps < kMaxOps, "the words of this header have a byte for an operation");

// Exchanges of one channel follow each other; those of different channels may be in flight at once.
// Each channel has its own epoch, flags and acknowledgments.
enum class Channel : uint32_t { kHighThroughput = 0, kLowLatency = 1 };
inline constexpr uint32_t kNumChannels = 2;

// --- which call it is ----------------------------------------------------------------------------

// 24 bits by which a rank notices that a peer runs the same operation in another call: three hashes
// of a byte each, so that a message can say which part differs. Different calls have equal hashes
// by chance once in 256; equal calls always do.
enum class CallPart : uint32_t { kTokens = 0, kSizes = 1, kCallSite = 2 };
inline constexpr uint32_t kNumCallParts = 3;

constexpr uint32_t hash_byte(uint64_t value) {
  value = (value ^ (value >> 30)) * 0xbf58476d1ce4e5b9;
  value = (value ^ (value >> 27)) * 0x94d049bb133111eb;
  return static_cast<uint32_t>((value ^ (value >> 31)) & 0xFF);
}

// `products` is 0 for what is moved and summed as it is. `call_site` is a number of the call's
// place in the program, the same on all ranks; the same for all calls: not known.
constexpr uint32_t call_tag(const EpShape& shape,
                            int64_t hidden,
                            DType dtype,
                            Wire wire,
                            int32_t scalars,
                            uint32_t products,
                            uint32_t call_site) {
  uint64_t sizes = static_cast<uint64_t>(hidden);
  const uint64_t more[] = {static_cast<uint64_t>(dtype),
                           static_cast<uint64_t>(wire),
                           static_cast<uint64_t>(scalars),
                           uint64_t{products},
                           static_cast<uint64_t>(shape.recv_capacity),
                           static_cast<uint64_t>(shape.expert_alignment)};
  for (const uint64_t value : more) sizes = sizes * 0x9e3779b97f4a7c15 + value + 1;
  return hash_byte(static_cast<uint64_t>(shape.num_tokens) + 1) | hash_byte(sizes) << 8 |
         hash_byte(uint64_t{call_site} + 1) << 16;
}

// --- arrival flags -------------------------------------------------------------------------------

// What Region::kArrived holds when a chunk of an exchange has arrived: the exchange's number, its
// operation, and which call it is. Never 0, which is there before a chunk's first use.
constexpr uint64_t arrival_flag(uint32_t epoch, OpKind op, uint32_t tag) {
  return uint64_t{epoch} | uint64_t{static_cast<uint32_t>(op) + 1} << 32 | uint64_t{tag} << 40;
}
constexpr uint32_t epoch_of(uint64_t flag) { return static_cast<uint32_t>(flag); }
constexpr uint32_t op_of(uint64_t flag) {
  return static_cast<uint32_t>(flag >> 32 & 0xFF) - 1;  // an OpKind, or what a stranger wrote
}
constexpr uint32_t tag_of(uint64_t flag) { return static_cast<uint32_t>(flag >> 40); }
static_assert(tag_of(arrival_flag(1, OpKind::kCombine, 0xABCDEF)) == 0xABCDEF);

// --- waits and their ends ------------------------------------------------------------------------

// What a kernel was doing when it gave up.
enum class WaitTag : uint32_t {
  kNone = 0,
  kAcknowledged,  // waited for a peer to have read the rows of an exchange before
  kArrived,       // waited for a peer's rows or routing
  kGridBarrier,   // waited for the other blocks of its own kernel
  kPlanned,       // waited for the plan that its own kernel makes
  kWrongRank,     // did not wait: the program runs on another rank than the group says
  kWrongOp,       // waited for a peer, and found it in another operation
  kWrongCall,     // waited for a peer, and found it in another call of the same operation
  kOverlap,       // did not wait: another operation of the group runs on the rank
  kClosed,        // did not wait: the group has been closed; the kernel ended and gave no results
  kPeerGaveUp,    // waited, and was told by a peer that it gave up
  kPacket,        // waited for a packet of a peer's low-latency exchange
  kStaleFlight,   // did not wait: a second half, and the flight of its ticket is not open
  // Between domains; the peer is of another one where the network is waited for.
  kDelivered,  // waited for a peer's message
  kCredit,     // waited for a peer to have read a message
  kRelayed,    // waited for a rank of the domain to hand a message on
  kPulled,     // waited for a rank of the domain to have read a message
  kGathered,   // waited for the sums of a rank of the domain
  kFreed,      // waited for a rank of the domain to have read such sums
  // No kernel says it: the host finds that one does not come back from its transport.
  kInTransport,
};

// Whether it is of an exchange between domains.
constexpr bool is_between_domains(WaitTag tag) {
  return tag >= WaitTag::kDelivered && tag <= WaitTag::kFreed;
}

// How long a wait may take, in quarters of the group's timeout. Who is waited for may in turn wait
// for another rank, and that one is to be named first, not its messenger: a rank of the domain that
// waits for the network; one of another domain, for its domain. `own`: for the rank's own blocks,
// or for its own rows, behind all of that.
constexpr uint32_t timeout_quarters(OpKind op, WaitTag tag, bool own) {
  if (own) return 8;
  switch (tag) {
    case WaitTag::kDelivered: return op == OpKind::kCombine ? 5 : 4;  // behind it: its domain
    case WaitTag::kCredit: return 5;                                  // likewise
    case WaitTag::kRelayed:
    case WaitTag::kPulled:
    case WaitTag::kFreed: return 6;     // behind it: a message, or a credit
    case WaitTag::kGathered: return 7;  // behind it: that sums have been freed
    default: return 4;
  }
}

// ErrorRecord::detail of kClosed: the kernel did wait, and ended with an error.
inline constexpr uint32_t kClosedInAWait = 1;

// What a rank that gives up stores into its peers' heaps, for their waits to end too: who gave up,
// waiting for whom, and how. Never 0.
struct Aborted {
  uint32_t by;
  uint32_t blamed;
  uint32_t tag;
  uint32_t op;
};
constexpr uint32_t pack(const Aborted& aborted) {
  return 1U << 31 | (aborted.by & 0x7F) | (aborted.blamed & 0x7F) << 7 |
         (aborted.tag & 0x1F) << 14 | (aborted.op & 0xFF) << 19;
}
constexpr Aborted unpack_aborted(uint32_t word) {
  return {.by = word & 0x7F,
          .blamed = word >> 7 & 0x7F,
          .tag = word >> 14 & 0x1F,
          .op = word >> 19 & 0xFF};
}

// What a kernel that has waited for long stores for its host, one word for each peer: it goes on
// waiting. `level` counts the reports of one wait: each after twice the time of the one before.
struct LongWait {
  uint32_t epoch;
  uint32_t op;
  uint32_t tag;
  uint32_t level;  // from 1 on
  bool ended;      // what was waited for has come, or it is not waited for any longer:
  bool given_up = false;
};
constexpr uint64_t pack(const LongWait& wait) {
  return uint64_t{wait.epoch} | uint64_t{wait.op & 0xFF} << 32 | uint64_t{wait.tag & 0x1F} << 40 |
         uint64_t{wait.level & 0xFF} << 48 | uint64_t{wait.ended} << 56 |
         uint64_t{wait.given_up} << 57 | uint64_t{1} << 63;
}
constexpr LongWait unpack_long_wait(uint64_t word) {
  return {.epoch = static_cast<uint32_t>(word),
          .op = static_cast<uint32_t>(word >> 32 & 0xFF),
          .tag = static_cast<uint32_t>(word >> 40 & 0x1F),
          .level = static_cast<uint32_t>(word >> 48 & 0xFF),
          .ended = (word >> 56 & 1) != 0,
          .given_up = (word >> 57 & 1) != 0};
}

// What a kernel between domains stores for its host when it begins, and when it ends, one word for
// each channel. Its transport may wait without a deadline: then nothing else tells that it runs.
struct KernelPhase {
  uint32_t epoch;
  uint32_t op;
  bool running;
};
// Never 0, which is there before the first kernel.
constexpr uint64_t pack(const KernelPhase& phase) {
  return uint64_t{phase.epoch} | uint64_t{phase.op & 0xFF} << 32 | uint64_t{phase.running} << 40 |
         uint64_t{1} << 63;
}
constexpr KernelPhase unpack_kernel_phase(uint64_t word) {
  return {.epoch = static_cast<uint32_t>(word),
          .op = static_cast<uint32_t>(word >> 32 & 0xFF),
          .running = (word >> 40 & 1) != 0};
}

// --- a rank's own words --------------------------------------------------------------------------

// Words of a rank that its kernels alone read and write, but for the first. They lie apart from the
// heap and are never freed: a recorded graph may run when the group has long been closed.
enum class Control : int32_t {
  kClosed,  // the host stores 1 when the group is closed: kernels touch no heap
  kFailed,  // threads that gave up
};
inline constexpr int32_t kNumControlWords = 2;
// Those of each channel, which follow.
enum class ChannelControl : int32_t {
  kEpoch,              // exchanges that this rank has finished; low latency: has begun
  kRunning,            // of the running kernel, see Exchange; 0 between kernels
  kBlocksDone,         // blocks of the running kernel that are done; 0 between kernels
  kSendersDone,        // warps that have sent all they will; 0 between kernels
  kSendTickets,        // items of work that its warps have taken; 0 between kernels
  kReceiveTickets,     // likewise
  kBarrierCount,       // blocks that have come to the grid barrier, or made their part of the plan;
                       // 0 between them
  kBarrierGeneration,  // grid barriers so far
  kPlanned,            // 1 once the running kernel has made its plan; 0 between kernels
  kUnacknowledged,     // 1 where the exchange before was not acknowledged to all ranks
  // Of low-latency exchanges alone.
  kPeersEnded,      // one that all peers have ended, and all before it, as kernels before have seen
  kPeersEndedSeen,  // the same as the running kernel has seen
  kFlights,         // [kLowLatencyBanks] by bank, an open_flight or 0
};
inline constexpr int32_t kNumChannelControlWords =
    static_cast<int32_t>(ChannelControl::kFlights) + int32_t{kLowLatencyBanks};
inline constexpr int64_t kControlBytes = 256;  // of a rank: cache lines of its own
static_assert(4 * (kNumControlWords + kNumChannelControlWords * kNumChannels) <= kControlBytes);
constexpr int32_t control_index(Control word) { return static_cast<int32_t>(word); }
constexpr int32_t control_index(Channel channel, ChannelControl word) {
  return kNumControlWords + static_cast<int32_t>(channel) * kNumChannelControlWords +
         static_cast<int32_t>(word);
}

}  // namespace jax_ep

#endif  // JAX_EP_CSRC_CORE_PROTOCOL_H_
