// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <cmath>
#include <cstddef>
#include <vector>

#include "csrc/cpu/calls.h"
#include "csrc/testing/cluster.h"
#include "csrc/testing/reference.h"

namespace jax_ep {
namespace {

class CombineOf : public testing::TestWithParam<ClusterOptions> {};

TEST_P(CombineOf, IsTheDefinedSumToTheBit) {
  const ClusterOptions& options = GetParam();
  Cluster cluster(options);
  ASSERT_TRUE(cluster.plan().ok());
  const Status status = cluster.combine();
  ASSERT_TRUE(status.ok()) << status.message();
  const reference::PerRank<float> expected = reference::combine_rows(
      options.shape,
      cluster.all(&RankBuffers::topk_idx),
      cluster.planned(),
      cluster.all(&RankBuffers::y),
      options.weighted ? cluster.all(&RankBuffers::weights) : reference::PerRank<float>{},
      options.hidden,
      options.dtype,
      options.domain_size);
  for (int32_t rank = 0; rank < options.shape.num_ranks; ++rank) {
    // As bytes: a zero must have the right sign too.
    EXPECT_EQ(cluster.rank(rank).out, cluster.encode(expected[static_cast<size_t>(rank)]))
        << "rank " << rank;
  }
}

TEST_P(CombineOf, BringsScalarsBack) {
  const ClusterOptions& options = GetParam();
  if (!options.scalars) return;
  Cluster cluster(options);
  ASSERT_TRUE(cluster.plan().ok());
  ASSERT_TRUE(cluster.combine().ok());
  EXPECT_EQ(cluster.all(&RankBuffers::returned_scalars),
            reference::combine_scalars(options.shape,
                                       cluster.all(&RankBuffers::topk_idx),
                                       cluster.planned(),
                                       cluster.all(&RankBuffers::weights)));
}

std::vector<ClusterOptions> problems() {
  std::vector<ClusterOptions> all;
  const auto add = [&](ClusterOptions options) {
    options.seed = static_cast<uint32_t>(all.size());
    all.push_back(options);
  };
  for (const Layout layout : {Layout::kExpert, Layout::kRank}) {
    for (const bool weighted : {true, false}) {
      const auto shape = [layout](int32_t num_ranks,
                                  int32_t num_experts,
                                  int32_t num_topk,
                                  int64_t num_tokens,
                                  int64_t capacity = -1) {
        EpShape result{.num_ranks = num_ranks,
                       .num_experts = num_experts,
                       .num_topk = num_topk,
                       .num_tokens = num_tokens,
                       .expert_alignment = layout == Layout::kExpert ? 4 : 1,
                       .layout = layout};
        result.recv_capacity = capacity < 0 ? worst_case_capacity(result) : capacity;
        return result;
      };
      for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
        for (const int64_t hidden : {1, 31, 64, 257}) {
          add({.shape = shape(3, 12, 4, 9),
               .hidden = hidden,
               .dtype = dtype,
               .weighted = weighted});
        }
        add({.shape = shape(6, 12, 12, 7), .hidden = 19, .dtype = dtype, .weighted = weighted});
        add({.shape = shape(1, 40, 40, 3), .hidden = 19, .dtype = dtype, .weighted = weighted});
        add({.shape = shape(1, 1, 1, 6), .hidden = 5, .dtype = dtype, .weighted = weighted});
        add({.shape = shape(3, 12, 4, 9, 8), .dtype = dtype, .weighted = weighted});
      }
      for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
        for (const int32_t domain_size : {1, 2, 4, 8}) {
          add({.shape = shape(8, 16, 9, 7),
               .hidden = 35,
               .dtype = dtype,
               .weighted = weighted,
               .domain_size = domain_size});
        }
        // Rows are dropped; a token may have none in a domain.
        add({.shape = shape(6, 12, 3, 9, 8),
             .dtype = dtype,
             .weighted = weighted,
             .domain_size = 3});
      }
      add({.shape = shape(16, 32, 5, 4), .weighted = weighted});
      add({.shape = shape(3, 12, 4, 9, 0), .weighted = weighted});
      add({.shape = shape(3, 12, 4, 0), .weighted = weighted});
      add({.shape = shape(3, 12, 4, 9), .hidden = 0, .weighted = weighted});
      add({.shape = shape(3, 12, 4, 9), .scalars = false, .weighted = weighted});
    }
  }
  return all;
}

INSTANTIATE_TEST_SUITE_P(Problems, CombineOf, testing::ValuesIn(problems()), [](const auto& info) {
  return describe(info.param);
});

TEST(Combine, OfManyBytesIsAsDefinedAndRepeats) {
  for (const Layout layout : {Layout::kExpert, Layout::kRank}) {
    ClusterOptions options{.shape = {.num_ranks = 4,
                                     .num_experts = 8,
                                     .num_topk = 3,
                                     .num_tokens = 130,
                                     .layout = layout},
                           .hidden = 1100,
                           .dtype = DType::kBFloat16};
    options.shape.recv_capacity = worst_case_capacity(options.shape);
    Cluster cluster(options);
    ASSERT_TRUE(cluster.plan().ok());
    ASSERT_TRUE(cluster.combine().ok());
    EXPECT_EQ(cluster.all(&RankBuffers::out),
              reference::combine_rows(options.shape,
                                      cluster.all(&RankBuffers::topk_idx),
                                      cluster.planned(),
                                      cluster.all(&RankBuffers::y),
                                      cluster.all(&RankBuffers::weights),
                                      options.hidden,
                                      options.dtype));
    const auto first = cluster.rank(3).out;
    ASSERT_TRUE(cluster.combine().ok());
    EXPECT_EQ(cluster.rank(3).out, first);
  }
}

std::vector<std::vector<std::byte>> sums_of(ClusterOptions options, int32_t domain_size) {
  options.domain_size = domain_size;
  Cluster cluster(options);
  EXPECT_TRUE(cluster.plan().ok());
  EXPECT_TRUE(cluster.combine().ok());
  std::vector<std::vector<std::byte>> all;
  for (const RankBuffers& rank : cluster.ranks()) all.push_back(rank.out);
  return all;
}

// One domain, and one for each rank, are what there was without domains; others are not.
TEST(Combine, DomainsOfOneRankAndOfAllChangeNothing) {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    ClusterOptions options{
        .shape = {.num_ranks = 8, .num_experts = 16, .num_topk = 12, .num_tokens = 30},
        .hidden = 100,
        .dtype = dtype};
    options.shape.recv_capacity = worst_case_capacity(options.shape);
    const auto expected = sums_of(options, 0);
    EXPECT_EQ(sums_of(options, 1), expected);
    EXPECT_EQ(sums_of(options, 8), expected);
    EXPECT_NE(sums_of(options, 4), expected);
    EXPECT_NE(sums_of(options, 2), sums_of(options, 4));
  }
}

// <dispatch(x), y> = <x, combine(y)>: small integers make both sides exact.
TEST(Combine, WithoutWeightsIsTheAdjointOfDispatch) {
  for (const Layout layout : {Layout::kExpert, Layout::kRank}) {
    ClusterOptions options{.shape = {.num_ranks = 3,
                                     .num_experts = 6,
                                     .num_topk = 3,
                                     .num_tokens = 8,
                                     .recv_capacity = layout == Layout::kExpert ? 10 : 6,  // drops
                                     .layout = layout},
                           .hidden = 5,
                           .weighted = false};
    Cluster cluster(options);
    for (RankBuffers& rank : cluster.ranks()) {
      int next = 0;
      const auto integers = [&](const std::vector<std::byte>& buffer) {
        std::vector<float> values = cluster.decode(buffer);
        for (float& value : values) value = static_cast<float>(next++ % 7 - 3);
        return cluster.encode(values);
      };
      rank.x = integers(rank.x);
      rank.y = integers(rank.y);
    }
    ASSERT_TRUE(cluster.plan().ok());
    ASSERT_TRUE(cluster.dispatch().ok());
    ASSERT_TRUE(cluster.combine().ok());
    const auto inner = [&](auto a, auto b) {
      double sum = 0;
      const auto left = cluster.all(a);
      const auto right = cluster.all(b);
      for (size_t rank = 0; rank < left.size(); ++rank) {
        for (size_t i = 0; i < left[rank].size(); ++i) sum += left[rank][i] * right[rank][i];
      }
      return sum;
    };
    EXPECT_GT(cluster.rank(0).num_dropped, 0);
    EXPECT_NE(inner(&RankBuffers::rows, &RankBuffers::y), 0);
    EXPECT_EQ(inner(&RankBuffers::rows, &RankBuffers::y),
              inner(&RankBuffers::x, &RankBuffers::out));
    EXPECT_EQ(inner(&RankBuffers::row_scalars, &RankBuffers::weights),
              inner(&RankBuffers::token_scalars, &RankBuffers::returned_scalars));
  }
}

}  // namespace
}  // namespace jax_ep
