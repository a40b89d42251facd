// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <set>
#include <string>
#include <vector>

#include "csrc/cpu/calls.h"
#include "csrc/testing/cluster.h"
#include "csrc/testing/reference.h"

namespace jax_ep {
namespace {

using Ints = std::vector<int32_t>;

// Two ranks, four experts, two tokens each; worked by hand below.
ClusterOptions hand_worked(Layout layout, int64_t capacity, int32_t alignment = 1) {
  return {.shape = {.num_ranks = 2,
                    .num_experts = 4,
                    .num_topk = 2,
                    .num_tokens = 3,
                    .recv_capacity = capacity,
                    .expert_alignment = alignment,
                    .layout = layout}};
}

Cluster hand_worked_cluster(Layout layout, int64_t capacity, int32_t alignment = 1) {
  Cluster cluster(hand_worked(layout, capacity, alignment));
  cluster.rank(0).topk_idx = {1, 0, 3, 1, -1, 2};
  cluster.rank(1).topk_idx = {0, 1, -1, -1, 1, 3};
  return cluster;
}

TEST(Plan, ByExpertByHand) {
  Cluster cluster = hand_worked_cluster(Layout::kExpert, 12);
  ASSERT_TRUE(cluster.plan().ok());
  // Rank 0: expert 0 gets tokens 0 and 3 (rank 1's first), expert 1 gets 0, 1, 3, 5.
  EXPECT_EQ(cluster.rank(0).row_source, (Ints{0, 3, 0, 1, 3, 5, -1, -1, -1, -1, -1, -1}));
  EXPECT_EQ(cluster.rank(0).group_sizes, (Ints{2, 4}));
  EXPECT_EQ(cluster.rank(0).tokens_per_expert, (Ints{2, 4}));
  EXPECT_EQ(cluster.rank(0).num_dropped, 0);
  // Rank 1: expert 2 gets token 2, expert 3 gets 1 and 5.
  EXPECT_EQ(cluster.rank(1).row_source, (Ints{2, 1, 5, -1, -1, -1, -1, -1, -1, -1, -1, -1}));
  EXPECT_EQ(cluster.rank(1).group_sizes, (Ints{1, 2}));
  EXPECT_EQ(cluster.rank(1).tokens_per_expert, (Ints{1, 2}));
  EXPECT_EQ(cluster.rank(0).slot, (Ints{2, 0, 1, 3, -1, 0}));
  EXPECT_EQ(cluster.rank(1).slot, (Ints{1, 4, -1, -1, 5, 2}));
}

TEST(Plan, ByExpertAlignedByHand) {
  Cluster cluster = hand_worked_cluster(Layout::kExpert, 12, 4);
  ASSERT_TRUE(cluster.plan().ok());
  EXPECT_EQ(cluster.rank(0).row_source, (Ints{0, 3, -1, -1, 0, 1, 3, 5, -1, -1, -1, -1}));
  EXPECT_EQ(cluster.rank(0).group_sizes, (Ints{4, 4}));
  EXPECT_EQ(cluster.rank(0).tokens_per_expert, (Ints{2, 4}));
  EXPECT_EQ(cluster.rank(1).row_source, (Ints{2, -1, -1, -1, 1, 5, -1, -1, -1, -1, -1, -1}));
  EXPECT_EQ(cluster.rank(1).group_sizes, (Ints{4, 4}));
  EXPECT_EQ(cluster.rank(0).slot, (Ints{4, 0, 4, 5, -1, 0}));
  EXPECT_EQ(cluster.rank(1).slot, (Ints{1, 6, -1, -1, 7, 5}));
}

TEST(Plan, ByExpertDropsPastTheCapacityByHand) {
  Cluster cluster = hand_worked_cluster(Layout::kExpert, 3);
  ASSERT_TRUE(cluster.plan().ok());
  EXPECT_EQ(cluster.rank(0).row_source, (Ints{0, 3, 0}));
  EXPECT_EQ(cluster.rank(0).group_sizes, (Ints{2, 1}));
  EXPECT_EQ(cluster.rank(0).tokens_per_expert, (Ints{2, 4})) << "counted before the drop";
  EXPECT_EQ(cluster.rank(0).num_dropped, 3);
  EXPECT_EQ(cluster.rank(1).num_dropped, 0);
  EXPECT_EQ(cluster.rank(0).slot, (Ints{2, 0, 1, -1, -1, 0}));
  EXPECT_EQ(cluster.rank(1).slot, (Ints{1, -1, -1, -1, -1, 2}));
}

TEST(Plan, ByRankByHand) {
  Cluster cluster = hand_worked_cluster(Layout::kRank, 6);
  ASSERT_TRUE(cluster.plan().ok());
  // Rank 0 hosts experts 0 and 1: tokens 0 and 1 of rank 0, 3 and 5 (its 0 and 2) of rank 1.
  EXPECT_EQ(cluster.rank(0).row_source, (Ints{0, 1, 3, 5, -1, -1}));
  EXPECT_EQ(cluster.rank(0).row_topk_idx, (Ints{1, 0, -1, 1, 0, 1, 1, -1, -1, -1, -1, -1}));
  EXPECT_EQ(cluster.rank(0).group_sizes, (Ints{2, 2}));
  EXPECT_EQ(cluster.rank(0).tokens_per_expert, (Ints{2, 4}));
  EXPECT_EQ(cluster.rank(1).row_source, (Ints{1, 2, 5, -1, -1, -1}));
  EXPECT_EQ(cluster.rank(1).row_topk_idx, (Ints{1, -1, -1, 0, -1, 1, -1, -1, -1, -1, -1, -1}));
  EXPECT_EQ(cluster.rank(1).group_sizes, (Ints{2, 1}));
  EXPECT_EQ(cluster.rank(1).tokens_per_expert, (Ints{1, 2}));
  EXPECT_EQ(cluster.rank(0).slot, (Ints{0, 0, 0, 1, -1, 1}));
  EXPECT_EQ(cluster.rank(1).slot, (Ints{2, 2, -1, -1, 3, 2}));
  EXPECT_EQ(cluster.rank(0).num_dropped, 0);
}

TEST(Plan, ByRankDropsPastTheCapacityByHand) {
  Cluster cluster = hand_worked_cluster(Layout::kRank, 3);
  ASSERT_TRUE(cluster.plan().ok());
  EXPECT_EQ(cluster.rank(0).row_source, (Ints{0, 1, 3}));
  EXPECT_EQ(cluster.rank(0).group_sizes, (Ints{2, 1}));
  EXPECT_EQ(cluster.rank(0).tokens_per_expert, (Ints{2, 4})) << "counted before the drop";
  EXPECT_EQ(cluster.rank(0).num_dropped, 1);
  EXPECT_EQ(cluster.rank(1).slot, (Ints{2, 2, -1, -1, -1, 2}));
}

class PlanOf : public testing::TestWithParam<ClusterOptions> {};

TEST_P(PlanOf, IsAsDefined) {
  Cluster cluster(GetParam());
  const Status status = cluster.plan();
  ASSERT_TRUE(status.ok()) << status.message();
  const reference::Plan expected =
      reference::plan(GetParam().shape, cluster.all(&RankBuffers::topk_idx));
  const reference::Plan got = cluster.planned();
  EXPECT_EQ(got.slot, expected.slot);
  EXPECT_EQ(got.row_source, expected.row_source);
  if (GetParam().shape.layout == Layout::kRank) {
    EXPECT_EQ(got.row_topk_idx, expected.row_topk_idx);
  }
  EXPECT_EQ(got.group_sizes, expected.group_sizes);
  EXPECT_EQ(got.tokens_per_expert, expected.tokens_per_expert);
  EXPECT_EQ(got.num_dropped, expected.num_dropped);
}

std::vector<ClusterOptions> problems() {
  std::vector<ClusterOptions> all;
  std::set<std::string> names;
  uint32_t seed = 1;
  const auto add = [&](EpShape shape, double capacity_factor) {
    const auto capacity = static_cast<double>(worst_case_capacity(shape));
    shape.recv_capacity = static_cast<int64_t>(capacity * capacity_factor);
    const ClusterOptions options{.shape = shape, .seed = seed++};
    // With few tokens some of these shapes are the same.
    if (names.insert(describe(options)).second) all.push_back(options);
  };
  for (const Layout layout : {Layout::kExpert, Layout::kRank}) {
    for (const int32_t num_ranks : {1, 3, 6, 64}) {
      for (const int64_t num_tokens : {0, 1, 17}) {
        const int32_t num_experts = num_ranks * (num_ranks == 64 ? 2 : 4);
        for (const int32_t num_topk : {1, 3, num_experts}) {
          const EpShape shape{.num_ranks = num_ranks,
                              .num_experts = num_experts,
                              .num_topk = std::min(num_topk, num_experts),
                              .num_tokens = num_tokens,
                              .layout = layout};
          if (num_ranks == 64 && num_topk == num_experts) continue;  // slow in the reference
          for (const double factor : {1.0, 1.7, 0.3, 0.0}) add(shape, factor);
          if (layout == Layout::kRank) continue;
          EpShape aligned = shape;
          for (const int32_t alignment : {2, 5, 16}) {
            aligned.expert_alignment = alignment;
            for (const double factor : {1.0, 0.25}) add(aligned, factor);
          }
        }
      }
    }
  }
  return all;
}

INSTANTIATE_TEST_SUITE_P(Problems, PlanOf, testing::ValuesIn(problems()), [](const auto& info) {
  return describe(info.param);
});

// Larger than one unit of work, so that the workers take part; twice, for the same answer.
TEST(Plan, OfManyTokensIsAsDefinedAndRepeats) {
  for (const Layout layout : {Layout::kExpert, Layout::kRank}) {
    const ClusterOptions options{.shape = {.num_ranks = 4,
                                           .num_experts = 16,
                                           .num_topk = 4,
                                           .num_tokens = 1500,
                                           .recv_capacity = 5000,
                                           .expert_alignment = layout == Layout::kExpert ? 8 : 1,
                                           .layout = layout},
                                 .hidden = 0};
    Cluster cluster(options);
    ASSERT_TRUE(cluster.plan().ok());
    if (layout == Layout::kExpert) {
      const reference::Plan expected =
          reference::plan(options.shape, cluster.all(&RankBuffers::topk_idx));
      EXPECT_EQ(cluster.planned().slot, expected.slot);
      EXPECT_EQ(cluster.planned().row_source, expected.row_source);
    }
    const auto first = cluster.all(&RankBuffers::slot);
    ASSERT_TRUE(cluster.plan().ok());
    EXPECT_EQ(cluster.all(&RankBuffers::slot), first);
  }
}

// The message names the rank, the token, k, the value and what is allowed.
class PlanErrors : public testing::TestWithParam<Layout> {
 protected:
  Cluster cluster_{{.shape = {.num_ranks = 3,
                              .num_experts = 6,
                              .num_topk = 3,
                              .num_tokens = 4,
                              .recv_capacity = 36,
                              .layout = GetParam()}}};

  void expect_error(const std::string& message) {
    const Status status = cluster_.plan();
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
    EXPECT_EQ(status.message(), message);
  }
  void set(int32_t rank, std::vector<int32_t> topk_idx) {
    cluster_.rank(rank).topk_idx = std::move(topk_idx);
  }
};

INSTANTIATE_TEST_SUITE_P(Layouts,
                         PlanErrors,
                         testing::Values(Layout::kExpert, Layout::kRank),
                         [](const auto& info) { return std::string(name(info.param)); });

TEST_P(PlanErrors, ExpertTooLarge) {
  set(1, {0, 1, 2, 3, 4, 5, 0, 6, 1, 0, 1, 2});
  expect_error("rank 1: topk_idx[2, 1] is 6, but must be -1 (no selection) or an expert in [0, 6)");
}

TEST_P(PlanErrors, ExpertTooSmall) {
  set(2, {0, 1, -2, 3, 4, 5, 0, 1, 2, 0, 1, 2});
  expect_error(
      "rank 2: topk_idx[0, 2] is -2, but must be -1 (no selection) or an expert in [0, 6)");
}

TEST_P(PlanErrors, ExtremeExperts) {
  for (const int32_t extreme :
       {std::numeric_limits<int32_t>::max(), std::numeric_limits<int32_t>::min()}) {
    set(0, {0, 1, 2, 3, 4, 5, 0, 1, 2, 0, extreme, 2});
    expect_error("rank 0: topk_idx[3, 1] is " + std::to_string(extreme) +
                 ", but must be -1 (no selection) or an expert in [0, 6)");
  }
}

TEST_P(PlanErrors, RepeatedExpert) {
  set(1, {0, 1, 2, 4, -1, 4, 0, 1, 2, 0, 1, 2});
  expect_error(
      "rank 1: topk_idx[1, 2] is 4, and so is topk_idx[1, 0]: the experts of a token must be "
      "distinct");
}

TEST_P(PlanErrors, TheFirstOfSeveralIsNamed) {
  set(2, {9, 1, 2, 3, 4, 5, 0, 1, 2, 0, 1, 2});
  set(1, {0, 1, 2, 3, 4, 5, 0, 1, 1, 0, 8, 2});
  expect_error(
      "rank 1: topk_idx[2, 2] is 1, and so is topk_idx[2, 1]: the experts of a token must be "
      "distinct");
}

TEST_P(PlanErrors, SameExpertInTwoTokensIsFine) {
  for (int32_t rank = 0; rank < 3; ++rank) set(rank, {0, 1, 2, 0, 1, 2, 2, 1, 0, -1, -1, -1});
  EXPECT_TRUE(cluster_.plan().ok());
}

}  // namespace
}  // namespace jax_ep
