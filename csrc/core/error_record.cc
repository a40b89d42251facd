// SPDX-License-Identifier: Apache-2.0
#include "csrc/core/error_record.h"

#include <cstdio>
#include <string_view>

namespace jax_ep {
namespace {

std::string_view op_name(uint32_t op) {
  switch (static_cast<OpKind>(op)) {
    case OpKind::kPlan: return "plan";
    case OpKind::kDispatch: return "dispatch";
    case OpKind::kCombine: return "combine";
  }
  return "an unknown operation";
}

std::string seconds_text(double seconds) {
  char text[32];
  std::snprintf(text, sizeof(text), "%g s", seconds);
  return text;
}

std::string awaited(const ErrorRecord& record) {
  const std::string peer = "rank " + std::to_string(record.peer);
  switch (static_cast<WaitTag>(record.tag)) {
    case WaitTag::kAcknowledged: return peer + " to have read the rows of the exchange before";
    case WaitTag::kArrived:
      if (static_cast<OpKind>(record.op) == OpKind::kPlan) return "the routing of " + peer;
      return "the rows of " + peer + " (chunk " + std::to_string(record.chunk) + ")";
    case WaitTag::kGridBarrier: return "the other blocks of its own kernel";
    default: return "an unknown event (tag " + std::to_string(record.tag) + ") of " + peer;
  }
}

std::string advice(const ErrorRecord& record) {
  if (static_cast<WaitTag>(record.tag) == WaitTag::kGridBarrier) {
    return "do all of them fit on the device beside what else runs on it? (lower num_sms)";
  }
  return "is rank " + std::to_string(record.peer) +
         " alive, and does it run the same operations in the same order?";
}

}  // namespace

std::string wrong_rank_text(std::string_view op, int64_t program_rank, int64_t rank) {
  return "the program runs " + std::string(op) + " as rank " + std::to_string(program_rank) +
         " on a device that is rank " + std::to_string(rank) +
         " of its EpGroup; run it on the mesh that the group was made for";
}

std::string describe(const ErrorRecord& record, double timeout_s) {
  const auto tag = static_cast<WaitTag>(record.tag);
  const std::string op(op_name(record.op));
  const std::string rank = "rank " + std::to_string(record.rank);
  const std::string peer = "rank " + std::to_string(record.peer);
  if (tag == WaitTag::kWrongRank) {
    return wrong_rank_text(op, record.peer, record.rank);
  }
  if (tag == WaitTag::kWrongOp) {
    return "ranks disagree: exchange " + std::to_string(record.expected / kFlagsPerEpoch) + " is " +
           op + " on " + rank + " and exchange " + std::to_string(record.seen / kFlagsPerEpoch) +
           " is " + std::string(op_name(record.seen % kFlagsPerEpoch - 1)) + " on " + peer +
           "; all ranks must run the same operations in the same order";
  }
  // Flags of arrival hold the operation too. Kernels give their own rank twice the time.
  const uint32_t unit = tag == WaitTag::kArrived ? kFlagsPerEpoch : 1;
  const bool own = tag == WaitTag::kGridBarrier || record.peer == record.rank;
  const double waited_s = own ? 2 * timeout_s : timeout_s;
  return rank + " waited " + seconds_text(waited_s) + " in " + op + " for " + awaited(record) +
         ": expected " + (tag == WaitTag::kGridBarrier ? "generation " : "epoch ") +
         std::to_string(record.expected / unit) + ", saw " + std::to_string(record.seen / unit) +
         "; " + advice(record);
}

}  // namespace jax_ep
