// SPDX-License-Identifier: Apache-2.0
// Ranks that take no part, others in each step: they make the calls and say so, and nobody waits
// for them or touches their heaps. A rank that comes back meets the others where they are.
#include <gtest/gtest.h>

#include <cstdint>
#include <string>
#include <vector>

#include "csrc/kernels/tests/expect_scenarios.h"
#include "csrc/testing/run_scenario.h"

namespace jax_ep {
namespace {

class MaskedRanks : public testing::TestWithParam<int32_t> {};

TEST_P(MaskedRanks, ScenariosAgreeWithTheCpuBackend) {
  expect_scenarios(
      1, GetParam() == 8 ? 8 : 30, {.num_ranks = {GetParam()}, .steps = 4, .masks = true});
}

TEST_P(MaskedRanks, LowLatencyScenariosAgreeWithTheCpuBackend) {
  expect_scenarios(
      1,
      GetParam() == 8 ? 6 : 30,
      {.num_ranks = {GetParam()}, .max_tokens = 8, .steps = 4, .low_latency = true, .masks = true});
}

TEST_P(MaskedRanks, ScenariosAgreeWithoutTheRaceDetector) {
  const ScenarioLimits limits{.num_ranks = {GetParam()}, .steps = 4, .masks = true};
  expect_scenarios(1001, GetParam() == 8 ? 1002 : 1008, limits, false);
}

INSTANTIATE_TEST_SUITE_P(OneDomain, MaskedRanks, testing::Values(2, 3, 4, 8), [](const auto& info) {
  return "R" + std::to_string(info.param);
});

// Steps of three ranks without those of `sitting_out`, as bits, each of these operations.
Scenario steps_without(const std::vector<uint64_t>& sitting_out,
                       const std::vector<ScenarioOp>& ops) {
  GroupScenario group;
  group.max_tokens = 6;
  uint32_t seed = 1;
  for (const uint64_t out : sitting_out) {
    ScenarioStep step;
    step.ops = ops;
    step.options.shape = {.num_ranks = 3, .num_experts = 6, .num_topk = 3, .num_tokens = 5};
    step.options.shape.recv_capacity = worst_case_capacity(step.options.shape);
    step.options.hidden = 16;
    step.options.seed = seed++;
    step.options.sitting_out = out;
    group.steps.push_back(step);
  }
  return {.groups = {group}};
}

TEST(MaskedSteps, EachRankAloneAndAllTogether) {
  using enum OpKind;
  for (uint64_t seed = 1; seed <= schedules(6); ++seed) {
    expect_ok(steps_without({0, 1, 2, 4, 0}, {kPlan, kDispatch, kCombine}), seed);
    expect_ok(steps_without({6, 5, 3, 7, 0}, {kPlanDispatch, kCombine}), seed);
  }
}

// While a rank sits out, the others use all banks, and it may still read what one of them held.
TEST(MaskedSteps, BanksOfARankThatSitsOut) {
  using enum OpKind;
  for (uint64_t seed = 1; seed <= schedules(12); ++seed) {
    Scenario scenario = steps_without({0, 4, 0, 1, 1, 0}, {kPlanDispatch, kCombine, kCombine});
    scenario.groups[0].low_latency_tokens = 6;
    expect_ok(scenario, seed);
  }
}

}  // namespace
}  // namespace jax_ep
