// SPDX-License-Identifier: Apache-2.0
// The low-latency kernels on the simulator: random scenarios, between calls of the others, and the
// problems that random ones would miss. What goes wrong is in kernels_test.cc.
#include <gtest/gtest.h>

#include <string>

#include "csrc/kernels/tests/expect_scenarios.h"

namespace jax_ep {
namespace {

void expect_low_latency(uint64_t first, uint64_t last, ScenarioLimits limits, bool races = true) {
  limits.low_latency = true;
  expect_scenarios(first, last, limits, races);
}

class LowLatencyRanks : public testing::TestWithParam<int32_t> {};

TEST_P(LowLatencyRanks, ScenariosAgreeWithTheCpuBackend) {
  expect_low_latency(1, GetParam() == 8 ? 10 : 30, {.num_ranks = {GetParam()}});
}

TEST_P(LowLatencyRanks, ScenariosAgreeWithoutTheRaceDetector) {
  expect_low_latency(1001, GetParam() == 8 ? 1004 : 1010, {.num_ranks = {GetParam()}}, false);
}

TEST_P(LowLatencyRanks, TwoGroupsAtOnce) {
  expect_low_latency(2001,
                     GetParam() == 8 ? 2002 : 2008,
                     {.num_ranks = {GetParam()}, .max_tokens = 10, .steps = 2, .groups = 2});
}

INSTANTIATE_TEST_SUITE_P(OneDomain,
                         LowLatencyRanks,
                         testing::Values(1, 2, 3, 4, 8),
                         [](const auto& info) { return "R" + std::to_string(info.param); });

ScenarioStep step_of(const EpShape& shape, int64_t hidden, DType dtype) {
  using enum OpKind;
  ScenarioStep step;
  step.ops = {kPlanDispatch, kCombine, kPlanDispatch, kCombine};
  step.options.shape = shape;
  step.options.shape.recv_capacity = worst_case_capacity(shape);
  step.options.hidden = hidden;
  step.options.dtype = dtype;
  step.options.scalars = false;  // a combine of scalars is no low-latency one
  return step;
}

Scenario alone(const ScenarioStep& step) {
  const int64_t tokens = std::max<int64_t>(step.options.shape.num_tokens, 1);
  return {.groups = {{.max_tokens = tokens, .low_latency_tokens = tokens, .steps = {step}}}};
}

// More runs of tokens than warps, packets of experts that begin within a token, and all lanes.
TEST(LowLatency, ManyExpertsAndSelections) {
  for (const Layout layout : {Layout::kExpert, Layout::kRank}) {
    for (const int32_t num_topk : {32, 11, 7}) {
      const EpShape shape{.num_ranks = 2,
                          .num_experts = 288,
                          .num_topk = num_topk,
                          .num_tokens = 13,
                          .expert_alignment = layout == Layout::kExpert ? 3 : 1,
                          .layout = layout};
      ScenarioStep step = step_of(shape, 16, DType::kFloat32);
      step.options.scalars = num_topk == 7;
      expect_ok(alone(step));
    }
  }
}

TEST(LowLatency, AsManySelectionsAndBinsAsFit) {
  const EpShape shape{.num_ranks = 2,
                      .num_experts = kMaxLowLatencyBins,
                      .num_topk = 32,
                      .num_tokens = kMaxLowLatencyTokens};
  ASSERT_EQ(shape.num_ranks * shape.num_tokens * shape.num_topk, kMaxLowLatencySelections);
  ScenarioStep step = step_of(shape, 8, DType::kBFloat16);
  step.ops = {OpKind::kPlanDispatch};
  expect_ok(alone(step));
}

// Full segments, short ones, packets that are not full, and more ranks' sums than are asked for at
// once.
TEST(LowLatency, RowsOfManySegments) {
  for (const Layout layout : {Layout::kExpert, Layout::kRank}) {
    const EpShape shape{
        .num_ranks = 4, .num_experts = 8, .num_topk = 6, .num_tokens = 3, .layout = layout};
    for (const DType dtype : {DType::kBFloat16, DType::kFloat32}) {
      for (const int64_t hidden : {1536, 3088, 24}) expect_ok(alone(step_of(shape, hidden, dtype)));
    }
  }
}

TEST(LowLatency, RowsInFp8) {
  using enum RowFormat;
  const EpShape shape{.num_ranks = 2, .num_experts = 8, .num_topk = 3, .num_tokens = 4};
  for (const DType dtype : {DType::kBFloat16, DType::kFloat32}) {
    for (const int64_t hidden : {1552, 512, 16}) {
      for (const RowFormat x : {kDType, kFloat8E4M3}) {
        for (const RowFormat rows : {kDType, kFloat8E4M3}) {
          ScenarioStep step = step_of(shape, hidden, dtype);
          step.options.wire = Wire::kFloat8E4M3;
          step.x_format = x;
          step.rows_format = rows;
          expect_ok(alone(step));
        }
      }
    }
  }
}

TEST(LowLatency, RowsAreDropped) {
  for (const Layout layout : {Layout::kExpert, Layout::kRank}) {
    for (const int64_t capacity : {1, 5, 17}) {
      const EpShape shape{
          .num_ranks = 2, .num_experts = 8, .num_topk = 6, .num_tokens = 9, .layout = layout};
      ScenarioStep step = step_of(shape, 24, DType::kBFloat16);
      step.options.shape.recv_capacity = capacity;
      expect_ok(alone(step));
    }
  }
}

TEST(LowLatency, NoRankHasATokenAndThenAllHave) {
  EpShape shape{.num_ranks = 3, .num_experts = 6, .num_topk = 2, .num_tokens = 0};
  const ScenarioStep none = step_of(shape, 16, DType::kFloat32);
  shape.num_tokens = 5;
  const ScenarioStep some = step_of(shape, 16, DType::kFloat32);
  expect_ok(
      {.groups = {{.max_tokens = 5, .low_latency_tokens = 5, .steps = {none, some, none, some}}}});
}

// Between calls of more tokens, which have staging and epochs of their own.
TEST(LowLatency, BothKindsOfCallsByTurns) {
  EpShape shape{.num_ranks = 3, .num_experts = 6, .num_topk = 2, .num_tokens = 2};
  const ScenarioStep few = step_of(shape, 16, DType::kBFloat16);
  shape.num_tokens = 9;
  const ScenarioStep many = step_of(shape, 16, DType::kBFloat16);
  for (uint64_t seed = 1; seed <= schedules(10); ++seed) {
    expect_ok({.groups = {{.max_tokens = 9,
                           .low_latency_tokens = 4,
                           .steps = {few, many, few, many, few}}}},
              seed);
  }
}

// Packets of tokens that only large calls have lie unused meanwhile.
TEST(LowLatency, EpochsMayWrapAround) {
  EpShape shape{.num_ranks = 2, .num_experts = 4, .num_topk = 2, .num_tokens = 6};
  const ScenarioStep large = step_of(shape, 16, DType::kFloat32);
  shape.num_tokens = 1;
  const ScenarioStep small = step_of(shape, 16, DType::kFloat32);
  for (const uint32_t epoch : {0x7FFF'FFFDU,
                               0x7FFF'FFFEU,
                               0xFFFF'FFFDU,
                               0xFFFF'FFFFU,
                               kClearBankEvery - 3,
                               kClearBankEvery - 1,
                               kClearBankEvery}) {
    Scenario scenario{
        .groups = {{.max_tokens = 6, .low_latency_tokens = 6, .steps = {large, small, large}}}};
    scenario.first_epoch = epoch;
    expect_ok(scenario);
  }
}

// When the flags begin anew, no packet is left that had one of them before.
TEST(LowLatency, APacketIsNotTakenForOneOfTheSameFlag) {
  EpShape shape{.num_ranks = 2, .num_experts = 4, .num_topk = 2, .num_tokens = 1};
  const ScenarioStep small = step_of(shape, 16, DType::kFloat32);  // four exchanges
  shape.num_tokens = 6;
  const ScenarioStep large = step_of(shape, 16, DType::kFloat32);
  for (const uint32_t exchange : {1, 2, 3, 4}) {
    Scenario scenario{
        .groups = {{.max_tokens = 6, .low_latency_tokens = 6, .steps = {small, large}}}};
    scenario.first_epoch = kClearBankEvery - 1;
    scenario.stale_packets = scenario.first_epoch + 4 + exchange;
    expect_ok(scenario);
  }
}

// A first half waits for nobody: ranks end it though one never comes to it.
TEST(LowLatency, AFirstHalfWaitsForNobody) {
  using enum OpKind;
  const EpShape shape{.num_ranks = 3, .num_experts = 6, .num_topk = 2, .num_tokens = 5};
  for (const OpKind op : {kPlanDispatch, kCombine}) {
    ScenarioStep step = step_of(shape, 16, DType::kBFloat16);
    // Its bank has been used before.
    step.ops = {kPlanDispatch, kCombine, kCombine, kCombine, kCombine, {op, Half::kFirst}};
    Scenario scenario = alone(step);
    scenario.mishap = Mishap::kMissing;
    expect_ok(scenario);
  }
}

// Two batches by turns, as a model that overlaps them has it: a flight of each is always open.
TEST(LowLatency, TwoFlightsByTurns) {
  using enum OpKind;
  using enum Half;
  const EpShape shape{.num_ranks = 3, .num_experts = 6, .num_topk = 3, .num_tokens = 4};
  ScenarioStep step = step_of(shape, 24, DType::kBFloat16);
  step.ops = {{kPlanDispatch, kFirst, 0}, {kPlanDispatch, kSecond, 0}};
  for (int layer = 0; layer < 4; ++layer) {
    step.ops.insert(step.ops.end(),
                    {{kPlanDispatch, kFirst, 1},
                     {kCombine, kFirst, 0},
                     {kPlanDispatch, kSecond, 1},
                     {kCombine, kSecond, 0},
                     {kPlanDispatch, kFirst, 0},
                     {kCombine, kFirst, 1},
                     {kPlanDispatch, kSecond, 0},
                     {kCombine, kSecond, 1}});
  }
  for (uint64_t seed = 1; seed <= schedules(10); ++seed) {
    Scenario scenario = alone(step);
    scenario.first_epoch = 0xFFFF'FFF0;
    expect_ok(scenario, seed);
  }
}

// More ranks than a warp has lanes.
TEST(LowLatency, MoreRanksThanLanes) { expect_low_latency(1, 2, {.num_ranks = {33}}); }

}  // namespace
}  // namespace jax_ep
