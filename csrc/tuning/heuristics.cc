// SPDX-License-Identifier: Apache-2.0
#include "csrc/tuning/heuristics.h"

#include <algorithm>
#include <cmath>
#include <iterator>

#include "csrc/core/low_latency_protocol.h"
#include "csrc/core/work_partition.h"
#include "csrc/tuning/warps_and_stages.h"

namespace jax_ep {
namespace {

constexpr int32_t kPlanBlocks = 16;
// What comparable libraries use on an NVLink domain of eight. On two H200 more are faster when
// there are thousands of tokens; these leave most SMs to other work.
constexpr int32_t kTransferBlocks = 24;
// Predicted, not measured: a small call is done when its last warp is, and warps on different SMs
// do not share a store queue.
constexpr int32_t kLowLatencyBlocks = 64;
constexpr int64_t kLowLatencyUnitsPerBlock = 4;  // segments of rows

// Enough work for a block: parts of chunks, over all ranks, for its warps; chunks of scalars or
// routing alone; bins to scan, one by a warp.
constexpr int64_t kPartsPerBlock = 8;
constexpr int64_t kSmallChunksPerBlock = 64;
constexpr int64_t kBinsPerBlock = 16;
// Of a block's warps, those that send first: so many that the link is busy while the others write
// what has arrived. Quantizing takes more of them, and so does summing; in a small call, in which
// no warp has much to do, half of them sum what arrives from the start. Measured on two H200
// (docs/measurements/performance.md). Before a tail more of them send, for the others need not keep
// up; but among more than two ranks the link is the limit, as the event model there says.
int32_t num_senders(OpKind op, const EpShape& shape, Wire wire, bool small, bool has_tail) {
  const bool is_rank_major = shape.layout == Layout::kRank;
  if (op == OpKind::kCombine) {
    return small ? kCompiledCombine.num_warps / 2 : is_rank_major ? 8 : 10;
  }
  if (has_tail && shape.num_ranks <= 2) return wire == Wire::kSame ? 8 : 12;
  if (wire == Wire::kSame) return 5;
  return is_rank_major ? 8 : 6;
}

// About the least part of a row that the kernels give to a warp.
constexpr int64_t kPartBytes = 1024;

int32_t num_plan_bins(const EpShape& shape) {
  return num_bins(shape.layout, shape.num_experts, shape.num_ranks);
}

// The first whose tables have room.
const CompiledPlan& plan_config(int32_t bins) {
  const auto* const last = std::end(kCompiledPlans) - 1;
  return *std::find_if(std::begin(kCompiledPlans), last, [&](const CompiledPlan& config) {
    return bins <= config.max_bins;
  });
}

const CompiledTransfer& low_latency_config(bool combines, bool spans_domains) {
  if (combines) return spans_domains ? kCompiledFarLowLatencyCombine : kCompiledLowLatencyCombine;
  return spans_domains ? kCompiledFarLowLatencyDispatch : kCompiledLowLatencyDispatch;
}

// Parts of chunks, over all ranks: what the warps of a transfer do one by one.
int64_t num_items(OpKind op, const EpShape& shape, int64_t row_bytes) {
  const int32_t chunks = num_chunks(op, shape.num_tokens);
  const auto max_parts =
      static_cast<int32_t>(std::min<int64_t>(row_bytes / kPartBytes, kMaxChunks));
  return int64_t{chunks} * shape.num_ranks * num_parts(chunks, max_parts);
}

int64_t useful_blocks(OpKind op, const EpShape& shape, int64_t row_bytes) {
  if (op == OpKind::kPlanDispatch) {
    return std::max(useful_blocks(OpKind::kPlan, shape, 0),
                    useful_blocks(OpKind::kDispatch, shape, row_bytes));
  }
  const int64_t items = num_items(op, shape, row_bytes);
  if (op == OpKind::kPlan) {
    return std::max(ceil_div(items, kSmallChunksPerBlock),
                    ceil_div(num_plan_bins(shape), kBinsPerBlock));
  }
  return ceil_div(items, row_bytes == 0 ? kSmallChunksPerBlock : kPartsPerBlock);
}

// What one SM stores, and what travels over NVLink each way, measured on two H200
// (docs/measurements/performance.md): bytes in a microsecond.
constexpr double kSmStoreRate = 54'000;
constexpr double kLinkRate = 341'000;
// So much left to expand is worth a second launch.
constexpr double kMinTailBytes = 20e6;
// What of a bfloat16 row's bytes travels in FP8, scales included.
constexpr double kFp8Share = 0.516;

// Bytes of rows that so many SMs have not yet written when the last row has been sent, if routing
// is even: until then they have sent, and expanded as fast as an SM can store.
double bytes_left(const EpShape& shape, int64_t row_bytes, Wire wire, int32_t num_blocks) {
  const double ranks = shape.num_ranks;
  const double tokens = static_cast<double>(shape.num_tokens);
  const double ranks_of_token = ranks * (1 - std::pow(1 - 1 / ranks, shape.num_topk));
  const double rows = shape.layout == Layout::kRank ? ranks_of_token : shape.num_topk;
  const double expanded = tokens * rows * static_cast<double>(row_bytes);
  const double wire_bytes =
      static_cast<double>(row_bytes) * (wire == Wire::kFloat8E4M3 ? kFp8Share : 1);
  const double sent = tokens * ranks_of_token * (1 - 1 / ranks) * wire_bytes;
  return expanded + sent - sent / kLinkRate * kSmStoreRate * num_blocks;
}

int32_t num_tail_blocks(const EpShape& shape,
                        int64_t row_bytes,
                        Wire wire,
                        const SmBudget& budget,
                        Tail tail,
                        int32_t num_blocks) {
  if (!tells_all_sent(shape.num_tokens) || tail == Tail::kOff) return 0;
  const bool is_worth_it = bytes_left(shape, row_bytes, wire, num_blocks) >= kMinTailBytes;
  if (tail != Tail::kOn && !is_worth_it) return 0;
  const int32_t idle = std::max(budget.available - num_blocks, 0);
  return budget.tail < 0 ? idle : std::min(budget.tail, idle);
}

// The most blocks, by what was asked for, what was measured to be best, and by default.
int32_t requested_blocks(const SmBudget& budget, const LaunchChoice& choice, int32_t by_default) {
  const int32_t chosen = choice.num_sms > 0 ? choice.num_sms : by_default;
  if (budget.requested <= 0) return chosen;
  return choice.num_sms > 0 ? std::min(budget.requested, chosen) : budget.requested;
}

}  // namespace

int32_t default_num_sms(bool low_latency) {
  return low_latency ? kLowLatencyBlocks : kTransferBlocks;
}

bool plan_fits_in_dispatch(const EpShape& shape) {
  return num_plan_bins(shape) <= kMaxPlanDispatchBins;
}

LaunchShape launch_shape(OpKind op,
                         const EpShape& shape,
                         int64_t row_bytes,
                         SmBudget budget,
                         Wire wire,
                         const LaunchChoice& choice) {
  const int32_t by_default = op == OpKind::kPlan ? kPlanBlocks : kTransferBlocks;
  const int32_t requested = requested_blocks(budget, choice, by_default);
  const int64_t blocks =
      std::min<int64_t>({requested, budget.available, useful_blocks(op, shape, row_bytes)});
  LaunchShape launch{.num_blocks = static_cast<int32_t>(std::max<int64_t>(blocks, 1)),
                     .num_warps = 0,
                     .num_stages = 0};
  if (op == OpKind::kPlan) {
    launch.num_warps = plan_config(num_plan_bins(shape)).num_warps;
  } else {
    const OpKind transfer = op == OpKind::kPlanDispatch ? OpKind::kDispatch : op;
    const CompiledTransfer& config =
        transfer == OpKind::kDispatch ? kCompiledDispatch : kCompiledCombine;
    launch.num_warps = config.num_warps;
    launch.num_stages = config.num_stages;
    const int64_t num_warps = int64_t{launch.num_blocks} * config.num_warps;
    const bool small = num_items(transfer, shape, row_bytes) <= 2 * num_warps;
    if (transfer == OpKind::kDispatch) {
      launch.num_tail_blocks =
          num_tail_blocks(shape, row_bytes, wire, budget, choice.tail, launch.num_blocks);
    }
    launch.num_senders =
        choice.num_senders > 0
            ? std::min(choice.num_senders, config.num_warps - 1)
            : num_senders(transfer, shape, wire, small, launch.num_tail_blocks > 0);
  }
  return launch;
}

LaunchShape internode_launch_shape(
    OpKind op, const EpShape& shape, int64_t row_bytes, SmBudget budget, bool plans_by_counts) {
  // So many of a block's warps have each role; not measured between nodes yet.
  const int32_t of_role = op == OpKind::kDispatch ? 3 : 2;
  LaunchShape launch = launch_shape(op, shape, row_bytes, budget);
  launch.num_tail_blocks = 0;
  if (op == OpKind::kPlan) {
    const CompiledPlan& plan = plans_by_counts ? kCompiledCountsPlan : std::end(kCompiledPlans)[-1];
    launch.num_warps = plan.num_warps;
    return launch;
  }
  const CompiledTransfer& config =
      op == OpKind::kDispatch ? kCompiledInternodeDispatch : kCompiledInternodeCombine;
  launch.num_warps = config.num_warps;
  launch.num_stages = config.num_stages;
  launch.num_senders = of_role;
  launch.num_rail_senders = of_role;
  if (op == OpKind::kCombine) launch.num_reducers = of_role;
  return launch;
}

LaunchShape low_latency_launch_shape(OpKind op,
                                     const EpShape& shape,
                                     int64_t row_bytes,
                                     SmBudget budget,
                                     bool spans_domains,
                                     const LaunchChoice& choice) {
  const bool combines = op == OpKind::kCombine;
  const CompiledTransfer& config = low_latency_config(combines, spans_domains);
  const int64_t segments = ceil_div(
      row_bytes, combines ? kLowLatencyCombineSegmentBytes : kLowLatencyDispatchSegmentBytes);
  // A dispatch also clears rows: at most all.
  const int64_t rows =
      std::max(shape.num_ranks * shape.num_tokens, combines ? int64_t{0} : shape.recv_capacity);
  const int64_t units = rows * segments;
  // Half of the SMs are left to others, such as XLA's collectives.
  const int32_t by_default = std::min(kLowLatencyBlocks, std::max(budget.available / 2, 1));
  const int32_t requested = requested_blocks(budget, choice, by_default);
  const int64_t blocks =
      std::min<int64_t>({requested, budget.available, ceil_div(units, kLowLatencyUnitsPerBlock)});
  // All warps send.
  return {.num_blocks = static_cast<int32_t>(std::max<int64_t>(blocks, 1)),
          .num_warps = config.num_warps,
          .num_stages = config.num_stages,
          .num_senders = config.num_warps};
}

}  // namespace jax_ep
