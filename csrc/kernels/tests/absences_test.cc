// SPDX-License-Identifier: Apache-2.0
// Ranks that do not come, and what the others make of it: they leave them out, say so, and go on.
#include "csrc/testing/absences.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <string>
#include <tuple>
#include <vector>

#include "csrc/kernels/tests/expect_scenarios.h"

namespace jax_ep {
namespace {

using enum OpKind;

AbsenceStory story(int32_t num_ranks, Layout layout, std::vector<OpKind> ops) {
  AbsenceStory story;
  story.options.shape = {.num_ranks = num_ranks,
                         .num_experts = 2 * num_ranks,
                         .num_topk = 2,
                         .num_tokens = 3,
                         .layout = layout};
  story.options.shape.recv_capacity = worst_case_capacity(story.options.shape);
  story.options.hidden = 16;
  // A combine of scalars would not be a low-latency one.
  story.options.scalars = ops.back() != kCombine;
  story.ops = std::move(ops);
  return story;
}

TEST(Absences, StoriesEndAsTheyMust) {
  for (uint64_t seed = 1; seed <= schedules(40); ++seed) {
    const std::string wrong = run_stories(seed);
    ASSERT_EQ(wrong, "") << "seed " << seed;
  }
}

// The rank ends before each of its stores; the last time it has made all of them.
class KilledBeforeEachStore : public testing::TestWithParam<std::tuple<Layout, OpKind>> {};

TEST_P(KilledBeforeEachStore, RowsAreWholeOrNot) {
  const auto [layout, last] = GetParam();
  bool was_missing = false;
  for (uint64_t stores = 0;; ++stores) {
    AbsenceStory killed = story(3, layout, {kPlanDispatch, last});
    killed.options.seed = 5;
    killed.absences = {
        {.rank = 1, .exchange = 1, .kind = Absence::Kind::kKilled, .amount = stores}};
    const AbsenceOutcome outcome = run_story(killed, 100 + stores);
    ASSERT_TRUE(outcome.report.ok()) << stores << " stores: " << outcome.report.text();
    for (const uint64_t missing : {outcome.missing[1][0], outcome.missing[1][2]}) {
      was_missing = was_missing || missing != 0;
      ASSERT_TRUE(missing == 0 || (missing == 2 && outcome.killed)) << missing;
      ASSERT_TRUE(missing == 2 || stores > 0);
    }
    ASSERT_LE(outcome.report.leaps, AbsenceStory::kPatience + 1U);
    if (!outcome.killed) break;
    ASSERT_LT(stores, 1000U);
  }
  EXPECT_TRUE(was_missing);
}

INSTANTIATE_TEST_SUITE_P(Kernels,
                         KilledBeforeEachStore,
                         testing::Combine(testing::Values(Layout::kExpert, Layout::kRank),
                                          testing::Values(kPlanDispatch, kCombine)));

}  // namespace
}  // namespace jax_ep
