// SPDX-License-Identifier: Apache-2.0
// The kernels between domains on the simulator and its network: random scenarios, and the problems
// that random ones would miss.
#include <gtest/gtest.h>

#include <string>

#include "csrc/core/counts_plan.h"
#include "csrc/kernels/tests/expect_scenarios.h"

namespace jax_ep {
namespace {

void expect_internode(uint64_t first, uint64_t last, ScenarioLimits limits, bool races = true) {
  limits.internode = true;
  expect_scenarios(first, last, limits, races);
}

TEST(Internode, ScenariosAgreeWithTheCpuBackend) { expect_internode(1, 60, {}); }
TEST(Internode, MoreScenariosAgreeWithTheCpuBackend) { expect_internode(61, 120, {}); }

TEST(Internode, ScenariosAgreeWithoutTheRaceDetector) { expect_internode(1001, 1020, {}, false); }

TEST(Internode, TwoGroupsAtOnce) {
  expect_internode(2001, 2012, {.max_tokens = 8, .steps = 2, .groups = 2});
}

Scenario scenario_of(const Domains& domains, const EpShape& shape, int64_t hidden, DType dtype) {
  using enum OpKind;
  const ScenarioStep step = step_between(
      domains, shape, hidden, dtype, {kPlan, kDispatch, kCombine, kDispatch, kCombine});
  return {.groups = {{.max_tokens = std::max<int64_t>(shape.num_tokens, 1),
                      .num_domains = domains.count,
                      .rail_chunk_tokens = 4,
                      .steps = {step}}}};
}

// Up to eight domains of up to eight ranks; a domain's ranks share a token's selections.
TEST(Internode, ManyDomainsAndManyRanks) {
  for (const Domains domains : {Domains{8, 2}, Domains{2, 8}, Domains{4, 4}, Domains{3, 5}}) {
    for (const Layout layout : {Layout::kExpert, Layout::kRank}) {
      const EpShape shape{.num_experts = 2 * domains.count * domains.ranks,
                          .num_topk = 8,
                          .num_tokens = 5,
                          .layout = layout};
      Scenario scenario = scenario_of(domains, shape, 24, DType::kBFloat16);
      scenario.blocks = 1;
      expect_ok(scenario);
    }
  }
}

// Each kind of row, and rings of one buffer, so that every chunk waits for the last one's credit.
TEST(Internode, AllKindsOfRowsThroughOneBuffer) {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    for (const int64_t hidden : {0, 7, 64, 1544}) {
      const EpShape shape{.num_experts = 8, .num_topk = 3, .num_tokens = 9};
      Scenario scenario = scenario_of({2, 2}, shape, hidden, dtype);
      scenario.groups[0].window = scenario.groups[0].gather_units = 1;
      expect_ok(scenario);
    }
  }
}

TEST(Internode, RowsInFp8) {
  using enum RowFormat;
  for (const int64_t hidden : {16, 130, 1152}) {
    for (const RowFormat x : {kDType, kFloat8E4M3}) {
      for (const RowFormat rows : {kDType, kFloat8E4M3}) {
        const EpShape shape{.num_experts = 8, .num_topk = 4, .num_tokens = 6};
        Scenario scenario = scenario_of({2, 2}, shape, hidden, DType::kBFloat16);
        ScenarioStep& step = scenario.groups[0].steps[0];
        step.options.wire = Wire::kFloat8E4M3;
        step.x_format = x;
        step.rows_format = rows;
        expect_ok(scenario);
      }
    }
  }
}

TEST(Internode, NoTokensAndNoSelections) {
  for (const int64_t tokens : {0, 1}) {
    const EpShape shape{.num_experts = 3, .num_topk = 1, .num_tokens = tokens};
    for (uint64_t seed = 1; seed <= schedules(3); ++seed) {
      Scenario scenario = scenario_of({3, 1}, shape, 16, DType::kFloat32);
      scenario.groups[0].steps[0].options.seed = static_cast<uint32_t>(seed);
      expect_ok(scenario, seed);
    }
  }
}

// Numbers of messages pass 2^32, of which words have the low half.
TEST(Internode, CountsWrapAround) {
  for (const uint64_t message : {uint64_t{0xFFFF'FFFD}, uint64_t{0xFFFF'FFFF}, ~uint64_t{0} >> 8}) {
    const EpShape shape{.num_experts = 4, .num_topk = 2, .num_tokens = 11};
    Scenario scenario = scenario_of({2, 2}, shape, 16, DType::kFloat32);
    scenario.first_message = message;
    expect_ok(scenario);
  }
}

// --- plans by counts -----------------------------------------------------------------------------

void expect_by_counts(uint64_t first, uint64_t last, ScenarioLimits limits, bool races = true) {
  limits.plans_by_counts = true;
  expect_internode(first, last, limits, races);
}

TEST(CountsPlan, ScenariosAgreeWithTheCpuBackend) { expect_by_counts(1, 30, {}); }
TEST(CountsPlan, MoreScenariosAgreeWithTheCpuBackend) { expect_by_counts(31, 60, {}); }

TEST(CountsPlan, ScenariosAgreeWithoutTheRaceDetector) {
  expect_by_counts(1001, 1012, {}, /*races=*/false);
}

TEST(CountsPlan, TwoGroupsAtOnce) {
  expect_by_counts(2001, 2006, {.max_tokens = 8, .steps = 2, .groups = 2});
}

// All arrays of both kinds of plan are the CPU backend's: so each has those of the other.
void expect_ok_by_both(Scenario scenario, uint64_t seed = 1) {
  for (const bool by_counts : {false, true}) {
    for (GroupScenario& group : scenario.groups) group.plans_by_counts = by_counts;
    expect_ok(scenario, seed);
  }
}

TEST(CountsPlan, ManyDomainsAndManyRanks) {
  for (const Domains domains : {Domains{8, 2}, Domains{2, 8}, Domains{3, 5}, Domains{16, 1}}) {
    for (const Layout layout : {Layout::kExpert, Layout::kRank}) {
      const EpShape shape{.num_experts = 2 * domains.count * domains.ranks,
                          .num_topk = 8,
                          .num_tokens = 5,
                          .layout = layout};
      Scenario scenario = scenario_of(domains, shape, 0, DType::kFloat32);
      ScenarioStep& step = scenario.groups[0].steps[0];
      step.ops = {OpKind::kPlan};
      step.options.scalars = false;
      scenario.blocks = 1;
      expect_ok_by_both(scenario);
    }
  }
}

// Buffers of 128 bytes, and one of them in a ring: counts and runs go in several messages, of which
// each waits for the credit of the one before. Of several tiles, with all kinds of drops.
TEST(CountsPlan, ManyMessagesThroughOneBuffer) {
  for (const Layout layout : {Layout::kExpert, Layout::kRank}) {
    for (const int64_t capacity : {0, 1, 37, 300}) {
      const EpShape shape{.num_experts = 36, .num_topk = 2, .num_tokens = 70, .layout = layout};
      Scenario scenario = scenario_of({2, 2}, shape, 0, DType::kFloat32);
      GroupScenario& group = scenario.groups[0];
      group.window = group.gather_units = group.rail_chunk_tokens = 1;
      EpShape& of_step = group.steps[0].options.shape;
      if (capacity > 0) of_step.recv_capacity = capacity;
      if (layout == Layout::kExpert) of_step.expert_alignment = 4;
      const NetworkShape network = network_shape(group);
      NetworkShape by_counts = network;
      by_counts.plans_by_counts = true;
      const CountsPlanMessages messages =
          counts_plan_messages(make_network_layout(by_counts), network.topology, of_step);
      EXPECT_GT(messages.counts, 1);
      EXPECT_GT(messages.runs, 2);
      expect_ok_by_both(scenario);
    }
  }
}

// More tiles of a rank's tokens than a warp has lanes.
TEST(CountsPlan, ManyTokens) {
  for (const Layout layout : {Layout::kExpert, Layout::kRank}) {
    const EpShape shape{.num_experts = 6, .num_topk = 3, .num_tokens = 301, .layout = layout};
    Scenario scenario = scenario_of({2, 1}, shape, 0, DType::kFloat32);
    scenario.groups[0].steps[0].ops = {OpKind::kPlan};
    expect_ok_by_both(scenario);
  }
}

// Calls with more tokens, fewer and none, and what their plans are for between them.
TEST(CountsPlan, NumbersOfTokensFollowEachOther) {
  for (const Layout layout : {Layout::kExpert, Layout::kRank}) {
    const EpShape shape{.num_experts = 12, .num_topk = 3, .num_tokens = 40, .layout = layout};
    Scenario scenario = scenario_of({3, 2}, shape, 0, DType::kFloat32);
    ScenarioStep step = scenario.groups[0].steps[0];
    step.options.scalars = false;
    std::vector<ScenarioStep>& steps = scenario.groups[0].steps;
    steps.clear();
    for (const int64_t tokens : {40, 0, 1, 9, 0, 33}) {
      step.options.shape.num_tokens = tokens;
      step.options.shape.recv_capacity =
          std::max<int64_t>(worst_case_capacity(step.options.shape), 1);
      step.ops = {OpKind::kPlan, OpKind::kDispatch, OpKind::kCombine, OpKind::kPlan};
      steps.push_back(step);
    }
    expect_ok_by_both(scenario);
  }
}

// --- what goes wrong -----------------------------------------------------------------------------

Scenario with_mishap(Mishap mishap, OpKind op, int32_t rank) {
  const EpShape shape{.num_experts = 8, .num_topk = 4, .num_tokens = 9};
  Scenario scenario = scenario_of({2, 2}, shape, 16, DType::kFloat32);
  std::vector<ScenarioOp>& ops = scenario.groups[0].steps[0].ops;
  ops = {OpKind::kPlan, OpKind::kDispatch, OpKind::kCombine, op};
  scenario.mishap = mishap;
  scenario.rank = rank;
  return scenario;
}

TEST(Internode, WhoIsOnTheRailOfAMissingRankNamesIt) {
  constexpr int32_t kMissingRank = 3;
  constexpr size_t kRailPeer = 1;
  for (const OpKind op : {OpKind::kPlan, OpKind::kDispatch, OpKind::kCombine}) {
    const Outcome outcome = run_scenario(with_mishap(Mishap::kMissing, op, kMissingRank), 1);
    EXPECT_EQ(outcome.report.kind, "trap");
    const ErrorRecord& record = outcome.errors[kRailPeer];
    ASSERT_NE(record.written, 0U) << name(op);
    // Or it was told of it by its neighbor, who waited for what the rank was to send.
    const auto tag = static_cast<WaitTag>(record.tag);
    const auto blamed = tag == WaitTag::kPeerGaveUp ? unpack_aborted(record.detail).blamed
                                                    : static_cast<uint32_t>(record.peer);
    EXPECT_EQ(blamed, static_cast<uint32_t>(kMissingRank)) << name(op) << ", tag " << record.tag;
  }
}

// The host would see it: all that is known of a kernel that does not come back from the network.
TEST(Internode, AKernelThatDoesNotEndHasToldThatItRuns) {
  for (const OpKind op : {OpKind::kPlan, OpKind::kDispatch, OpKind::kCombine}) {
    const Outcome outcome = run_scenario(with_mishap(Mishap::kMissing, op, 3), 1);
    for (size_t rank = 0; rank < 4; ++rank) {
      const KernelPhase phase = outcome.phases[rank][static_cast<size_t>(Channel::kHighThroughput)];
      const bool runs = rank != 3;
      EXPECT_EQ(phase.running, runs) << name(op) << ", rank " << rank;
      EXPECT_EQ(phase.epoch, runs ? 4U : 3U) << name(op) << ", rank " << rank;
      EXPECT_EQ(phase.op, static_cast<uint32_t>(runs ? op : OpKind::kCombine)) << name(op);
    }
  }
}

TEST(Internode, AnotherOperationIsNoticedAcrossDomains) {
  Scenario scenario = with_mishap(Mishap::kOtherOp, OpKind::kDispatch, 3);
  scenario.other_op = OpKind::kCombine;
  const Outcome outcome = run_scenario(scenario, 1);
  bool noticed = false;
  for (const ErrorRecord& record : outcome.errors) {
    noticed |= record.written != 0 && static_cast<WaitTag>(record.tag) == WaitTag::kWrongOp;
  }
  EXPECT_TRUE(noticed);
}

TEST(Internode, AHandleThatNoPlanMadeLeavesItsBuffersAlone) {
  for (uint64_t seed = 1; seed <= schedules(10); ++seed) {
    for (const OpKind op : {OpKind::kDispatch, OpKind::kCombine}) {
      Scenario scenario = with_mishap(Mishap::kHostileHandle, op, 0);
      scenario.groups[0].steps[0].options.seed = static_cast<uint32_t>(seed);
      scenario.check_races = false;
      const std::string kind = run_scenario(scenario, seed).report.kind;
      EXPECT_TRUE(kind.empty() || kind == "uninitialized")
          << name(op) << " " << seed << ": " << kind;
    }
  }
}

// All ranks of a domain claim every token, which no plan lets them: more than a message has room
// for.
TEST(Internode, MoreHoldersThanAMessageHasRoomForLeaveItsBuffersAlone) {
  const EpShape shape{.num_experts = 32, .num_topk = 2, .num_tokens = 7};
  for (uint64_t seed = 1; seed <= schedules(6); ++seed) {
    Scenario scenario = scenario_of({2, 8}, shape, 16, DType::kFloat32);
    scenario.groups[0].rail_chunk_tokens = 7;
    scenario.groups[0].window = 1;
    ScenarioStep& step = scenario.groups[0].steps[0];
    step.options.seed = static_cast<uint32_t>(seed);
    step.ops = {OpKind::kPlan, OpKind::kDispatch, OpKind::kCombine, OpKind::kCombine};
    scenario.mishap = Mishap::kHostileHandle;
    scenario.check_races = false;
    scenario.blocks = 1;
    const std::string kind = run_scenario(scenario, seed).report.kind;
    EXPECT_TRUE(kind.empty() || kind == "uninitialized") << seed << ": " << kind;
  }
}

TEST(Internode, AClosedGroupLeavesNoResults) {
  for (const OpKind op : {OpKind::kPlan, OpKind::kDispatch, OpKind::kCombine}) {
    const Outcome outcome = run_scenario(with_mishap(Mishap::kClosed, op, 0), 1);
    EXPECT_TRUE(outcome.report.ok()) << outcome.report.text();
  }
}

}  // namespace
}  // namespace jax_ep
