// SPDX-License-Identifier: Apache-2.0
// The low-latency kernels between domains on the simulator and its network: random scenarios, and
// the problems that random ones would miss.
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "csrc/kernels/tests/expect_scenarios.h"

namespace jax_ep {
namespace {

using enum OpKind;

void expect_far(uint64_t first, uint64_t last, ScenarioLimits limits, bool races = true) {
  limits.internode = true;
  limits.low_latency = true;
  expect_scenarios(first, last, limits, races);
}

TEST(InternodeLowLatency, ScenariosAgreeWithTheCpuBackend) { expect_far(1, 50, {}); }
TEST(InternodeLowLatency, ScenariosAgreeWithoutTheRaceDetector) {
  expect_far(1001, 1015, {}, false);
}
TEST(InternodeLowLatency, TwoGroupsAtOnce) {
  expect_far(2001, 2010, {.max_tokens = 8, .steps = 2, .groups = 2});
}

constexpr Domains kDomains[] = {{2, 1}, {2, 2}, {4, 1}, {2, 4}};

ScenarioStep step_of(const Domains& domains, const EpShape& shape, int64_t hidden, DType dtype) {
  ScenarioStep step = step_between(
      domains, shape, hidden, dtype, {kPlanDispatch, kCombine, kPlanDispatch, kCombine});
  step.options.scalars = false;  // a combine of scalars is no low-latency one
  return step;
}

Scenario of_steps(const Domains& domains, const std::vector<ScenarioStep>& steps) {
  int64_t tokens = 1;
  for (const ScenarioStep& step : steps) {
    tokens = std::max(tokens, step.options.shape.num_tokens);
  }
  return {.groups = {{.max_tokens = tokens,
                      .low_latency_tokens = tokens,
                      .num_domains = domains.count,
                      .rail_chunk_tokens = 4,
                      .low_latency_chunk = 3,
                      .steps = steps}}};
}

EpShape shape_of_tokens(int64_t tokens, Layout layout = Layout::kExpert) {
  return {.num_experts = 16, .num_topk = 4, .num_tokens = tokens, .layout = layout};
}

// Rows in each dtype, of several segments; messages of a token, of some, and of all.
TEST(InternodeLowLatency, AllKindsOfRows) {
  for (const Domains& domains : kDomains) {
    for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
      for (const int64_t hidden : {8, 1544}) {
        const bool is_rank_major = dtype == DType::kFloat16;
        const EpShape shape = shape_of_tokens(5, is_rank_major ? Layout::kRank : Layout::kExpert);
        Scenario scenario = of_steps(domains, {step_of(domains, shape, hidden, dtype)});
        scenario.groups[0].low_latency_chunk = hidden == 8 ? 64 : 2;
        expect_ok(scenario);
      }
    }
  }
}

TEST(InternodeLowLatency, RowsInFp8) {
  using enum RowFormat;
  const Domains domains{2, 2};
  for (const int64_t hidden : {16, 528, 1552}) {
    for (const RowFormat x : {kDType, kFloat8E4M3}) {
      for (const RowFormat rows : {kDType, kFloat8E4M3}) {
        ScenarioStep step = step_of(domains, shape_of_tokens(4), hidden, DType::kBFloat16);
        step.options.wire = Wire::kFloat8E4M3;
        step.x_format = x;
        step.rows_format = rows;
        expect_ok(of_steps(domains, {step}));
      }
    }
  }
}

// Sums over the network's domains, over all ranks, over each, and over smaller and larger domains.
TEST(InternodeLowLatency, SumsOverAnyDomains) {
  const Domains domains{4, 2};
  for (const int32_t domain_size : {0, 1, 2, 4, 8}) {
    for (const Layout layout : {Layout::kExpert, Layout::kRank}) {
      EpShape shape = shape_of_tokens(4, layout);
      shape.num_topk = 8;
      ScenarioStep step = step_of(domains, shape, 24, DType::kBFloat16);
      step.options.domain_size = domain_size;
      Scenario scenario = of_steps(domains, {step});
      scenario.blocks = 1;
      expect_ok(scenario);
    }
  }
}

// A row is sent before it is known that there is no room for it; it must be waited for all the
// same.
TEST(InternodeLowLatency, RowsAreDropped) {
  for (const Domains& domains : kDomains) {
    for (const int64_t capacity : {1, 5}) {
      ScenarioStep step = step_of(domains, shape_of_tokens(7), 24, DType::kBFloat16);
      step.options.shape.recv_capacity = capacity;
      step.options.scalars = capacity == 5;
      if (step.options.scalars) step.ops = {kPlanDispatch, kPlanDispatch, kPlanDispatch};
      expect_ok(of_steps(domains, {step}));
    }
  }
}

// Messages of rows are of the tokens of a call, and all calls have a first message.
TEST(InternodeLowLatency, CallsOfNoTokenOfSomeAndOfAll) {
  for (const Domains& domains : kDomains) {
    std::vector<ScenarioStep> steps;
    for (const int64_t tokens : {0, 5, 0, 0, 1, 8, 1, 5}) {
      steps.push_back(step_of(domains, shape_of_tokens(tokens), 16, DType::kFloat32));
      steps.back().ops = {kPlanDispatch, kCombine};
    }
    expect_ok(of_steps(domains, steps));
  }
}

// Between calls of more tokens, whose messages go by the rails.
TEST(InternodeLowLatency, BothKindsOfCallsByTurns) {
  const Domains domains{2, 2};
  const ScenarioStep few = step_of(domains, shape_of_tokens(2), 16, DType::kBFloat16);
  const ScenarioStep many = step_of(domains, shape_of_tokens(9), 16, DType::kBFloat16);
  for (uint64_t seed = 1; seed <= schedules(6); ++seed) {
    Scenario scenario = of_steps(domains, {few, many, few, many, few});
    scenario.groups[0].low_latency_tokens = 4;
    expect_ok(scenario, seed);
  }
}

// A first half does it all.
TEST(InternodeLowLatency, HalvesAreInOnePiece) {
  using enum Half;
  const Domains domains{2, 2};
  ScenarioStep step = step_of(domains, shape_of_tokens(3), 16, DType::kBFloat16);
  step.ops = {{kPlanDispatch, kFirst},
              {kPlanDispatch, kSecond},
              {kCombine, kFirst, 1},
              {kPlanDispatch, kFirst},
              {kCombine, kSecond, 1},
              {kPlanDispatch, kSecond}};
  expect_ok(of_steps(domains, {step}));
}

// Once in a while all words are used, so that none is as old as its numbers are; the exchanges are
// around that, and around the end of their numbers.
TEST(InternodeLowLatency, EpochsMayWrapAround) {
  const Domains domains{2, 2};
  const ScenarioStep large = step_of(domains, shape_of_tokens(7), 16, DType::kFloat32);
  const ScenarioStep small = step_of(domains, shape_of_tokens(1), 16, DType::kFloat32);
  for (const uint32_t epoch : {0x7FFF'FFFDU,
                               0xFFFF'FFFDU,
                               0xFFFF'FFFFU,
                               kClearBankEvery - 3,
                               kClearBankEvery - 1,
                               kClearBankEvery}) {
    Scenario scenario = of_steps(domains, {large, small, large});
    scenario.first_epoch = epoch;
    expect_ok(scenario);
  }
}

// A word that nobody has used for as many exchanges as there are numbers would say that a message
// is there.
TEST(InternodeLowLatency, AWordIsNotTakenForOneOfTheSameExchange) {
  const Domains domains{2, 2};
  const ScenarioStep small = step_of(domains, shape_of_tokens(1), 16, DType::kFloat32);
  const ScenarioStep large = step_of(domains, shape_of_tokens(7), 16, DType::kFloat32);
  for (const uint32_t exchange : {1, 2, 3, 4}) {
    Scenario scenario = of_steps(domains, {small, large});
    scenario.first_epoch = kClearBankEvery - 1;
    scenario.stale_packets = scenario.first_epoch + 4 + exchange;
    expect_ok(scenario);
  }
}

// --- what goes wrong -----------------------------------------------------------------------------

Scenario with_mishap(Mishap mishap, OpKind op, int32_t rank) {
  const Domains domains{2, 2};
  ScenarioStep step = step_of(domains, shape_of_tokens(6), 16, DType::kFloat32);
  step.ops = {kPlanDispatch, kCombine, op};
  Scenario scenario = of_steps(domains, {step});
  scenario.mishap = mishap;
  scenario.rank = rank;
  return scenario;
}

// All ranks wait for it themselves, and for nobody else.
TEST(InternodeLowLatency, AMissingRankIsNamedByAll) {
  constexpr uint32_t kMissingRank = 3;
  for (const OpKind op : {kPlanDispatch, kCombine}) {
    const Outcome outcome = run_scenario(with_mishap(Mishap::kMissing, op, kMissingRank), 1);
    EXPECT_EQ(outcome.report.kind, "trap");
    for (size_t rank = 0; rank < kMissingRank; ++rank) {
      const ErrorRecord& record = outcome.errors[rank];
      ASSERT_NE(record.written, 0U) << name(op) << ", rank " << rank;
      const auto tag = static_cast<WaitTag>(record.tag);
      const uint32_t blamed =
          tag == WaitTag::kPeerGaveUp ? unpack_aborted(record.detail).blamed : record.peer;
      EXPECT_EQ(blamed, kMissingRank) << describe(record, 1);
    }
  }
}

// As for the other kernels between domains: the host would see it.
TEST(InternodeLowLatency, AKernelThatDoesNotEndHasToldThatItRuns) {
  for (const OpKind op : {kPlanDispatch, kCombine}) {
    const Outcome outcome = run_scenario(with_mishap(Mishap::kMissing, op, 3), 1);
    for (size_t rank = 0; rank < 4; ++rank) {
      const KernelPhase phase = outcome.phases[rank][static_cast<size_t>(Channel::kLowLatency)];
      const bool runs = rank != 3;
      EXPECT_EQ(phase.running, runs) << name(op) << ", rank " << rank;
      EXPECT_EQ(phase.epoch, runs ? 3U : 2U) << name(op) << ", rank " << rank;
      EXPECT_EQ(phase.op, static_cast<uint32_t>(runs ? op : kCombine)) << name(op);
    }
  }
}

// The rank that is late is of the other domain, and is waited for.
TEST(InternodeLowLatency, ALateRankIsReported) {
  for (const OpKind op : {kPlanDispatch, kCombine}) {
    const Outcome outcome = run_scenario(with_mishap(Mishap::kLate, op, 3), 1);
    EXPECT_TRUE(outcome.report.ok()) << outcome.report.text();
    EXPECT_GE(outcome.long_waits[0].level, 1U);
    EXPECT_TRUE(outcome.long_waits[0].ended);
  }
}

// What a rank says when rank 3 is in another call: so, or that it waits for one of rank 3's domain,
// which has noticed before it had sent all.
bool is_right(const ErrorRecord& record, WaitTag expected) {
  const auto tag = static_cast<WaitTag>(record.tag);
  if (record.written == 0 || tag == WaitTag::kPeerGaveUp) return true;
  if (tag == expected) return record.peer == 3 || record.rank == 3;
  return record.peer >= 2 &&
         (tag == WaitTag::kDelivered || tag == WaitTag::kPacket || tag == WaitTag::kArrived);
}

TEST(InternodeLowLatency, AnotherCallIsNoticedAcrossDomains) {
  for (const Mishap mishap : {Mishap::kOtherOp, Mishap::kOtherCallSite, Mishap::kOtherTokens}) {
    for (const OpKind op : {kPlanDispatch, kCombine}) {
      Scenario scenario = with_mishap(mishap, op, 3);
      scenario.other_op = op == kCombine ? kPlanDispatch : kCombine;
      const WaitTag expected = mishap == Mishap::kOtherOp ? WaitTag::kWrongOp : WaitTag::kWrongCall;
      bool noticed = false;
      for (uint64_t seed = 1; seed <= 6; ++seed) {
        const Outcome outcome = run_scenario(scenario, seed);
        EXPECT_EQ(outcome.report.kind, "trap");
        for (const ErrorRecord& record : outcome.errors) {
          EXPECT_TRUE(is_right(record, expected)) << describe(record, 1);
          noticed |= record.written != 0 && static_cast<WaitTag>(record.tag) == expected &&
                     record.rank / 2 != record.peer / 2;
        }
      }
      EXPECT_TRUE(noticed) << name(mishap) << " " << name(op);
    }
  }
}

TEST(InternodeLowLatency, AHandleThatNoPlanMadeLeavesItsBuffersAlone) {
  for (uint64_t seed = 1; seed <= schedules(12); ++seed) {
    Scenario scenario = with_mishap(Mishap::kHostileHandle, kCombine, 0);
    scenario.groups[0].steps[0].options.seed = static_cast<uint32_t>(seed);
    // Rows of one segment, and of several.
    if (seed % 2 == 0) scenario.groups[0].steps[0].options.hidden = 1544;
    scenario.check_races = false;
    const Outcome outcome = run_scenario(scenario, seed);
    // Or it waits for packets of its domain that nobody sends; never for a message.
    const std::string& kind = outcome.report.kind;
    EXPECT_TRUE(kind.empty() || kind == "uninitialized" || kind == "trap") << seed << ": " << kind;
    for (const ErrorRecord& record : outcome.errors) {
      EXPECT_NE(static_cast<WaitTag>(record.tag), WaitTag::kDelivered) << describe(record, 1);
    }
  }
}

TEST(InternodeLowLatency, AClosedGroupLeavesNoResults) {
  for (const OpKind op : {kPlanDispatch, kCombine}) {
    const Outcome outcome = run_scenario(with_mishap(Mishap::kClosed, op, 0), 1);
    EXPECT_TRUE(outcome.report.ok()) << outcome.report.text();
  }
}

}  // namespace
}  // namespace jax_ep
