// SPDX-License-Identifier: Apache-2.0
#include "csrc/core/error_record.h"

#include <cstdio>

#include "csrc/core/work_partition.h"

namespace jax_ep {
namespace {

std::string seconds_text(double seconds) {
  char text[32];
  std::snprintf(text, sizeof(text), "%g s", seconds);
  return text;
}

bool waits_for_own_blocks(WaitTag tag) {
  return tag == WaitTag::kGridBarrier || tag == WaitTag::kPlanned;
}

std::string advice(const ErrorRecord& record) {
  if (waits_for_own_blocks(static_cast<WaitTag>(record.tag))) {
    return "do all of them fit on the device beside what else runs on it? (lower max_num_sms)";
  }
  return "is rank " + std::to_string(record.peer) +
         " alive, and does it run the same operations in the same order?";
}

// What a record says of an arrival: a chunk of routing or of rows.
std::string arrival_text(const ErrorRecord& record) {
  uint32_t op = record.op;
  uint32_t chunk = record.chunk;
  if (static_cast<OpKind>(op) == OpKind::kPlanDispatch) {
    const bool rows = chunk >= kRowFlags;
    op = static_cast<uint32_t>(rows ? OpKind::kDispatch : OpKind::kPlan);
    chunk -= rows ? kRowFlags : 0;
  }
  const std::string awaited = awaited_text(WaitTag::kArrived, op, record.peer);
  if (static_cast<OpKind>(op) == OpKind::kPlan) return awaited;
  return awaited + " (chunk " + std::to_string(chunk) + ")";
}

// What it waited for to be, and what it was.
std::string seen_text(const ErrorRecord& record) {
  const auto tag = static_cast<WaitTag>(record.tag);
  if (tag == WaitTag::kPlanned) return "";
  std::string what = "exchange ";
  if (tag == WaitTag::kGridBarrier) what = "generation ";
  if (is_between_domains(tag)) what = "message ";
  return ": expected " + what + std::to_string(record.expected) + ", saw " +
         std::to_string(record.seen);
}

std::string deadline_text(const ErrorRecord& record, double timeout_s) {
  const auto tag = static_cast<WaitTag>(record.tag);
  std::string awaited =
      tag == WaitTag::kArrived ? arrival_text(record) : awaited_text(tag, record.op, record.peer);
  if (is_between_domains(tag)) awaited += " (chunk " + std::to_string(record.chunk) + ")";
  if (tag == WaitTag::kPacket) awaited += " (token " + std::to_string(record.chunk) + ")";
  const bool own = waits_for_own_blocks(tag) || record.peer == record.rank;
  const double times = timeout_quarters(static_cast<OpKind>(record.op), tag, own) / 4.0;
  return "rank " + std::to_string(record.rank) + " waited " + seconds_text(times * timeout_s) +
         " in " + std::string(name(static_cast<OpKind>(record.op))) + " for " + awaited +
         seen_text(record) + "; " + advice(record);
}

std::string wrong_call_text(const ErrorRecord& record) {
  constexpr std::string_view kParts[kNumCallParts] = {
      "the number of tokens", "hidden, dtype or capacity", "the call site (the layer)"};
  std::string differs;
  for (uint32_t part = 0; part < kNumCallParts; ++part) {
    if ((record.detail >> part & 1) == 0) continue;
    differs += (differs.empty() ? "" : " and ") + std::string(kParts[part]);
  }
  const std::string op(name(static_cast<OpKind>(record.op)));
  return "ranks disagree: exchange " + std::to_string(record.expected) + " is one " + op +
         " on rank " + std::to_string(record.rank) + " and another " + op + " on rank " +
         std::to_string(record.peer) + "; they differ in " + differs +
         "; all ranks must run the same operations in the same order";
}

std::string peer_gave_up_text(const ErrorRecord& record) {
  const Aborted aborted = unpack_aborted(record.detail);
  return "rank " + std::to_string(record.rank) + " ended its " +
         std::string(name(static_cast<OpKind>(record.op))) + " because rank " +
         std::to_string(aborted.by) + " gave up in " +
         std::string(name(static_cast<OpKind>(aborted.op))) + ", waiting for " +
         awaited_text(static_cast<WaitTag>(aborted.tag), aborted.op, aborted.blamed) +
         "; look at the log of rank " + std::to_string(aborted.by) + ", and at rank " +
         std::to_string(aborted.blamed);
}

}  // namespace

std::string awaited_text(WaitTag tag, uint32_t op, uint32_t peer) {
  const std::string rank = "rank " + std::to_string(peer);
  switch (tag) {
    case WaitTag::kAcknowledged: return rank + " to have read the rows of an exchange before";
    case WaitTag::kArrived:
      switch (static_cast<OpKind>(op)) {
        case OpKind::kPlan: return "the routing of " + rank;
        case OpKind::kPlanDispatch: return "the routing or the rows of " + rank;
        default: return "the rows of " + rank;
      }
    case WaitTag::kGridBarrier: return "the other blocks of its own kernel";
    case WaitTag::kPlanned: return "the other blocks of its own kernel to have made the plan";
    case WaitTag::kPacket: return "a packet of " + rank;
    case WaitTag::kDelivered: return "a message of " + rank + " over the network";
    case WaitTag::kCredit: return rank + " to have read a message over the network";
    case WaitTag::kRelayed: return rank + " to hand on a message from the network";
    case WaitTag::kPulled: return rank + " to have read a message from the network";
    case WaitTag::kGathered: return "the sums of " + rank;
    case WaitTag::kFreed: return rank + " to have read the sums of a chunk before";
    case WaitTag::kInTransport: return "NVSHMEM, which sends to " + rank;
    case WaitTag::kWrongOp:
    case WaitTag::kWrongCall: return rank + ", which runs something else";
    case WaitTag::kWrongRank:
    case WaitTag::kStaleFlight:
    case WaitTag::kOverlap: return "nobody, because its own program is wrong";
    default:
      return "an unknown event (tag " + std::to_string(static_cast<uint32_t>(tag)) + ") of " + rank;
  }
}

std::optional<Aborted> aborted_of(const ErrorRecord& record) {
  const auto tag = static_cast<WaitTag>(record.tag);
  if (tag == WaitTag::kPeerGaveUp) return unpack_aborted(record.detail);
  if (tag == WaitTag::kClosed && record.detail != kClosedInAWait) return std::nullopt;
  return Aborted{.by = record.rank, .blamed = record.peer, .tag = record.tag, .op = record.op};
}

std::string wrong_rank_text(std::string_view op, int64_t program_rank, int64_t rank) {
  return "the program runs " + std::string(op) + " as rank " + std::to_string(program_rank) +
         " on a device that is rank " + std::to_string(rank) +
         " of its EpGroup; run it on the mesh that the group was made for";
}

std::string describe(const ErrorRecord& record, double timeout_s) {
  const std::string op(name(static_cast<OpKind>(record.op)));
  const std::string rank = "rank " + std::to_string(record.rank);
  switch (static_cast<WaitTag>(record.tag)) {
    case WaitTag::kWrongRank: return wrong_rank_text(op, record.peer, record.rank);
    case WaitTag::kWrongOp:
      return "ranks disagree: exchange " + std::to_string(record.expected) + " is " + op + " on " +
             rank + " and " + std::string(name(static_cast<OpKind>(record.other_op))) +
             " on rank " + std::to_string(record.peer) +
             "; all ranks must run the same operations in the same order";
    case WaitTag::kWrongCall: return wrong_call_text(record);
    case WaitTag::kOverlap:
      return "two operations of the EpGroup ran on " + rank + " at the same time: " + op + " and " +
             std::string(name(static_cast<OpKind>(record.other_op))) +
             "; a rank runs one at a time: all on one stream, and no concurrent command buffers";
    case WaitTag::kClosed:
      if (record.detail == kClosedInAWait) {
        return "the EpGroup was closed while " + rank + " waited in " + op + " for rank " +
               std::to_string(record.peer) + "; close it when no thread launches programs with it";
      }
      return op + " of " + rank +
             " was called after the EpGroup had been closed: its results are NaN, or -1; a "
             "compiled function may be called only while the group that it was traced with is open";
    case WaitTag::kStaleFlight:
      return "the second half of a " + op + " of " + rank + " got the flight of exchange " +
             std::to_string(record.expected) +
             ", which is not open: it has been received before, " +
             std::to_string(kLowLatencyBanks) +
             " others have begun since, or it is of another EpGroup or operation (exchange " +
             std::to_string(record.seen) + " was begun last); a flight is used once";
    case WaitTag::kPeerGaveUp: return peer_gave_up_text(record);
    default: return deadline_text(record, timeout_s);
  }
}

}  // namespace jax_ep
