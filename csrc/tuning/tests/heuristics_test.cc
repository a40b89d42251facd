// SPDX-License-Identifier: Apache-2.0
#include "csrc/tuning/heuristics.h"

#include <gtest/gtest.h>

#include "csrc/tuning/warps_and_stages.h"

namespace jax_ep {
namespace {

constexpr int64_t kRowBytes = 14336;

int32_t blocks(OpKind op, int64_t num_tokens, SmBudget budget, int64_t row_bytes = kRowBytes) {
  const EpShape shape{.num_ranks = 8, .num_experts = 256, .num_topk = 8, .num_tokens = num_tokens};
  return launch_shape(op, shape, row_bytes, budget).num_blocks;
}

TEST(Tuning, LargeCallsGetTheDefaultOfTheOperation) {
  const SmBudget h200{.available = 132, .requested = 0};
  EXPECT_EQ(blocks(OpKind::kDispatch, 4096, h200), 24);
  EXPECT_EQ(blocks(OpKind::kCombine, 4096, h200), 24);
  EXPECT_EQ(blocks(OpKind::kPlan, 4096, h200, 0), 16);
}

TEST(Tuning, NumSmsReplacesTheDefault) {
  EXPECT_EQ(blocks(OpKind::kDispatch, 4096, {.available = 132, .requested = 48}), 48);
  EXPECT_EQ(blocks(OpKind::kPlan, 4096, {.available = 132, .requested = 4}, 0), 4);
}

TEST(Tuning, NoLaunchHasMoreBlocksThanItMayHaveSms) {
  EXPECT_EQ(blocks(OpKind::kDispatch, 4096, {.available = 16, .requested = 0}), 16);
  EXPECT_EQ(blocks(OpKind::kDispatch, 4096, {.available = 16, .requested = 48}), 16);
}

TEST(Tuning, SmallCallsGetFewBlocksAndAtLeastOne) {
  const SmBudget h200{.available = 132, .requested = 0};
  EXPECT_EQ(blocks(OpKind::kDispatch, 1, h200), 14);  // 14 parts of a row, for 8 ranks
  EXPECT_EQ(blocks(OpKind::kDispatch, 1, h200, 512), 1);
  EXPECT_EQ(blocks(OpKind::kDispatch, 0, h200), 1);
}

TEST(Tuning, PlansScanAllBinsHoweverFewTheTokens) {
  EXPECT_EQ(blocks(OpKind::kPlan, 1, {.available = 132, .requested = 0}, 0), 16);
  const EpShape shape{.num_ranks = 8, .num_experts = 32, .num_topk = 8, .num_tokens = 1};
  EXPECT_EQ(launch_shape(OpKind::kPlan, shape, 0, {.available = 132, .requested = 0}).num_blocks,
            2);
}

// A kernel is compiled for each of these; another combination is refused when it is launched.
TEST(Tuning, WarpsAndStagesAreThoseThatAreCompiled) {
  const SmBudget h200{.available = 132, .requested = 0};
  EpShape shape{.num_ranks = 8, .num_experts = 1, .num_topk = 8, .num_tokens = 4096};
  for (const CompiledPlan& config : kCompiledPlans) {  // the first that has room
    shape.num_experts = config.max_bins;
    EXPECT_EQ(launch_shape(OpKind::kPlan, shape, 0, h200).num_warps, config.num_warps);
    shape.num_experts = config.max_bins - 8;
    shape.layout = Layout::kRank;  // counts ranks too
    EXPECT_EQ(launch_shape(OpKind::kPlan, shape, 0, h200).num_warps, config.num_warps);
    shape.layout = Layout::kExpert;
  }
  shape.num_experts = kCompiledPlans[0].max_bins + 1;
  EXPECT_EQ(launch_shape(OpKind::kPlan, shape, 0, h200).num_warps, kCompiledPlans[1].num_warps);
  const LaunchShape dispatch = launch_shape(OpKind::kDispatch, shape, kRowBytes, h200);
  EXPECT_EQ(dispatch.num_warps, kCompiledDispatch.num_warps);
  EXPECT_EQ(dispatch.num_stages, kCompiledDispatch.num_stages);
  const LaunchShape combine = launch_shape(OpKind::kCombine, shape, kRowBytes, h200);
  EXPECT_EQ(combine.num_warps, kCompiledCombine.num_warps);
  EXPECT_EQ(combine.num_stages, kCompiledCombine.num_stages);
}

TEST(Tuning, APlanWithItsDispatchHasWarpsAsADispatchAndBlocksForBoth) {
  const SmBudget h200{.available = 132, .requested = 0};
  EpShape shape{.num_ranks = 8, .num_experts = 256, .num_topk = 8, .num_tokens = 4096};
  for (const Layout layout : {Layout::kExpert, Layout::kRank}) {
    for (const Wire wire : {Wire::kSame, Wire::kFloat8E4M3}) {
      shape.layout = layout;
      const LaunchShape alone = launch_shape(OpKind::kDispatch, shape, kRowBytes, h200, wire);
      const LaunchShape both = launch_shape(OpKind::kPlanDispatch, shape, kRowBytes, h200, wire);
      EXPECT_EQ(both.num_blocks, alone.num_blocks);
      EXPECT_EQ(both.num_warps, alone.num_warps);
      EXPECT_EQ(both.num_stages, alone.num_stages);
      EXPECT_EQ(both.num_senders, alone.num_senders);
    }
  }
  EXPECT_EQ(blocks(OpKind::kDispatch, 1, h200), 14);
  EXPECT_EQ(blocks(OpKind::kPlanDispatch, 1, h200), 16);  // all bins are scanned
}

TEST(Tuning, APlanOfManyBinsDoesNotFitInADispatch) {
  EpShape shape{.num_ranks = 8, .num_experts = kMaxPlanDispatchBins, .num_topk = 8};
  EXPECT_TRUE(plan_fits_in_dispatch(shape));
  shape.layout = Layout::kRank;  // counts ranks too
  EXPECT_FALSE(plan_fits_in_dispatch(shape));
  shape.num_experts -= shape.num_ranks;
  EXPECT_TRUE(plan_fits_in_dispatch(shape));
  shape.layout = Layout::kExpert;
  shape.num_experts = kMaxPlanDispatchBins + shape.num_ranks;
  EXPECT_FALSE(plan_fits_in_dispatch(shape));
}

TEST(Tuning, SomeWarpsOfABlockSendAndSomeDoNot) {
  const SmBudget h200{.available = 132, .requested = 0};
  EpShape shape{.num_ranks = 2, .num_experts = 256, .num_topk = 8, .num_tokens = 4096};
  const auto senders = [&](OpKind op, Wire wire = Wire::kSame) {
    return launch_shape(op, shape, kRowBytes, h200, wire).num_senders;
  };
  EXPECT_EQ(senders(OpKind::kPlan), 0);
  const int32_t of_large = senders(OpKind::kCombine);
  for (const Layout layout : {Layout::kExpert, Layout::kRank}) {
    shape.layout = layout;
    EXPECT_GT(senders(OpKind::kDispatch, Wire::kFloat8E4M3), senders(OpKind::kDispatch));
    EXPECT_LT(senders(OpKind::kDispatch, Wire::kFloat8E4M3), kCompiledDispatch.num_warps);
    EXPECT_LT(senders(OpKind::kCombine), kCompiledCombine.num_warps);
  }
  shape = {.num_ranks = 2, .num_experts = 256, .num_topk = 8, .num_tokens = 16};
  EXPECT_EQ(senders(OpKind::kCombine), kCompiledCombine.num_warps / 2);
  EXPECT_LT(senders(OpKind::kCombine), of_large);
}

// Where the link keeps the SMs waiting for long, they have expanded all by the time it is done.
TEST(Tuning, IdleSmsHelpWhereMuchIsLeftWhenAllHasBeenSent) {
  const SmBudget h200{.available = 132, .requested = 24};
  EpShape shape{.num_ranks = 2, .num_experts = 256, .num_topk = 8, .num_tokens = 4096};
  const auto tail = [&](SmBudget budget, Wire wire = Wire::kSame) {
    return launch_shape(OpKind::kDispatch, shape, kRowBytes, budget, wire).num_tail_blocks;
  };
  EXPECT_EQ(tail(h200), 108);
  // As in tests/gpu/test_programs.py.
  const EpShape turns{.num_ranks = 2, .num_experts = 64, .num_topk = 8, .num_tokens = 1024};
  EXPECT_EQ(launch_shape(OpKind::kDispatch, turns, 4 * 2048, {.available = 66, .requested = 0})
                .num_tail_blocks,
            42);
  EXPECT_EQ(tail({.available = 132, .requested = 24, .tail = 0}), 0);
  EXPECT_EQ(tail({.available = 132, .requested = 24, .tail = 40}), 40);
  EXPECT_EQ(tail({.available = 60, .requested = 24, .tail = 40}), 36);
  EXPECT_EQ(tail({.available = 16, .requested = 24}), 0);
  shape.layout = Layout::kRank;
  EXPECT_EQ(tail(h200), 0);
  shape.layout = Layout::kExpert;
  shape.num_ranks = 8;
  EXPECT_EQ(tail(h200), 0);
  EXPECT_EQ(tail(h200, Wire::kFloat8E4M3), 108);
  shape.num_ranks = 2;
  shape.num_tokens = 128;
  EXPECT_EQ(tail(h200), 0);
  for (const int64_t tokens : {400, 500, 769, 1000, 1021}) {  // however they are cut into chunks
    shape.num_tokens = tokens;
    EXPECT_EQ(tail(h200), 108) << tokens;
  }
  EXPECT_EQ(launch_shape(OpKind::kCombine, shape, kRowBytes, h200).num_tail_blocks, 0);
}

TEST(Tuning, ScalarsAloneAreLittleWork) {
  const SmBudget h200{.available = 132, .requested = 0};
  EXPECT_EQ(blocks(OpKind::kDispatch, 32, h200), 24);
  EXPECT_EQ(blocks(OpKind::kDispatch, 32, h200, 0), 4);
}

TEST(Tuning, LowLatencyKernelsBetweenDomainsHaveFewerWarps) {
  const EpShape shape{.num_ranks = 16, .num_experts = 256, .num_topk = 8, .num_tokens = 64};
  const SmBudget budget{.available = 132, .requested = 0};
  for (const OpKind op : {OpKind::kPlanDispatch, OpKind::kCombine}) {
    const CompiledTransfer& compiled =
        op == OpKind::kCombine ? kCompiledFarLowLatencyCombine : kCompiledFarLowLatencyDispatch;
    const LaunchShape launch = low_latency_launch_shape(op, shape, kRowBytes, budget, true);
    EXPECT_EQ(launch.num_warps, compiled.num_warps);
    EXPECT_EQ(launch.num_stages, compiled.num_stages);
    EXPECT_EQ(launch.num_senders, compiled.num_warps);
    EXPECT_EQ(launch.num_blocks,
              low_latency_launch_shape(op, shape, kRowBytes, budget, false).num_blocks);
  }
}

TEST(Tuning, LowLatencyCallsSpreadOverManySms) {
  EpShape shape{.num_ranks = 8, .num_experts = 256, .num_topk = 8, .num_tokens = 128};
  for (const OpKind op : {OpKind::kPlanDispatch, OpKind::kCombine}) {
    const CompiledTransfer& compiled =
        op == OpKind::kCombine ? kCompiledLowLatencyCombine : kCompiledLowLatencyDispatch;
    const auto launch = [&](SmBudget budget) {
      const LaunchShape launched = low_latency_launch_shape(op, shape, kRowBytes, budget, false);
      EXPECT_EQ(launched.num_warps, compiled.num_warps);
      EXPECT_EQ(launched.num_stages, compiled.num_stages);
      EXPECT_EQ(launched.num_senders, compiled.num_warps);
      EXPECT_EQ(launched.num_tail_blocks, 0);
      return launched.num_blocks;
    };
    shape.num_tokens = 128;
    EXPECT_EQ(launch({.available = 132, .requested = 0}), 64);
    EXPECT_EQ(launch({.available = 132, .requested = 96}), 96);
    EXPECT_EQ(launch({.available = 78, .requested = 0}), 39);
    EXPECT_EQ(launch({.available = 1, .requested = 0}), 1);
    EXPECT_EQ(launch({.available = 16, .requested = 24}), 16);
    EXPECT_EQ(launch({.available = 132, .requested = 8}), 8);
    shape.num_tokens = 1;  // 8 ranks, 7 or 10 segments of a row
    EXPECT_EQ(launch({.available = 132, .requested = 0}), op == OpKind::kCombine ? 20 : 14);
    shape.num_tokens = 0;
    EXPECT_EQ(launch({.available = 132, .requested = 0}), 1);
    shape.recv_capacity = 1000;  // rows to be cleared
    EXPECT_EQ(launch({.available = 132, .requested = 0}), op == OpKind::kCombine ? 1 : 64);
    shape.recv_capacity = 0;
  }
}

// A warp that only receives is left, or ranks could wait for each other for ever; dispatch has two
// more, for its relay and for credits.
TEST(Tuning, ABlockBetweenDomainsHasAllRoles) {
  const EpShape shape{.num_ranks = 16, .num_experts = 256, .num_topk = 8, .num_tokens = 4096};
  const SmBudget budget{.available = 132, .requested = 0};
  for (const OpKind op : {OpKind::kDispatch, OpKind::kCombine}) {
    const LaunchShape launch = internode_launch_shape(op, shape, 14336, budget, false);
    const bool dispatches = op == OpKind::kDispatch;
    EXPECT_GE(launch.num_senders, 1);
    EXPECT_GE(launch.num_rail_senders, 1);
    EXPECT_EQ(launch.num_reducers > 0, !dispatches);
    EXPECT_EQ(launch.num_tail_blocks, 0);
    const int32_t roles =
        launch.num_senders + launch.num_rail_senders + launch.num_reducers + (dispatches ? 2 : 0);
    EXPECT_LT(roles, launch.num_warps);
  }
  for (const bool by_counts : {false, true}) {
    const LaunchShape plan = internode_launch_shape(OpKind::kPlan, shape, 0, budget, by_counts);
    EXPECT_EQ(plan.num_warps,
              by_counts ? kCompiledCountsPlan.num_warps : kCompiledPlans[1].num_warps);
    EXPECT_GE(plan.num_warps, 2);
    EXPECT_EQ(plan.num_stages, 0);
  }
}

}  // namespace
}  // namespace jax_ep
