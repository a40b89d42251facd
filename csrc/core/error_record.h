// SPDX-License-Identifier: Apache-2.0
// How a kernel tells the host why it gave up, and for whom it has waited long.
#ifndef JAX_EP_CSRC_CORE_ERROR_RECORD_H_
#define JAX_EP_CSRC_CORE_ERROR_RECORD_H_

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "csrc/core/protocol.h"

namespace jax_ep {

// In pinned host memory, one per rank; written once, by the first thread that gave up.
struct ErrorRecord {
  uint32_t written;   // 1: the rest is there (the last word to be stored)
  uint32_t tag;       // WaitTag
  uint32_t op;        // OpKind
  uint32_t rank;      // who waited
  uint32_t peer;      // for whom; kWrongRank: the rank that the program says; kPeerGaveUp: who did
  uint32_t expected;  // the exchange, or the generation of the grid barrier
  uint32_t seen;      // the last that there was
  uint32_t chunk;  // kArrived: which chunk (or part of one) of the peer's, as its flag is numbered;
                   // kPacket: of which token
  uint32_t other_op;  // kWrongOp, kOverlap: the other operation
  uint32_t detail;    // kWrongCall: a bit for each CallPart that differs; kPeerGaveUp: an Aborted;
                      // kClosed: 0 or kClosedInAWait
};
inline constexpr int kNumRecordFields = 10;
static_assert(sizeof(ErrorRecord) == 4 * kNumRecordFields);

// The error where a program runs `op` as another rank than its device is: it runs on another mesh.
std::string wrong_rank_text(std::string_view op, int64_t program_rank, int64_t rank);

// "rank 2 waited 60 s in dispatch for rank 5 ..."; see error_record.cc.
std::string describe(const ErrorRecord& record, double timeout_s);

// What a rank that has left this record has told its peers, or was told by one; nothing if no peer
// is to give up because of it.
std::optional<Aborted> aborted_of(const ErrorRecord& record);

// "rank 5", or what else a wait with this tag is for: "the rows of rank 5".
std::string awaited_text(WaitTag tag, uint32_t op, uint32_t peer);

}  // namespace jax_ep

#endif  // JAX_EP_CSRC_CORE_ERROR_RECORD_H_
