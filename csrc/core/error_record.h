// SPDX-License-Identifier: Apache-2.0
// How a kernel that gives up tells the host why.
#ifndef JAX_EP_CSRC_CORE_ERROR_RECORD_H_
#define JAX_EP_CSRC_CORE_ERROR_RECORD_H_

#include <cstdint>
#include <string>
#include <string_view>

namespace jax_ep {

// An exchange's operation.
enum class OpKind : uint32_t { kPlan = 0, kDispatch = 1, kCombine = 2 };

// What Region::kArrived holds when a chunk of an exchange has arrived. Never 0, which is there
// before a chunk's first use.
inline constexpr uint32_t kFlagsPerEpoch = 4;
constexpr uint32_t arrival_flag(uint32_t epoch, OpKind op) {
  return kFlagsPerEpoch * epoch + 1 + static_cast<uint32_t>(op);
}

// What a kernel was doing when it gave up.
enum class WaitTag : uint32_t {
  kNone = 0,
  kAcknowledged,  // waited for a peer to have read the rows of the exchange before
  kArrived,       // waited for a peer's rows (dispatch, combine) or routing (plan)
  kGridBarrier,   // waited for the other blocks of its own kernel
  kWrongRank,     // did not wait: the program runs on another rank than the group says
  kWrongOp,       // waited for a peer, and found it in another operation
};

// In pinned host memory, one per rank; written once, by the first wait that ran out of time.
struct ErrorRecord {
  uint32_t written;   // 1: the rest is there (the last word to be stored)
  uint32_t tag;       // WaitTag
  uint32_t op;        // OpKind
  uint32_t rank;      // who waited
  uint32_t peer;      // for whom; kWrongRank: the rank that the program says
  uint32_t expected;  // the flag's value; kArrived, kWrongOp: an arrival_flag
  uint32_t seen;
  uint32_t chunk;  // kArrived: which chunk of the peer's
};

// The error where a program runs `op` as another rank than its device is: it runs on another mesh.
std::string wrong_rank_text(std::string_view op, int64_t program_rank, int64_t rank);

// "rank 2 waited 60 s in dispatch for rank 5 ..."; see error_record.cc.
std::string describe(const ErrorRecord& record, double timeout_s);

}  // namespace jax_ep

#endif  // JAX_EP_CSRC_CORE_ERROR_RECORD_H_
