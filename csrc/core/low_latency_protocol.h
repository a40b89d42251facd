// SPDX-License-Identifier: Apache-2.0
// Exchanges of few tokens: what senders and receivers of the low-latency kernels agree on, and how
// much may be in such an exchange. docs/design/low_latency.md explains it.
#ifndef JAX_EP_CSRC_CORE_LOW_LATENCY_PROTOCOL_H_
#define JAX_EP_CSRC_CORE_LOW_LATENCY_PROTOCOL_H_

#include <cstdint>

#include "csrc/core/limits.h"

namespace jax_ep {

// Tokens of one rank for which heaps can have room.
inline constexpr int64_t kMaxLowLatencyTokens = 256;
// Each block counts the routing of all ranks by itself, in tables of its shared memory.
inline constexpr int64_t kMaxLowLatencySelections = 16384;  // of all ranks
inline constexpr int32_t kMaxLowLatencyBins = 1088;

// --- packets -------------------------------------------------------------------------------------

// All that travels is in packets of 16 bytes that are stored and loaded at once, and say themselves
// of which exchange they are: so no flag follows them, and no store waits for another one.
inline constexpr int64_t kPacketBytes = 16;
inline constexpr int64_t kPacketDataBytes = 12;  // in front of the flag
inline constexpr int64_t kExpertsPerPacket = 6;  // 16 bits each
inline constexpr int64_t kScalarsPerPacket = 3;
inline constexpr uint32_t kNoExpertInPacket = 0xFFFF;

constexpr int64_t num_packets(int64_t data_bytes) { return ceil_div(data_bytes, kPacketDataBytes); }
constexpr int64_t num_expert_packets(int64_t selections) {
  return ceil_div(selections, kExpertsPerPacket);
}
constexpr int64_t num_scalar_packets(int64_t selections) {
  return ceil_div(selections, kScalarsPerPacket);
}

// Never 0, which is there before a packet's first use, and after the bank has been cleared.
constexpr uint32_t packet_flag(uint32_t epoch) { return epoch << 1 | 1; }

// --- banks ---------------------------------------------------------------------------------------

// Staging for so many exchanges: while the flight of one is open, as many others less one may
// begin. A rank stores into the bank of exchange e once all peers have ended exchange e - banks and
// all before it. Each says so when it next begins a kernel, so nothing is acknowledged for its own
// sake.
inline constexpr int64_t kLowLatencyBanks = 4;
constexpr uint32_t bank_of_epoch(uint32_t epoch) { return epoch % uint32_t{kLowLatencyBanks}; }
static_assert((uint64_t{1} << 31) % kLowLatencyBanks == 0, "flags and epochs begin anew");

// What a rank keeps of a bank's exchange: 0, or of an open flight which call it is (see call_tag).
constexpr uint32_t open_flight(uint32_t call_tag) { return 1U << 31 | call_tag; }
constexpr uint32_t call_tag_of_flight(uint32_t word) { return word & 0xFF'FFFF; }

// A packet may lie unused for long: its token's number is too large for the calls in between. When
// the flags begin anew, after 2^31 exchanges, it must not be taken for a new one. So once in so
// many exchanges each bank is cleared when it has been read.
inline constexpr uint32_t kClearBankEvery = 1U << 24;
constexpr bool clears_bank(uint32_t epoch) {
  return epoch >= kClearBankEvery && epoch % kClearBankEvery < uint32_t{kLowLatencyBanks};
}
// Then what a rank has seen its peers end is renewed, too, if it is older than this. It is longer
// ago than anybody asks for, and will not be ahead of an epoch before it is renewed again.
inline constexpr uint32_t kOldestEnded = 1U << 30;

// --- ranks that do not come ----------------------------------------------------------------------

// Kernels that leave out who does not come (an operation's missing_ranks) have more words of
// Region::kArrived in the channel, behind the flags of the banks. Of a source:
inline constexpr int32_t kHeartbeatFlag = int32_t{kLowLatencyBanks};  // see heartbeat
inline constexpr int32_t kMaskedFlag = kHeartbeatFlag + 1;            // see masked_in
// And of the holder alone: by source, a verdict_word; and of itself, when it sent heartbeats last.
inline constexpr int32_t kVerdictFlag = kHeartbeatFlag + 2;
inline constexpr int32_t kBeatenFlag = kHeartbeatFlag + 3;

// What a rank that waits tells its peers about once in 2^20 ns, so that nobody gives it up for whom
// it waits for. Never 0.
inline constexpr uint32_t kHeartbeatShift = 20;
constexpr uint32_t heartbeat_tick(uint64_t now_ns) {
  return static_cast<uint32_t>(now_ns >> kHeartbeatShift);
}
constexpr uint64_t heartbeat(uint32_t tick, uint32_t epoch, int32_t waits_for) {
  return uint64_t{1} << 63 | uint64_t{tick & 0xFF'FFFF} << 39 |
         uint64_t{static_cast<uint32_t>(waits_for) & 0x7F} << 32 | epoch;
}
constexpr uint32_t heartbeat_tick_of(uint64_t heartbeat) {
  return static_cast<uint32_t>(heartbeat >> 39) & 0xFF'FFFF;
}

// By which a rank tells another one that it does without it, in this exchange.
constexpr uint64_t masked_in(uint32_t epoch) { return uint64_t{1} << 32 | epoch; }

// What a rank's blocks have agreed on of a source in an exchange.
enum class Verdict : uint32_t {
  kUnknown,  // nothing yet
  kPresent,  // all of its routing is there, and counts
  kMissing,  // it has been given up before
  kTorn,     // its routing counts, but what else it sends does not: it has been given up later
};
constexpr uint32_t verdict_word(uint32_t epoch, Verdict verdict) {
  return epoch << 2 | static_cast<uint32_t>(verdict);
}
constexpr Verdict verdict_of(uint32_t word, uint32_t epoch) {
  return word >> 2 == (epoch & 0x3FFF'FFFF) ? static_cast<Verdict>(word & 3) : Verdict::kUnknown;
}

// Who sends heartbeats is waited for, but not without end: so many times the timeout. Behind it are
// at most the waits of this exchange and of the one before, one behind the other.
inline constexpr int32_t kMostTimeouts = 8;

// --- other domains -------------------------------------------------------------------------------

// A network tears packets apart. To each rank of another domain (a far rank) go messages, with a
// word each: one with its routing as packets, and one for every few tokens, with the rows of those
// that the rank wants. All messages of an exchange are sent, also empty ones, and all are waited
// for. So who has the first message of exchange e from a rank knows that it has read all of e - 1,
// and nobody says so: two banks do. There are no halves between domains.
inline constexpr int64_t kFarBanks = 2;
constexpr uint32_t far_bank_of_epoch(uint32_t epoch) { return epoch % uint32_t{kFarBanks}; }
static_assert(kLowLatencyBanks % kFarBanks == 0, "both are cleared when all banks are");

// --- rows ----------------------------------------------------------------------------------------

// A row's segments, of at most so many bytes of its dtype, are worked on one by one. Packets do not
// lie across segments.
inline constexpr int32_t kLowLatencyDispatchSegmentBytes = 2304;
inline constexpr int32_t kLowLatencyCombineSegmentBytes = 1536;
static_assert(kLowLatencyDispatchSegmentBytes % (kPacketBytes * kPacketDataBytes) == 0);
static_assert(kLowLatencyCombineSegmentBytes % (kPacketBytes * kPacketDataBytes) == 0);

}  // namespace jax_ep

#endif  // JAX_EP_CSRC_CORE_LOW_LATENCY_PROTOCOL_H_
