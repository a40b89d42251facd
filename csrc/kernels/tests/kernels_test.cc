// SPDX-License-Identifier: Apache-2.0
// The kernels on the simulator: random scenarios of one and of two groups, ranks that never come,
// and the problems that random ones would miss.
#include <gtest/gtest.h>

#include <string>

#include "csrc/kernels/tests/expect_scenarios.h"
#include "csrc/testing/mishaps.h"
#include "csrc/testing/run_scenario.h"

namespace jax_ep {
namespace {

class Ranks : public testing::TestWithParam<int32_t> {};

TEST_P(Ranks, ScenariosAgreeWithTheCpuBackend) {
  expect_scenarios(1, GetParam() == 8 ? 12 : 30, {.num_ranks = {GetParam()}});
}

// Without the race detector a mistake must show as a wrong result, a bad address or a deadlock.
TEST_P(Ranks, ScenariosAgreeWithoutTheRaceDetector) {
  expect_scenarios(1001, GetParam() == 8 ? 1004 : 1010, {.num_ranks = {GetParam()}}, false);
}

TEST_P(Ranks, TwoGroupsAtOnce) {
  const bool many = GetParam() == 8;
  expect_scenarios(2001,
                   many ? 2002 : 2008,
                   {.num_ranks = {GetParam()}, .max_tokens = 10, .steps = 2, .groups = 2});
}

INSTANTIATE_TEST_SUITE_P(OneDomain, Ranks, testing::Values(1, 2, 3, 4, 8), [](const auto& info) {
  return "R" + std::to_string(info.param);
});

// Plans, dispatches and combines twice: in three exchanges, and with the plan in the dispatch.
ScenarioStep step_of(const EpShape& shape, int64_t hidden, DType dtype) {
  using enum OpKind;
  ScenarioStep step;
  step.ops = {kPlan, kDispatch, kCombine, kPlanDispatch, kCombine};
  step.options.shape = shape;
  step.options.shape.recv_capacity = worst_case_capacity(shape);
  step.options.hidden = hidden;
  step.options.dtype = dtype;
  return step;
}

Outcome run_alone(const ScenarioStep& step, uint64_t seed = 1) {
  return run_scenario(
      {.groups = {{.max_tokens = std::max<int64_t>(step.options.shape.num_tokens, 1),
                   .steps = {step}}}},
      seed);
}

TEST(Kernels, ManyTokensMakeSeveralTokensAChunkAndSeveralTiles) {
  const EpShape shape{.num_ranks = 2, .num_experts = 8, .num_topk = 2, .num_tokens = 300};
  ASSERT_GT(chunk_tokens(OpKind::kCombine, shape.num_tokens), 1);
  ASSERT_GT(num_tiles(shape.num_tokens, shape.num_ranks), 1);
  const Outcome outcome = run_alone(step_of(shape, 16, DType::kBFloat16));
  EXPECT_TRUE(outcome.report.ok()) << outcome.report.text();
}

TEST(Kernels, ManyExpertsAndSelections) {
  for (const Layout layout : {Layout::kExpert, Layout::kRank}) {
    const EpShape shape{.num_ranks = 2,
                        .num_experts = 288,
                        .num_topk = 32,
                        .num_tokens = 9,
                        .expert_alignment = layout == Layout::kExpert ? 3 : 1,
                        .layout = layout};
    const Outcome outcome = run_alone(step_of(shape, 8, DType::kFloat32));
    EXPECT_TRUE(outcome.report.ok()) << outcome.report.text();
  }
}

TEST(Kernels, RowsOfManySegments) {
  const EpShape shape{.num_ranks = 2, .num_experts = 4, .num_topk = 2, .num_tokens = 6};
  ScenarioStep step = step_of(shape, 6152, DType::kBFloat16);  // the last segment is short
  EXPECT_TRUE(run_alone(step).report.ok()) << run_alone(step).report.text();
  step.options.wire = Wire::kFloat8E4M3;
  step.options.hidden = 6160;
  EXPECT_TRUE(run_alone(step).report.ok()) << run_alone(step).report.text();
}

TEST(Kernels, RowsOfFullSegments) {
  for (const Layout layout : {Layout::kExpert, Layout::kRank}) {
    const EpShape shape{
        .num_ranks = 3, .num_experts = 12, .num_topk = 4, .num_tokens = 7, .layout = layout};
    const Outcome outcome = run_alone(step_of(shape, 2048, DType::kBFloat16));
    EXPECT_TRUE(outcome.report.ok()) << outcome.report.text();
  }
}

// Rows of several segments, each of several blocks of sums; of one; and of what is no whole vector.
TEST(Kernels, ProductsOfRows) {
  for (const Layout layout : {Layout::kExpert, Layout::kRank}) {
    const EpShape shape{
        .num_ranks = 2, .num_experts = 8, .num_topk = 5, .num_tokens = 6, .layout = layout};
    for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
      for (const int64_t hidden : {5128, 2048, 300, 8, 1051}) {
        ScenarioStep step = step_of(shape, hidden, dtype);
        step.options.row_weights = step.options.row_dots = true;
        step.options.zero_fill = hidden != 300;
        step.ops = {OpKind::kPlan, OpKind::kDispatch};
        const Outcome outcome = run_alone(step);
        EXPECT_TRUE(outcome.report.ok()) << describe(step.options) << outcome.report.text();
      }
    }
  }
}

TEST(Kernels, RowsThatDoNotTravel) {
  const EpShape shape{.num_ranks = 3, .num_experts = 6, .num_topk = 2, .num_tokens = 5};
  ScenarioStep step = step_of(shape, 0, DType::kFloat32);
  EXPECT_TRUE(run_alone(step).report.ok()) << run_alone(step).report.text();
  step.options.row_weights = step.options.row_dots = true;
  EXPECT_TRUE(run_alone(step).report.ok()) << run_alone(step).report.text();
}

TEST(Kernels, ASeedReproducesARun) {
  const Scenario scenario = random_scenario(7, {});
  const sim::Report first = run_scenario(scenario, 7).report;
  const sim::Report second = run_scenario(scenario, 7).report;
  EXPECT_EQ(first.steps, second.steps);
  EXPECT_EQ(first.switches, second.switches);
  EXPECT_EQ(first.text(), second.text());
}

// Small batches leave most flags alone, for as long as a server decodes; then a large one comes.
TEST(Kernels, EpochsMayWrapAround) {
  for (const uint32_t epoch : {0x1FFF'FFFFU,
                               0x2000'0000U,
                               0x3FFF'FFFEU,
                               0x3FFF'FFFFU,
                               0x7FFF'FFFFU,
                               0x8000'0000U,
                               0xFFFF'FFFEU,
                               0xFFFF'FFFFU}) {
    const EpShape shape{.num_ranks = 2, .num_experts = 4, .num_topk = 2, .num_tokens = 6};
    for (const bool fused : {false, true}) {
      ScenarioStep step = step_of(shape, 16, DType::kFloat32);
      if (fused) step.ops = {OpKind::kPlanDispatch, OpKind::kPlanDispatch, OpKind::kCombine};
      Scenario scenario{.groups = {{.max_tokens = 6, .steps = {step}}}};
      scenario.first_epoch = epoch;
      const Outcome outcome = run_scenario(scenario, 1);
      EXPECT_TRUE(outcome.report.ok()) << epoch << "\n" << outcome.report.text();
    }
  }
}

// Rows that find no room are sent all the same, where the plan is made at the same time. The
// scalars of those that do must lie where the receiver looks for them.
TEST(Kernels, RowsAreDroppedWhileTheirPlanIsMade) {
  for (const Layout layout : {Layout::kExpert, Layout::kRank}) {
    for (const int64_t capacity : {1, 5, 17}) {
      const EpShape shape{
          .num_ranks = 2, .num_experts = 8, .num_topk = 6, .num_tokens = 9, .layout = layout};
      ScenarioStep step = step_of(shape, 24, DType::kBFloat16);
      step.options.shape.recv_capacity = capacity;
      step.ops = {OpKind::kPlanDispatch, OpKind::kCombine};
      const Outcome outcome = run_alone(step);
      EXPECT_TRUE(outcome.report.ok()) << outcome.report.text();
    }
  }
}

// Routing and rows have as many chunks as there may be: their flags are not the same.
TEST(Kernels, RoutingAndRowsHaveTheirOwnFlags) {
  const EpShape shape{.num_ranks = 1, .num_experts = 1, .num_topk = 1, .num_tokens = kMaxChunks};
  ScenarioStep step = step_of(shape, 0, DType::kFloat32);
  step.ops = {OpKind::kPlanDispatch};
  const Scenario scenario{
      .groups = {{.max_tokens = kMaxChunks, .chunk_target = kMaxChunks, .steps = {step}}}};
  ASSERT_EQ(num_chunks(OpKind::kPlan, kMaxChunks, kMaxChunks), kMaxChunks);
  ASSERT_EQ(num_chunks(OpKind::kDispatch, kMaxChunks, kMaxChunks), kMaxChunks);
  const Outcome outcome = run_scenario(scenario, 1);
  EXPECT_TRUE(outcome.report.ok()) << outcome.report.text();
}

// More ranks than a warp has lanes: whatever a lane does for a peer takes a second turn.
TEST(Kernels, MoreRanksThanLanes) { expect_scenarios(1, 2, {.num_ranks = {33}}); }

// What goes wrong ends as it must, see mishaps.cc.
TEST(Kernels, Mishaps) {
  for (uint64_t seed = 1; seed <= schedules(6); ++seed) {
    for (const Scenario& scenario : all_mishaps(seed)) {
      EXPECT_EQ(verdict_on(scenario, run_scenario(scenario, seed)), "")
          << describe(scenario) << " seed " << seed;
    }
  }
}

}  // namespace
}  // namespace jax_ep
